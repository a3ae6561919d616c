//! Scopes of systemd for VM processes: what happens to the service's own does not happen to them, and each is accounted for by itself.
//!
//! ```text
//!  service of a user's manager, or of root ── systemd-run --scope ──► msb-BOOT.scope in msb.slice, with the VM process from its start
//!  service behind the door of a host ── (pid, boot id) ──► front door, as root ── systemd-run --scope ──► the same
//!  either, of a process that stood by before ── systemd-run --scope ──► a scope, which takes the process in
//! ```
//!
//! Called by the launcher, by the daemon when it starts and by the front door. Nothing here runs where systemd did not start the service.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use msb_protocol::id::BootId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// The slice of all VM processes.
pub const SLICE: &str = "msb.slice";
/// Its stop comes before that of the scopes, and stops the sandboxes with a flush.
pub const FLUSH_UNIT: &str = "msb-flush.service";
/// Where systemd-run is.
const SYSTEMD_RUN: [&str; 2] = ["/usr/bin/systemd-run", "/bin/systemd-run"];
/// Time for the front door to answer: it is being restarted, or systemd is busy.
const DOOR_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two knocks.
const DOOR_PAUSE: Duration = Duration::from_millis(100);

/// How VM processes get scopes of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scopes {
    /// The manager that started the service makes them.
    Manager(Manager),
    /// The front door of the host makes them: only root may ask the host's manager. The path is its socket for that.
    Door(PathBuf),
}

/// A manager, and the program that speaks to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manager {
    systemd_run: PathBuf,
    user: bool,
}

impl Manager {
    /// The one that started this process; `None` if systemd did not.
    #[must_use]
    pub fn of_this_service() -> Option<Self> {
        // systemd gives it to what it starts, and nothing else keeps it: msb starts a daemon with a clean environment.
        std::env::var_os("INVOCATION_ID")?;
        let systemd_run = SYSTEMD_RUN.iter().map(PathBuf::from).find(|path| path.exists())?;
        // Only a user's manager says which process it is.
        Some(Self { systemd_run, user: std::env::var_os("MANAGERPID").is_some() })
    }

    /// What makes a scope of this name with itself in it and then becomes the program whose words the caller adds, so the process id
    /// stays. It gets the way to the manager for an environment, and passes it on.
    #[must_use]
    pub fn command(&self, unit: &str) -> Command {
        let mut command = Command::new(&self.systemd_run);
        command.env_clear();
        if self.user {
            for name in ["XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"] {
                if let Some(value) = std::env::var_os(name) {
                    command.env(name, value);
                }
            }
            command.arg("--user");
        }
        command.args(["--scope", "--quiet", "--collect", "--description=Sandboxes of msb", "--slice", SLICE]);
        command.arg(format!("--unit={unit}"));
        // Whoever has stopped the slice and starts a sandbox again has what stops that with a flush again, too.
        command.arg(format!("--property=Wants={FLUSH_UNIT}"));
        command.arg(format!("--property=Before={FLUSH_UNIT}"));
        // The guest is given its time to flush before; what is still there gets little more.
        command.args(["--property=TimeoutStopSec=10s", "--property=SendSIGKILL=yes", "--"]);
        command
    }

    /// Moves a running process into a scope of its own.
    ///
    /// # Errors
    /// systemd makes none, in its own words.
    pub fn move_process(&self, unit: &str, pid: u32) -> io::Result<()> {
        let mut command = self.command(unit);
        command.args(["/bin/sh", "-c", MOVE, "sh", &pid.to_string()]).stdin(std::process::Stdio::null());
        let output = command.output()?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(io::Error::other(format!("{}: {:.300}", output.status, said.trim())))
    }
}

/// Takes the process named by its first word into its own control group, and leaves it there.
const MOVE: &str = r#"group=$(sed -n 's/^0:://p' /proc/self/cgroup) && [ -n "$group" ] && echo "$1" > "/sys/fs/cgroup$group/cgroup.procs""#;

/// The unit of a run.
#[must_use]
pub fn unit(boot_id: BootId) -> String {
    format!("msb-{boot_id}.scope")
}

/// What the front door is asked with, in one write: a process and its run.
#[must_use]
pub fn request(pid: u32, boot_id: BootId) -> String {
    format!("{pid} {boot_id}\n")
}

/// Reads such a request; `None` for anything else.
#[must_use]
pub fn parse_request(text: &str) -> Option<(u32, BootId)> {
    let (pid, boot_id) = text.strip_suffix('\n')?.split_once(' ')?;
    Some((pid.parse().ok()?, BootId(boot_id.parse().ok()?)))
}

/// Asks the front door for a scope, and waits until the process is in it.
///
/// # Errors
/// The door cannot be reached, or says no.
pub(super) async fn ask(socket: &Path, pid: u32, boot_id: BootId) -> io::Result<()> {
    let asking = async {
        let mut door = loop {
            match UnixStream::connect(socket).await {
                Ok(door) => break door,
                // It is just being restarted.
                Err(_) => tokio::time::sleep(DOOR_PAUSE).await,
            }
        };
        door.write_all(request(pid, boot_id).as_bytes()).await?;
        match door.read_u8().await? {
            b'.' => Ok(()),
            _ => Err(io::Error::other("the front door makes none")),
        }
    };
    tokio::time::timeout(DOOR_TIMEOUT, asking).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_as_it_was_written_and_nothing_else_is() {
        let run = BootId(uuid::Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001));
        assert_eq!(parse_request(&request(41, run)), Some((41, run)));
        for bad in
            ["", "41", "41 x\n", "-1 01900000-0000-7000-8000-000000000001\n", "41 01900000-0000-7000-8000-000000000001"]
        {
            assert_eq!(parse_request(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_scope_is_stopped_after_the_flush_and_brings_it() {
        let manager = Manager { systemd_run: "/usr/bin/systemd-run".into(), user: true };
        let words: Vec<_> =
            manager.command("msb-x.scope").get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        for word in [
            "--user",
            "--scope",
            "--unit=msb-x.scope",
            "--property=Before=msb-flush.service",
            "--property=Wants=msb-flush.service",
        ] {
            assert!(words.iter().any(|found| found == word), "{word}: {words:?}");
        }
        assert_eq!(words.last().map(String::as_str), Some("--"));
    }
}
