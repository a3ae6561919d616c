//! The systemd units that `cargo xtask install --prefix` and `cargo xtask dist` lay down, for a user's manager and for the host's.
//!
//! ```text
//! P/lib/systemd/user/{msbd.socket,msbd.service,msb-flush.service,msb.slice}     sandboxes of one user
//! P/lib/systemd/system/{msbd.socket,msbd.service,msb-flush.service,msb.slice}   one service for the users in group msb
//! P/lib/sysusers.d/msb.conf                                                     that group
//! ```
//!
//! * `msbd` may be restarted, upgraded and killed: VM processes are in scopes of their own (`msb-BOOT.scope` in `msb.slice`), and
//!   `KillMode=process` spares those that had to stay with the service.
//! * `msb-flush` does nothing until it is stopped; then it stops every sandbox with a flush. The scopes are ordered before it, so its end comes
//!   first, whether somebody stops the slice or the host goes down. Each scope wants it, so it is there again when a sandbox is.

use std::path::Path;

/// Which manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manager {
    User,
    System,
}

impl Manager {
    fn folder(self) -> &'static str {
        match self {
            Self::User => "lib/systemd/user",
            Self::System => "lib/systemd/system",
        }
    }
}

/// Every file: its path below the prefix, and its text for programs that run from `prefix`.
pub(crate) fn files(prefix: &Path) -> Vec<(String, String)> {
    let mut files = vec![("lib/sysusers.d/msb.conf".to_owned(), "#Type Name ID GECOS\ng msb -\n".to_owned())];
    for manager in [Manager::User, Manager::System] {
        for (name, text) in [
            ("msbd.socket", socket(manager)),
            ("msbd.service", service(manager, prefix)),
            ("msb-flush.service", flush(manager, prefix)),
            ("msb.slice", slice()),
        ] {
            files.push((format!("{}/{name}", manager.folder()), text));
        }
    }
    files
}

fn socket(manager: Manager) -> String {
    let (path, access) = match manager {
        Manager::User => ("%t/msb/msbd.sock", "SocketMode=0600"),
        Manager::System => ("/run/msb/msbd.sock", "SocketMode=0660\nSocketGroup=msb"),
    };
    format!(
        "[Unit]
Description=Control socket of msb

[Socket]
ListenStream={path}
{access}
DirectoryMode={}
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
",
        if manager == Manager::User { "0700" } else { "0755" }
    )
}

fn service(manager: Manager, prefix: &Path) -> String {
    let bin = prefix.join("bin");
    let bin = bin.display();
    let arguments = if manager == Manager::System { " --host" } else { "" };
    let own = match manager {
        Manager::User => "",
        // It is root to become its users, and needs little else of root's.
        Manager::System => "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK AF_VSOCK\n",
    };
    format!(
        "[Unit]
Description=Service of msb, sandboxes in microVMs
Documentation=man:msb(1)
Requires=msbd.socket
After=msbd.socket
Wants=msb-flush.service

[Service]
Type=notify
NotifyAccess=main
ExecStart={bin}/msbd{arguments}
# What keeps it small after it has loaded an image.
Environment=MALLOC_ARENA_MAX=2 MALLOC_MMAP_THRESHOLD_=131072
WatchdogSec=60s
Restart=on-failure
RestartSec=200ms
# What it starts outlives it; msb-flush.service ends that.
KillMode=process
TimeoutStopSec=30s
# A watchdog ends it with SIGABRT; what it knows of its users belongs in no file beside them, and writing it would only hold it up.
LimitCORE=0
Delegate=yes
FileDescriptorStoreMax=1024
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
SystemCallArchitectures=native
{own}
[Install]
Also=msbd.socket
WantedBy={}
",
        if manager == Manager::User { "default.target" } else { "multi-user.target" }
    )
}

fn flush(manager: Manager, prefix: &Path) -> String {
    let bin = prefix.join("bin");
    let command = if manager == Manager::System { "msbd --host-stop" } else { "msb self stop --sandboxes" };
    format!(
        "[Unit]
Description=Stop of every sandbox with a flush
Documentation=man:msb(1)
PartOf=msb.slice
# Stopped before the service that it asks.
After=msbd.socket msbd.service

[Service]
Type=oneshot
RemainAfterExit=yes
Slice=msb.slice
ExecStart=/bin/true
ExecStop={}/{command}
TimeoutStopSec=120s
",
        bin.display()
    )
}

fn slice() -> String {
    "[Unit]
Description=Sandboxes of msb
Documentation=man:msb(1)

[Slice]
CPUAccounting=yes
MemoryAccounting=yes
TasksAccounting=yes
"
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(name: &str) -> String {
        let files = files(Path::new("/opt/msb"));
        files.into_iter().find(|(path, _)| path == name).unwrap_or_else(|| panic!("{name}")).1
    }

    #[test]
    fn each_manager_has_the_same_units() {
        for name in ["msbd.socket", "msbd.service", "msb-flush.service", "msb.slice"] {
            for folder in ["user", "system"] {
                assert!(unit(&format!("lib/systemd/{folder}/{name}")).starts_with("[Unit]\n"));
            }
        }
    }

    #[test]
    fn a_service_is_watched_and_its_end_is_nobody_elses() {
        for folder in ["user", "system"] {
            let text = unit(&format!("lib/systemd/{folder}/msbd.service"));
            for line in ["Type=notify", "WatchdogSec=60s", "Delegate=yes", "KillMode=process"] {
                assert!(text.lines().any(|found| found == line), "{folder}: {line}");
            }
            assert!(text.contains("ExecStart=/opt/msb/bin/msbd"));
        }
        assert!(unit("lib/systemd/system/msbd.service").contains("bin/msbd --host\n"));
    }

    #[test]
    fn the_hosts_socket_is_for_its_group_and_a_users_for_the_user() {
        assert!(unit("lib/systemd/system/msbd.socket").contains("SocketMode=0660\nSocketGroup=msb\n"));
        assert!(unit("lib/systemd/user/msbd.socket").contains("SocketMode=0600\n"));
    }
}
