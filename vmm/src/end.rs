//! Why a run ended, decided in one place for both engines, and what is left behind about it.
//!
//! ```text
//!  killed here? ──► that cause          boot failed? ──► boot_failed
//!  engine failed ──► boot_failed (before ready), engine_crash
//!  reset, power off ── after goodbye ──► the stop that was expected, else completed
//!                  └── panic on the console ──► guest_panic
//!                  └── agent gone before ──► agent_lost
//!                  └── else ──► guest_reboot      (each: boot_failed before ready)
//!  halted ──► guest_halted              stopped ──► agent_lost if it was, else killed
//! ```
//!
//! `decide` is pure and table-tested. `end.json` is written by temp file, fsync and rename before the process exits, so a daemon that
//! was not there can learn of the end; the exit code names the cause too.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::state::EndCause;
use msb_protocol::vmm::{BOOT_ERROR_FILE, BootError, END_FILE, EndRecord, VmState};

use crate::engine::EngineEnd;
use crate::run::{BootFailure, Facts};

/// Records of failed boots kept, the newest included.
const BOOT_ERRORS_MAX: u32 = 20;
/// Console output in the evidence of a failed boot, in bytes.
pub const EVIDENCE_BYTES: usize = 4096;

/// The exit code of a process that could not even begin (usage, unreadable request).
pub const EXIT_USAGE: u8 = 2;

/// The exit code that names a cause. Codes are added, never renumbered.
pub fn exit_code(cause: EndCause) -> u8 {
    match cause {
        EndCause::Completed => 0,
        EndCause::StopRequested => 10,
        EndCause::Killed => 11,
        EndCause::Idle => 12,
        EndCause::MaxDuration => 13,
        EndCause::CreatorGone => 14,
        EndCause::Unhealthy => 15,
        EndCause::HostShutdown => 16,
        EndCause::GuestPanic => 20,
        EndCause::GuestReboot => 21,
        EndCause::GuestHalted => 22,
        EndCause::AgentLost => 23,
        EndCause::BootFailed => 30,
        EndCause::EngineCrash => 31,
        EndCause::VmmCrash => 32,
    }
}

/// What an end comes to.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The cause.
    pub cause: EndCause,
    /// For people: what was seen.
    pub message: String,
    /// The failure, if it was a failed boot.
    pub boot_failure: Option<BootFailure>,
}

/// Decides. `panic_line` is the console's panic banner, `has_console` whether the guest printed anything.
pub fn decide(end: &EngineEnd, facts: &Facts, panic_line: Option<&str>, has_console: bool) -> Verdict {
    if let Some(cause) = facts.killed {
        return Verdict { cause, message: "ended on request without a flush".into(), boot_failure: None };
    }
    if let Some(failure) = &facts.boot_failure {
        return Verdict {
            cause: EndCause::BootFailed,
            message: failure.error.message.clone(),
            boot_failure: Some(failure.clone()),
        };
    }
    let booting = matches!(facts.state, VmState::Booting | VmState::SettingUp);
    let (cause, message) = match end {
        EngineEnd::Failed { detail } => (EndCause::EngineCrash, detail.clone()),
        // A guest that halts after its goodbye is stopped: as clean an end as any.
        EngineEnd::Reset | EngineEnd::PowerOff | EngineEnd::Halted | EngineEnd::Stopped if facts.goodbye => {
            (facts.expected.unwrap_or(EndCause::Completed), "the guest said goodbye and turned itself off".to_owned())
        }
        EngineEnd::Reset | EngineEnd::PowerOff => match panic_line {
            Some(line) => (EndCause::GuestPanic, line.to_owned()),
            None if facts.agent_lost_at.is_some() => {
                (EndCause::AgentLost, "the agent in the guest died and the guest reset itself".to_owned())
            }
            None => (EndCause::GuestReboot, "the guest reset itself without a goodbye".to_owned()),
        },
        EngineEnd::Halted => (EndCause::GuestHalted, "the guest halted its processors".to_owned()),
        EngineEnd::Stopped if facts.agent_lost_at.is_some() => {
            (EndCause::AgentLost, "the agent in the guest is gone and the guest did not end by itself".to_owned())
        }
        EngineEnd::Stopped => (EndCause::Killed, "the machine was stopped".to_owned()),
    };
    if !booting || facts.goodbye {
        return Verdict { cause, message, boot_failure: None };
    }
    let stage = match (&cause, facts.state, has_console) {
        (EndCause::EngineCrash, _, _) => "engine",
        (_, VmState::SettingUp, _) => "setup",
        (EndCause::GuestPanic, _, _) | (_, _, false) => "kernel",
        _ => "agent",
    };
    let error = ApiError::new(ErrorCode::BootFailed, format!("the sandbox did not boot ({stage}): {message}"));
    let failure = BootFailure { stage: stage.to_owned(), error };
    Verdict { cause: EndCause::BootFailed, message: failure.error.message.clone(), boot_failure: Some(failure) }
}

