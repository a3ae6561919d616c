//! cgroup v2 by hand: the tree of the guest, and one directory per session. Used by `init`, `agent` and `session`.
//!
//! ```text
//!  /sys/fs/cgroup ─┬─ agent              init and the agent
//!                  └─ workload           memory.max leaves the agent its reserve; root of the workload's cgroup namespace
//!                       ├─ main
//!                       └─ exec-N        one per session, kept while anything of it runs
//! ```

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Where the guest's hierarchy is mounted for the agent.
pub const MOUNT: &str = "/sys/fs/cgroup";
/// Most directories of ended sessions that are remembered for removal.
const LEFT_MAX: usize = 65_536;

/// How long a freeze may take: a process that waits for a disk is only frozen after that.
const FREEZE_LIMIT: Duration = Duration::from_secs(2);
/// Time between two looks at whether all of it is frozen.
const FREEZE_LOOK: Duration = Duration::from_micros(500);

/// The cgroup of all workloads.
#[derive(Debug)]
pub struct WorkloadGroup {
    path: PathBuf,
    namespace: OwnedFd,
    left: Mutex<Vec<PathBuf>>,
}

/// Writes one control file.
fn write(path: &Path, value: &str) -> io::Result<()> {
    fs::write(path, value)
}

/// Gives every controller of a group to its children. One that refuses (a controller in use elsewhere) does not keep the others back.
pub fn delegate_controllers(group: &Path) -> io::Result<()> {
    let controllers = fs::read_to_string(group.join("cgroup.controllers"))?;
    let mut outcome = Ok(());
    for controller in controllers.split_whitespace() {
        if let Err(error) = write(&group.join("cgroup.subtree_control"), &format!("+{controller}")) {
            outcome = Err(error);
        }
    }
    outcome
}

/// Moves the calling process into a group, which is made if it does not exist.
pub fn enter(group: &Path) -> io::Result<()> {
    match fs::create_dir(group) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    write(&group.join("cgroup.procs"), "0")
}

impl WorkloadGroup {
    /// Makes the workload's group with its namespace. `inside` runs while the calling thread is in the new namespace, so that
    /// what it mounts shows the workload's group as the root. Call it before the process has threads.
    ///
    /// # Errors
    /// As the file and namespace calls.
    pub fn create(mount: &Path, memory_max_bytes: u64, inside: impl FnOnce() -> io::Result<()>) -> io::Result<Self> {
        use nix::sched::{CloneFlags, setns, unshare};
        let path = mount.join("workload");
        let own_namespace = fs::File::open("/proc/self/ns/cgroup")?;
        enter(&path)?;
        unshare(CloneFlags::CLONE_NEWCGROUP)?;
        let outcome =
            fs::File::open("/proc/self/ns/cgroup").and_then(|namespace| inside().map(|()| OwnedFd::from(namespace)));
        setns(&own_namespace, CloneFlags::CLONE_NEWCGROUP)?;
        enter(&mount.join("agent"))?;
        let namespace = outcome?;
        // A group that hands out controllers may not hold processes itself, so this comes after the move back.
        let delegated = delegate_controllers(&path);
        if memory_max_bytes > 0 {
            write(&path.join("memory.max"), &memory_max_bytes.to_string())?;
        }
        delegated?;
        Ok(Self { path, namespace, left: Mutex::new(Vec::new()) })
    }

    /// The namespace that workloads enter.
    pub fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// Makes the group of one session.
    ///
    /// # Errors
    /// As mkdir(2) and open(2).
    pub fn session(&self, name: &str) -> io::Result<SessionGroup> {
        let path = self.path.join(name);
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let directory = OwnedFd::from(fs::File::open(&path)?);
        let oom_kills_before = oom_kills(&path);
        Ok(SessionGroup { path, directory, oom_kills_before })
    }

    /// Kills everything a workload started.
    ///
    /// # Errors
    /// As write(2).
    pub fn kill(&self) -> io::Result<()> {
        write(&self.path.join("cgroup.kill"), "1")
    }

    /// Freezes everything in it, or lets it go on. A freeze is over when nothing of it runs.
    ///
    /// # Errors
    /// As write(2), or `TimedOut` for a process that the kernel does not stop; it is let go on then.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        write(&self.path.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
        if !frozen {
            return Ok(());
        }
        let until = Instant::now() + FREEZE_LIMIT;
        while !fs::read_to_string(self.path.join("cgroup.events")).is_ok_and(|text| event(&text, "frozen") != 0) {
            if Instant::now() >= until {
                let _ = write(&self.path.join("cgroup.freeze"), "0");
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(FREEZE_LOOK);
        }
        Ok(())
    }

    /// Whether anything runs.
    pub fn is_populated(&self) -> bool {
        is_populated(&self.path)
    }

    /// Number of processes, threads not counted.
    pub fn processes(&self) -> u32 {
        // pids.current counts threads too, but costs one read however large the tree is.
        fs::read_to_string(self.path.join("pids.current")).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    /// Removes the group of an ended session, or remembers it until nothing of it runs any more.
    pub fn discard(&self, group: SessionGroup) {
        if fs::remove_dir(&group.path).is_err()
            && let Ok(mut left) = self.left.lock()
            && left.len() < LEFT_MAX
        {
            left.push(group.path);
        }
    }

    /// Removes what [`Self::discard`] could not, as far as it is empty by now.
    pub fn sweep(&self) {
        if let Ok(mut left) = self.left.lock() {
            left.retain(|path| is_populated(path) || fs::remove_dir(path).is_err());
        }
    }
}

/// The cgroup of one session.
#[derive(Debug)]
pub struct SessionGroup {
    path: PathBuf,
    directory: OwnedFd,
    oom_kills_before: u64,
}

impl SessionGroup {
    /// The directory, for clone3.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Kills everything in it.
    ///
    /// # Errors
    /// As write(2).
    pub fn kill(&self) -> io::Result<()> {
        write(&self.path.join("cgroup.kill"), "1")
    }

    /// Whether the kernel killed something in it for want of memory.
    pub fn was_oom_killed(&self) -> bool {
        oom_kills(&self.path) > self.oom_kills_before
    }
}

fn oom_kills(group: &Path) -> u64 {
    fs::read_to_string(group.join("memory.events")).map_or(0, |text| event(&text, "oom_kill"))
}

fn is_populated(group: &Path) -> bool {
    fs::read_to_string(group.join("cgroup.events")).is_ok_and(|text| event(&text, "populated") != 0)
}

/// The value of one key of a flat keyed file; 0 if it is not there.
fn event(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::event;

    #[test]
    fn keyed_files_are_read_by_whole_key() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 1\nbroken\n";
        assert_eq!((event(text, "oom_kill"), event(text, "oom"), event(text, "kill"), event("", "oom")), (2, 3, 0, 0));
    }
}
