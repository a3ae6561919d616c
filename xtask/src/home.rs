//! A temporary home in which the demo and the benchmarks run the installed programs, and the end of everything that worked in it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;

use crate::cache;

/// A home and runtime folder of its own; dropping it ends its service and removes it.
pub(crate) struct Home {
    folder: PathBuf,
    runtime: tempfile::TempDir,
    commands: PathBuf,
}

impl Home {
    /// An empty home under cargo's target folder (on a real disk), for the programs of this install tree.
    pub(crate) fn new(name: &str, tree: &Path) -> Result<Self> {
        let folder = cache::target().join(name);
        if folder.exists() {
            end_programs_of(&folder);
            std::fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        std::fs::create_dir_all(cache::target())?;
        std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&folder)?;
        // Socket paths end at 107 bytes, so the sockets live under /tmp.
        let runtime = tempfile::Builder::new().prefix("msb-x-").tempdir_in("/tmp")?;
        Ok(Self { folder, runtime, commands: tree.join("bin") })
    }

    /// `MSB_HOME`.
    pub(crate) fn path(&self) -> &Path {
        &self.folder
    }

    /// The socket of its service, which has been started.
    pub(crate) fn socket(&self) -> Result<PathBuf> {
        let below =
            std::fs::read_dir(self.runtime.path().join("msb"))?.flatten().map(|entry| entry.path().join("msbd.sock"));
        below.into_iter().find(|socket| socket.exists()).context("no service has a socket here")
    }

    /// A program or shell line in this home's environment.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let path = format!("{}:{}", self.commands.display(), std::env::var("PATH").unwrap_or_default());
        command
            .stdin(Stdio::null())
            .env("PATH", path)
            .env("MSB_HOME", &self.folder)
            .env("XDG_RUNTIME_DIR", self.runtime.path());
        command
    }

    /// `msb` with these words.
    pub(crate) fn msb(&self, words: &[&str]) -> Command {
        let mut command = self.command(&self.commands.join("msb").to_string_lossy());
        command.args(words);
        command
    }

    /// The ids of this home's processes that run this program.
    pub(crate) fn running(&self, program: &str) -> Vec<i32> {
        processes_of(&self.folder)
            .into_iter()
            .filter(|pid| {
                std::fs::read_link(format!("/proc/{pid}/exe"))
                    .is_ok_and(|path| path.file_name().is_some_and(|name| name == program))
            })
            .collect()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        end_programs_of(&self.folder);
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// The processes that work in this home, known by the home in their environment, their arguments or their open files; never by a name
/// that others share.
fn processes_of(home: &Path) -> Vec<i32> {
    let needle = home.as_os_str().as_encoded_bytes();
    let works_there = |entry: &Path| {
        let mentions = |file: &str| {
            std::fs::read(entry.join(file))
                .is_ok_and(|bytes| bytes.windows(needle.len()).any(|window| window == needle))
        };
        let opened = || {
            std::fs::read_dir(entry.join("fd")).is_ok_and(|files| {
                files.flatten().any(|file| std::fs::read_link(file.path()).is_ok_and(|link| link.starts_with(home)))
            })
        };
        mentions("environ") || mentions("cmdline") || opened()
    };
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse::<i32>().ok()?, entry.path())))
        .filter(|(pid, entry)| u32::try_from(*pid).is_ok_and(|pid| pid != std::process::id()) && works_there(entry))
        .map(|(pid, _)| pid)
        .collect()
}

/// Asks them to end, and after ten seconds no longer asks.
fn end_programs_of(home: &Path) {
    for signal in [Signal::TERM, Signal::KILL] {
        for _ in 0..50 {
            let found = processes_of(home);
            if found.is_empty() {
                return;
            }
            for pid in found.into_iter().filter_map(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, signal);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}