/// The error of an agent that never said hello (or never got ready) within its time.
pub fn silent_agent(facts: &Facts, has_console: bool, timeout_ms: u64, panic_line: Option<&str>) -> BootFailure {
    let (stage, message, hint) = match (facts.state, panic_line) {
        (_, Some(line)) => ("kernel", format!("the guest kernel gave up: {line}"), None),
        (VmState::SettingUp, None) => {
            ("setup", format!("the agent said hello but did not set the guest up within {timeout_ms} ms"), None)
        }
        (_, None) => (
            if has_console { "agent" } else { "kernel" },
            format!("the agent in the guest did not answer within {timeout_ms} ms"),
            Some(
                "a kernel needs CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES, CONFIG_VIRTIO_BLK, CONFIG_VIRTIO_VSOCKETS, \
                 CONFIG_EROFS_FS, CONFIG_EXT4_FS and CONFIG_OVERLAY_FS built in; stock distribution kernels lack the first. \
                 The console's tail shows how far it came",
            ),
        ),
    };
    let mut error = ApiError::new(ErrorCode::AgentTimeout, message);
    if let Some(hint) = hint {
        error = error.with_hint(hint);
    }
    BootFailure { stage: stage.to_owned(), error }
}

/// Writes `end.json`.
pub fn write_end(run_dir: &Path, record: &EndRecord) -> io::Result<()> {
    write_durably(&run_dir.join(END_FILE), &serde_json::to_vec_pretty(record)?)
}

