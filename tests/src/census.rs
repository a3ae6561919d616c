//! Which processes belong to a home. They are known by the home in their environment, their arguments or their open files, as an
//! administrator would find them; never by a name that other tests' processes share.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long the kernel may take to put a killed process away.
const DEATH_PATIENCE: Duration = Duration::from_secs(30);

/// A process of the product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// The file name of its program.
    pub program: String,
    /// Its arguments, for messages.
    pub arguments: String,
}

impl Process {
    /// Sends a signal; a process that is already gone is fine. One that is killed is gone afterwards: until the kernel has put it away
    /// its socket still takes connections.
    pub fn signal(&self, signal: rustix::process::Signal) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.pid) {
            let _ = rustix::process::kill_process(pid, signal);
        }
        let until = Instant::now() + DEATH_PATIENCE;
        while signal == rustix::process::Signal::KILL && self.is_alive() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether it still runs; a zombie does not. Each thread is looked at: the first one is often a zombie while another still holds
    /// the process's files, a listening socket among them.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", self.pid)) else { return false };
        threads.flatten().any(|thread| {
            let text = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            let state = text.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
            state.is_some_and(|letter| letter != 'Z' && letter != 'X')
        })
    }

    /// Bytes of memory that are this process's alone (`Private_Dirty` of `smaps_rollup`).
    #[must_use]
    pub fn private_memory_bytes(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid)).unwrap_or_default();
        let kibibytes = |name: &str| -> u64 {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.trim().parse().ok())
                .unwrap_or_default()
        };
        // Clean pages are the program's file: they turn private when the last other process of the same program ends, and cost nothing.
        kibibytes("Private_Dirty:") << 10
    }
}

/// Every living process that works in one of these folders, this one excepted.
pub(crate) fn processes_of(folders: &[&Path]) -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let process = Process { pid, program: program(&entry.path()), arguments: arguments(&entry.path()) };
            let own = u32::try_from(pid).is_ok_and(|pid| pid == std::process::id());
            (!own && process.is_alive() && folders.iter().any(|folder| works_in(&entry.path(), folder)))
                .then_some(process)
        })
        .collect()
}

fn program(entry: &Path) -> String {
    // A replaced binary reads "… (deleted)".
    let path = std::fs::read_link(entry.join("exe")).unwrap_or_default();
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.trim_end_matches(" (deleted)").to_owned()
}

fn arguments(entry: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(entry.join("cmdline")).unwrap_or_default()).replace('\0', " ")
}

fn works_in(entry: &Path, folder: &Path) -> bool {
    let needle = folder.as_os_str().as_bytes();
    let mentions = |file: &str| {
        std::fs::read(entry.join(file)).is_ok_and(|bytes| bytes.windows(needle.len()).any(|window| window == needle))
    };
    let opened = || -> bool {
        let Ok(files) = std::fs::read_dir(entry.join("fd")) else { return false };
        let links = files.flatten().filter_map(|file| std::fs::read_link(file.path()).ok());
        links.chain(std::fs::read_link(entry.join("cwd")).ok()).any(|link: PathBuf| link.starts_with(folder))
    };
    mentions("environ") || mentions("cmdline") || opened()
}
