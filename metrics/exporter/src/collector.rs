//! Collects at an interval: asks the daemon, makes points, hands them on. One missing daemon is a debug line, not an error: the
//! exporter may start before it and outlive it. It never starts one and creates no file.
//!
//! Connecting to a socket that systemd holds would start the daemon. So where systemd runs, the lock of the home is looked at first,
//! in `/proc/locks`: only a daemon that runs holds it, and looking takes nothing.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use msb_protocol::control::MetricsSnapshot;
use msb_sdk::Client;
use tokio::time::MissedTickBehavior;

use crate::args::CollectArgs;
use crate::collect::{AttributeChoice, Memory, collect};
use crate::point::Collection;

/// Longest time a daemon may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Where systemd tells that it runs (sd_booted(3)).
const SYSTEMD: &str = "/run/systemd/system";

/// The service to read.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    /// Its control socket.
    pub socket: PathBuf,
    /// The lock that a running daemon of this home holds; none if the socket was named by itself.
    pub lock: Option<PathBuf>,
}

impl Source {
    /// Whether to connect: always where nobody activates sockets, else only to a daemon that runs already.
    fn may_be_asked(&self) -> bool {
        let Some(lock) = self.lock.as_ref().filter(|_| Path::new(SYSTEMD).is_dir()) else { return true };
        let Ok(file) = std::fs::metadata(lock) else { return false };
        std::fs::read_to_string("/proc/locks").is_ok_and(|locks| is_locked(&locks, file.ino()))
    }
}

/// Whether somebody holds an exclusive flock(2) on the file of this number. The device is not compared: `/proc/locks` names the one
/// of the superblock, which some file systems do not tell in stat(2). A stranger's lock on the same number means one connection more.
fn is_locked(locks: &str, inode: u64) -> bool {
    locks.lines().any(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        // `1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF`; a waiting one has `->` in it.
        matches!(words.as_slice(), [_, "FLOCK", _, "WRITE", _, file, ..]
            if file.rsplit(':').next().and_then(|number| number.parse().ok()) == Some(inode))
    })
}

/// Collects until the process ends; `take` gets each collection, or none when no daemon answered, and must not block.
pub(crate) async fn run(source: Source, args: &CollectArgs, mut take: impl FnMut(Option<Collection>)) {
    let choice = AttributeChoice {
        no_labels: args.no_labels,
        include_keys: args.include_label_key.clone(),
        exclude_keys: args.exclude_label_key.clone(),
        run_id: args.emit_run_id,
        pid: args.emit_pid,
        values_per_key_max: args.max_label_values,
    };
    let mut memory = Memory::default();
    let mut ticks = tokio::time::interval(args.collect_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let (mut client, mut was_there) = (None, None);
    loop {
        ticks.tick().await;
        let asked = if client.is_some() || source.may_be_asked() {
            ask(&source.socket, &mut client).await
        } else {
            Err(anyhow::anyhow!("no daemon runs"))
        };
        let there = match asked {
            Ok(snapshot) => {
                take(Some(collect(&snapshot, &choice, &mut memory)));
                true
            }
            Err(error) => {
                tracing::debug!(%error, "no answer from msbd");
                client = None;
                take(None);
                false
            }
        };
        if was_there != Some(there) {
            was_there = Some(there);
            if there {
                tracing::info!(socket = %source.socket.display(), "reading from msbd");
            } else {
                tracing::info!(socket = %source.socket.display(), "no msbd answers; waiting for one");
            }
        }
    }
}

/// Asks over the connection of the time before, or a new one. Connecting never starts a daemon.
async fn ask(socket: &Path, client: &mut Option<Client>) -> anyhow::Result<MetricsSnapshot> {
    let ask = async {
        let connected = match client.take() {
            Some(connected) => connected,
            None => Client::at(socket).await?,
        };
        Ok(client.insert(connected).metrics().await?)
    };
    tokio::time::timeout(ANSWER_TIMEOUT, ask).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_of_a_running_daemon_is_found_by_its_file() {
        let locks = "1: POSIX  ADVISORY  WRITE 10 08:01:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 11 08:01:78 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 12 08:01:79 0 EOF\n\
                     3: FLOCK  ADVISORY  READ 13 08:01:80 0 EOF\n";
        assert_eq!([77, 78, 79, 80, 8].map(|inode| is_locked(locks, inode)), [false, true, false, false, false]);
        let file = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
        let held = || is_locked(&std::fs::read_to_string("/proc/locks").unwrap(), file.metadata().unwrap().ino());
        assert!(!held());
        file.lock().unwrap();
        assert!(held());
    }
}