/// Writes `boot-error.json` and keeps the ones before it as `boot-error.1.json` (newest) and so on.
pub fn write_boot_error(log_dir: &Path, error: &BootError) -> io::Result<()> {
    let numbered = |number: u32| -> PathBuf {
        match number {
            0 => log_dir.join(BOOT_ERROR_FILE),
            _ => log_dir.join(BOOT_ERROR_FILE.replace(".json", &format!(".{number}.json"))),
        }
    };
    for number in (0..BOOT_ERRORS_MAX - 1).rev() {
        match fs::rename(numbered(number), numbered(number + 1)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    write_durably(&numbered(0), &serde_json::to_vec_pretty(error)?)
}

/// Temp file, fsync, rename, fsync of the directory: a reader sees the old record or the new one, never half of one.
fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let temporary = path.with_extension("json.new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use msb_protocol::id::BootId;

    use super::*;

    fn facts(state: VmState) -> Facts {
        Facts {
            state,
            agent_generation: None,
            main_started: false,
            paused: false,
            stands: false,
            main_end: None,
            goodbye: false,
            goodbye_at: None,
            streams_stopped: false,
            agent_lost_at: None,
            expected: None,
            killed: None,
            boot_failure: None,
        }
    }

    fn cause(end: EngineEnd, facts: &Facts, panic: Option<&str>) -> EndCause {
        decide(&end, facts, panic, true).cause
    }

    #[test]
    fn each_end_has_its_cause() {
        let ready = facts(VmState::Ready);
        let goodbye = Facts { goodbye: true, state: VmState::Ending, ..ready.clone() };
        let stopping = Facts { expected: Some(EndCause::StopRequested), ..goodbye.clone() };
        let lost = Facts { agent_lost_at: Some(Instant::now()), ..ready.clone() };
        let killed = Facts { killed: Some(EndCause::Idle), ..ready.clone() };
        let crash = EngineEnd::Failed { detail: "x".into() };
        let panic = Some("Kernel panic - not syncing: x");
        for (end, facts, panic, expected) in [
            (EngineEnd::Reset, &goodbye, None, EndCause::Completed),
            (EngineEnd::PowerOff, &goodbye, None, EndCause::Completed),
            (EngineEnd::Stopped, &goodbye, None, EndCause::Completed),
            (EngineEnd::Halted, &stopping, None, EndCause::StopRequested),
            (EngineEnd::Reset, &stopping, None, EndCause::StopRequested),
            (EngineEnd::Reset, &ready, None, EndCause::GuestReboot),
            (EngineEnd::Reset, &ready, panic, EndCause::GuestPanic),
            (EngineEnd::Reset, &lost, None, EndCause::AgentLost),
            (EngineEnd::Reset, &lost, panic, EndCause::GuestPanic),
            (EngineEnd::Stopped, &lost, None, EndCause::AgentLost),
            (EngineEnd::Stopped, &killed, None, EndCause::Idle),
            (EngineEnd::Stopped, &ready, None, EndCause::Killed),
            (EngineEnd::Halted, &ready, None, EndCause::GuestHalted),
            (crash.clone(), &ready, None, EndCause::EngineCrash),
            (crash.clone(), &killed, None, EndCause::Idle),
        ] {
            assert_eq!(cause(end.clone(), facts, panic), expected, "{end:?} {facts:?} {panic:?}");
        }
    }

    #[test]
    fn an_end_before_ready_is_a_failed_boot_with_its_stage() {
        let stage = |end: EngineEnd, state, panic, console| {
            let verdict = decide(&end, &facts(state), panic, console);
            assert_eq!(verdict.cause, EndCause::BootFailed);
            verdict.boot_failure.expect("evidence").stage
        };
        let crash = EngineEnd::Failed { detail: "x".into() };
        assert_eq!(stage(crash, VmState::Booting, None, false), "engine");
        assert_eq!(stage(EngineEnd::Reset, VmState::Booting, None, false), "kernel");
        assert_eq!(stage(EngineEnd::Reset, VmState::Booting, Some("Kernel panic"), true), "kernel");
        assert_eq!(stage(EngineEnd::Reset, VmState::Booting, None, true), "agent");
        assert_eq!(stage(EngineEnd::Reset, VmState::SettingUp, None, true), "setup");
        let silent = silent_agent(&facts(VmState::Booting), true, 5, None);
        assert!(silent.error.hint.contains("CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES"));
        assert_eq!(silent.error.code, ErrorCode::AgentTimeout);
    }

    #[test]
    fn exit_codes_are_distinct() {
        let causes = [
            EndCause::Completed,
            EndCause::StopRequested,
            EndCause::Killed,
            EndCause::Idle,
            EndCause::MaxDuration,
            EndCause::CreatorGone,
            EndCause::GuestPanic,
            EndCause::GuestReboot,
            EndCause::GuestHalted,
            EndCause::AgentLost,
            EndCause::BootFailed,
            EndCause::VmmCrash,
            EndCause::EngineCrash,
            EndCause::HostShutdown,
            EndCause::Unhealthy,
        ];
        let codes: std::collections::BTreeSet<u8> = causes.into_iter().map(exit_code).collect();
        assert_eq!(codes.len(), causes.len());
        // 1 is a Rust error, 2 usage, 101 a panic, 128 and above a signal.
        assert!(codes.iter().all(|code| ![1, 2, 101].contains(code) && *code < 128));
    }

    #[test]
    fn the_last_twenty_failures_are_kept() {
        let directory = tempfile::tempdir().expect("directory");
        for number in 0..25u64 {
            let error = BootError {
                boot_id: BootId::generate(),
                at_ns: number,
                stage: "kernel".into(),
                error: ApiError::new(ErrorCode::BootFailed, "x"),
                console_tail: String::new(),
            };
            write_boot_error(directory.path(), &error).expect("write");
        }
        assert_eq!(fs::read_dir(directory.path()).expect("list").count(), 20);
        let read = |name: &str| -> BootError {
            serde_json::from_slice(&fs::read(directory.path().join(name)).expect("read")).expect("record")
        };
        assert_eq!(read("boot-error.json").at_ns, 24);
        assert_eq!(read("boot-error.19.json").at_ns, 5);
    }
}
