//! PID 1: mounts what the agent needs, forks the agent before any thread exists, and then only reaps. The agent's death ends the
//! virtual machine with a line on the console that nothing else prints. It reads no configuration and talks to nobody.
//!
//! ```text
//!  kernel ──► init ── mounts ── fork+exec ──► agent ──► sessions
//!               └── waits for every child for ever; orphans of sessions come here.
//!                   the agent's end: one line, sync, reset
//! ```
//!
//! It is a process of its own because its wait for *any* child would steal the ends of processes the agent waits for by name.

use std::ffi::CStr;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::process::{WaitOptions, WaitStatus, wait};

use crate::{agent, cgroup};

/// The argument that makes this program the agent.
pub const AGENT_ARGUMENT: &str = "agent";
/// The variable that tells the agent when init began, in microseconds since the kernel's start.
pub const UPTIME_VARIABLE: &str = "MSB_INIT_UPTIME_US";
/// What the line on the console begins with when the agent dies; the host looks for it.
pub const AGENT_DIED: &str = "msb-init: the agent died";

const MOUNTS: [(&str, &str, Option<&CStr>); 4] = [
    ("/proc", "proc", None),
    ("/sys", "sysfs", None),
    ("/dev", "devtmpfs", Some(c"mode=0755")),
    (cgroup::MOUNT, "cgroup2", Some(c"nsdelegate")),
];

/// Is PID 1 until the machine is reset.
pub fn run() -> ExitCode {
    let uptime_us = agent::clock::uptime_us();
    for (target, kind, data) in MOUNTS {
        // The kernel may have mounted /dev itself; what is really missing fails in the agent with a better place to say it.
        let _ = std::fs::create_dir_all(target);
        if let Err(errno) = mount(kind, target, kind, MountFlags::NOSUID, data)
            && errno != Errno::BUSY
        {
            say(&format!("msb-init: cannot mount {target}: {errno}"));
        }
    }
    // Both are exempt from the OOM killer: the child inherits it.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let hierarchy = Path::new(cgroup::MOUNT);
    if let Err(error) = cgroup::enter(&hierarchy.join("agent")).and_then(|()| cgroup::delegate_controllers(hierarchy)) {
        say(&format!("msb-init: cannot set up cgroups: {error}"));
    }
    let agent = std::process::Command::new("/proc/self/exe")
        .arg(AGENT_ARGUMENT)
        .env_clear()
        .env(UPTIME_VARIABLE, uptime_us.to_string())
        .current_dir("/")
        .spawn();
    match agent {
        Ok(agent) => reap_until(agent.id()),
        Err(error) => say(&format!("{AGENT_DIED}: it could not be started: {error}")),
    }
    rustix::fs::sync();
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
    // Only a kernel that cannot reset comes here; the end of PID 1 is a panic, which ends the machine too.
    ExitCode::FAILURE
}

fn reap_until(agent: u32) {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if u32::try_from(pid.as_raw_nonzero().get()) == Ok(agent) => {
                say(&format!("{AGENT_DIED}: {}", describe(status)));
                return;
            }
            Err(Errno::CHILD) => {
                say(&format!("{AGENT_DIED}: nobody is left"));
                return;
            }
            Ok(_) | Err(_) => {}
        }
    }
}

fn describe(status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown".into(),
    }
}

/// One line on the console, which is evidence for whoever reads a failed boot.
pub fn say(line: &str) {
    let mut text = String::from("\n");
    text.push_str(line);
    text.push('\n');
    // Without a console nobody could be told.
    let _ = std::io::stderr().write_all(text.as_bytes());
}
