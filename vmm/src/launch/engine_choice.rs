//! Which engine: the user's choice, or what this host can do, with one line of reason.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::spec::EngineChoice;
use msb_protocol::vmm::{ProbeOutcome, ProbeReport};

use crate::engine::kvm::probe::{self, Finding};

/// QEMU's program for this architecture.
pub const QEMU_PROGRAM: &str = "qemu-system-x86_64";
/// Where it is looked for: the daemon starts us with an empty environment, so there is no PATH.
const PROGRAM_DIRECTORIES: [&str; 4] = ["/usr/local/bin", "/usr/bin", "/bin", "/usr/libexec"];

/// What qemu's use is announced with.
pub const QEMU_WARNING: &str = "software emulation: slow, not a security boundary";

/// An engine and, when it was picked here, why.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Chosen {
    /// Never `auto`.
    pub engine: EngineChoice,
    /// One line for people.
    pub reason: Option<String>,
}

/// Finds QEMU.
pub fn find_qemu(given: Option<&Path>) -> Option<PathBuf> {
    let is_program = |path: &Path| {
        path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    };
    match given {
        Some(path) => is_program(path).then(|| path.to_owned()),
        None => PROGRAM_DIRECTORIES
            .iter()
            .map(|directory| Path::new(directory).join(QEMU_PROGRAM))
            .find(|path| is_program(path)),
    }
}

/// Decides; runs the probe only for `auto`.
///
/// # Errors
/// `engine_unavailable` with what is missing and how to get it.
pub fn choose(wanted: EngineChoice, qemu: Option<&Path>) -> Result<Chosen, ApiError> {
    match wanted {
        // Without running anything: who insists on kvm gets it, and gets to see what it is worth by `msb doctor`.
        EngineChoice::Kvm => match probe::open_complete() {
            Ok(_) => Ok(Chosen { engine: EngineChoice::Kvm, reason: None }),
            Err(finding) => {
                Err(ApiError::new(ErrorCode::EngineUnavailable, format!("engine kvm cannot be used: {finding}")))
            }
        },
        EngineChoice::Qemu => match qemu {
            Some(_) => Ok(Chosen { engine: EngineChoice::Qemu, reason: None }),
            None => Err(no_qemu("engine qemu cannot be used")),
        },
        EngineChoice::Auto => decide(&probe::probe(), qemu),
    }
}

fn no_qemu(what: &str) -> ApiError {
    ApiError::new(ErrorCode::EngineUnavailable, format!("{what}: {QEMU_PROGRAM} is not installed"))
        .with_hint("install it (Debian, Ubuntu: apt install qemu-system-x86; Fedora: dnf install qemu-system-x86)")
}

fn decide(kvm: &Finding, qemu: Option<&Path>) -> Result<Chosen, ApiError> {
    if kvm.is_usable() {
        return Ok(Chosen { engine: EngineChoice::Kvm, reason: Some(kvm.to_string()) });
    }
    if qemu.is_some() {
        return Ok(Chosen { engine: EngineChoice::Qemu, reason: Some(format!("{QEMU_WARNING} ({kvm})")) });
    }
    Err(no_qemu(&format!("no engine can be used: {kvm}; and")))
}

/// The whole picture of this host, for `msb doctor`.
pub fn report(qemu: Option<&Path>) -> ProbeReport {
    let kvm = probe::probe();
    let qemu_outcome = match qemu {
        Some(path) => ProbeOutcome { usable: true, detail: format!("{}, {QEMU_WARNING}", path.display()) },
        None => ProbeOutcome { usable: false, detail: no_qemu("not usable").message },
    };
    let chosen = decide(&kvm, qemu);
    ProbeReport {
        engine: chosen.as_ref().ok().map(|chosen| chosen.engine),
        reason: match chosen {
            Ok(chosen) => chosen.reason.unwrap_or_default(),
            Err(error) => error.message,
        },
        kvm_million_instructions_per_second: kvm.speed_mips(),
        kvm: ProbeOutcome { usable: kvm.is_usable(), detail: kvm.to_string() },
        qemu: qemu_outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_prefers_real_virtualisation_and_says_why_not() {
        let qemu = Some(Path::new("/usr/bin/qemu"));
        let works = Finding::Usable { speed_mips: 2000.0 };
        let emulated = Finding::Emulated { speed_mips: 1.0 };
        assert_eq!(decide(&works, qemu).expect("an engine").engine, EngineChoice::Kvm);
        let chosen = decide(&emulated, qemu).expect("an engine");
        assert_eq!(chosen.engine, EngineChoice::Qemu);
        assert!(chosen.reason.expect("a reason").starts_with(QEMU_WARNING));
        let error = decide(&Finding::Missing, None).expect_err("nothing works");
        assert_eq!(error.code, ErrorCode::EngineUnavailable);
        assert!(error.hint.contains("apt install"));
        assert_eq!(choose(EngineChoice::Qemu, None).unwrap_err().code, ErrorCode::EngineUnavailable);
        assert_eq!(find_qemu(Some(Path::new("/etc/passwd"))), None);
    }
}
