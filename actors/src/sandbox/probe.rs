//! Runs one short command in a sandbox and says how it ended: health checks and the pre-stop hook. It is a session like any exec's, but
//! holds no activity guard: what msb runs by itself keeps nothing awake.

use std::path::Path;
use std::time::Duration;

use msb_protocol::guest::{ExecConfig, GuestBody, OpenKind};
use msb_protocol::health::OUTPUT_LEN_MAX;
use msb_protocol::id::BootId;
use msb_protocol::state::ProcessEnd;

use crate::vm::Launcher;
use crate::vm::session;

/// Time beyond the command's own for the guest to say that it killed it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probed {
    /// Whether it ended with exit code 0 in time.
    pub success: bool,
    /// How, for people.
    pub outcome: String,
    /// The last of what it wrote, fit for a terminal.
    pub output: String,
}

impl Probed {
    fn failed(outcome: impl Into<String>) -> Self {
        Self { success: false, outcome: outcome.into(), output: String::new() }
    }
}

/// Runs it to its end or the end of its time.
pub async fn run(
    launcher: &dyn Launcher,
    run_dir: &Path,
    boot_id: BootId,
    argv: Vec<String>,
    timeout_ms: u64,
) -> Probed {
    let exec = ExecConfig { argv, timeout_ms, ..ExecConfig::default() };
    let limit = Duration::from_millis(timeout_ms).saturating_add(ANSWER_TIMEOUT);
    let ending = async {
        let mut session = match session::open(launcher, run_dir, boot_id, OpenKind::Exec(exec)).await {
            Ok(session) => session,
            Err(error) => return Probed::failed(error.message),
        };
        let mut output = Vec::new();
        loop {
            match session.reader.next().await {
                Ok(Some(GuestBody::Output(piece))) => {
                    output.extend_from_slice(&piece.data);
                    let excess = output.len().saturating_sub(OUTPUT_LEN_MAX);
                    output.drain(..excess);
                }
                Ok(Some(GuestBody::Exited(exited))) => return ended(exited.into(), &output),
                Ok(Some(GuestBody::Refused(failure))) => return Probed::failed(failure.message),
                Ok(Some(_)) => {}
                Ok(None) => return Probed::failed("the sandbox went away"),
                Err(error) => return Probed::failed(error.to_string()),
            }
        }
    };
    tokio::time::timeout(limit, ending).await.unwrap_or_else(|_| Probed::failed("the agent did not say how it ended"))
}

fn ended(end: ProcessEnd, output: &[u8]) -> Probed {
    let outcome = match (end.timed_out, end.code, end.signal) {
        (true, ..) => "timed out".into(),
        (_, Some(code), _) => format!("exit code {code}"),
        (_, None, Some(signal)) => format!("killed by signal {signal}"),
        (_, None, None) => "ended without a code".into(),
    };
    let output = String::from_utf8_lossy(output).chars().filter(|c| !c.is_control() || *c == '\n').collect();
    Probed { success: end.success(), outcome, output }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_in_words() {
        for (end, success, outcome) in [
            (ProcessEnd::exited(0), true, "exit code 0"),
            (ProcessEnd::exited(3), false, "exit code 3"),
            (ProcessEnd::signalled(9), false, "killed by signal 9"),
            (ProcessEnd { timed_out: true, ..ProcessEnd::signalled(9) }, false, "timed out"),
        ] {
            let probed = ended(end, b"a\x1b[2Jb\n");
            assert_eq!(
                (probed.success, probed.outcome.as_str(), probed.output.as_str()),
                (success, outcome, "a[2Jb\n")
            );
        }
    }
}
