//! Beats of the agent: when their absence means death (pure), and the file that shows them to people and watchdogs.
//!
//! The schema of the file is in `docs/lifecycle.md`. One thread writes the files of all sandboxes, so that a slow or full disk
//! holds up no actor; a beat it has no room for is left out. Nothing ever reads the file back to decide something.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use jiff::Timestamp;
use msb_protocol::guest::{BEAT_INTERVAL_MS, Beat};
use msb_protocol::id::BootId;
use msb_protocol::spec::EngineChoice;
use rustix::fs::{CWD, RenameFlags};
use serde::Serialize;

/// Beats that may be missed in a row on hardware.
pub const MISSED_MAX: u64 = 3;
/// Beats that may be missed in a row under software emulation, where a busy host slows the guest's own clock.
pub const MISSED_MAX_EMULATED: u64 = 10;
/// How many more times a machine that was adopted may miss that many before its first beat.
const ADOPTION_LIMITS: u64 = 4;
/// How late a timer of ours may be before the silence is held to be the host's and not the guest's.
const STALL_MS: u64 = 500;
/// Size of a heartbeat file: longer than any, so that a shorter one leaves nothing of a longer one behind.
const FILE_LEN: usize = 512;
/// Beats that wait for the thread.
const QUEUE_LEN: usize = 1_024;

/// Watches the beats of one boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BeatWatch {
    boot_id: BootId,
    limit_ms: u64,
    heard_ms: u64,
    due_ms: u64,
    sequence: u64,
}

/// What a look at the watch says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Alive; look again then.
    LookAgain(u64),
    /// Silent for too long.
    Silent,
}

impl BeatWatch {
    /// A watch that begins when the agent is ready.
    #[must_use]
    pub fn new(boot_id: BootId, engine: EngineChoice, now_ms: u64) -> Self {
        let missed = if engine == EngineChoice::Kvm { MISSED_MAX } else { MISSED_MAX_EMULATED };
        let limit_ms = (missed + 1) * BEAT_INTERVAL_MS;
        Self { boot_id, limit_ms, heard_ms: now_ms, due_ms: now_ms.saturating_add(limit_ms), sequence: 0 }
    }

    /// The same for a machine that was found by a new daemon: the agent's link has to be made anew, for every machine at once, on a host that
    /// is just starting services. Until the first beat it has several times as long.
    #[must_use]
    pub fn adopted(self) -> Self {
        Self { due_ms: self.due_ms.saturating_add(self.limit_ms * ADOPTION_LIMITS), ..self }
    }

    /// When it is to be looked at.
    #[must_use]
    pub fn due_ms(&self) -> u64 {
        self.due_ms
    }

    /// A beat came. False if it is of another boot or older than one already heard, and counts for nothing.
    pub fn hear(&mut self, boot_id: BootId, sequence: u64, now_ms: u64) -> bool {
        if boot_id != self.boot_id || sequence <= self.sequence {
            return false;
        }
        (self.sequence, self.heard_ms, self.due_ms) = (sequence, now_ms, now_ms.saturating_add(self.limit_ms));
        true
    }

    /// The silence until now is no fault of the agent: counting begins anew.
    pub fn forgive(&mut self, now_ms: u64) {
        self.due_ms = now_ms.saturating_add(self.limit_ms);
    }

    /// Looks at the silence. Called when the watch said to; if that is late, the host stalled, and counting begins anew.
    pub fn look(&mut self, now_ms: u64) -> Verdict {
        if now_ms < self.due_ms {
            return Verdict::LookAgain(self.due_ms);
        }
        if now_ms > self.due_ms.saturating_add(STALL_MS) {
            self.due_ms = now_ms.saturating_add(self.limit_ms);
            return Verdict::LookAgain(self.due_ms);
        }
        Verdict::Silent
    }
}

/// The content of a heartbeat file.
#[derive(Debug, Serialize)]
pub struct Heartbeat {
    /// Version of this schema.
    pub version: u32,
    /// The run.
    pub boot_id: BootId,
    /// Counts the beats of the run from 1.
    pub sequence: u64,
    /// The host's time when the beat arrived.
    pub at: Timestamp,
    /// Time since the guest's kernel started in milliseconds.
    pub uptime_ms: u64,
    /// Sessions whose process lives.
    pub sessions: u32,
    /// Memory in use in the guest.
    pub memory_used_bytes: u64,
    /// Memory of the guest.
    pub memory_total_bytes: u64,
    /// Bytes used on the writable root.
    pub root_used_bytes: u64,
    /// Bytes free on the writable root.
    pub root_free_bytes: u64,
    /// Load of one minute in hundredths.
    pub load_hundredths: u32,
    /// Processes of the workload.
    pub processes: u32,
}

impl Heartbeat {
    /// The file's content for a beat.
    #[must_use]
    pub fn new(boot_id: BootId, beat: &Beat, at: Timestamp) -> Self {
        Self {
            version: 1,
            boot_id,
            sequence: beat.sequence,
            at,
            uptime_ms: beat.uptime_ms,
            sessions: beat.sessions,
            memory_used_bytes: beat.memory_used_bytes,
            memory_total_bytes: beat.memory_total_bytes,
            root_used_bytes: beat.root_used_bytes,
            root_free_bytes: beat.root_free_bytes,
            load_hundredths: beat.load_hundredths,
            processes: beat.processes,
        }
    }
}

/// Writes heartbeat files.
#[derive(Clone, Debug)]
pub struct HeartbeatWriter {
    queue: SyncSender<(PathBuf, Option<Heartbeat>)>,
}

impl HeartbeatWriter {
    /// Starts the thread; it ends with the last clone.
    ///
    /// # Errors
    /// The host has no thread to give.
    pub fn start() -> std::io::Result<Self> {
        let (queue, waiting) = sync_channel(QUEUE_LEN);
        std::thread::Builder::new().name("heartbeats".into()).spawn(move || write_all(&waiting))?;
        Ok(Self { queue })
    }

    /// Writes soon, or not at all if the disk is far behind.
    pub fn write(&self, path: PathBuf, heartbeat: Heartbeat) {
        if self.queue.try_send((path, Some(heartbeat))).is_err() {
            tracing::trace!("a heartbeat file was left out");
        }
    }

    /// Removes a file after everything that was written before: the run is over, and no late beat may outlive it.
    pub fn clear(&self, path: PathBuf) {
        if self.queue.try_send((path, None)).is_err() {
            tracing::trace!("a heartbeat file stays until the next boot");
        }
    }
}

fn write_all(waiting: &Receiver<(PathBuf, Option<Heartbeat>)>) {
    let mut failing = false;
    for (path, heartbeat) in waiting {
        let done = match heartbeat {
            Some(heartbeat) => write_one(&path, &heartbeat),
            None => remove(&path).and(remove(&temporary(&path))),
        };
        match done {
            Ok(()) => failing = false,
            // Once for each time it begins: a full disk would say it every second.
            Err(error) if !failing => {
                failing = true;
                tracing::warn!(path = %path.display(), %error, "a heartbeat file could not be written");
            }
            Err(_) => {}
        }
    }
}

fn temporary(path: &Path) -> PathBuf {
    path.with_extension("json.tmp")
}

fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The two files take turns: what is written is never what is read, and neither is made, filled or given back each second. With a new file
/// and a rename over the old one ext4 finds blocks and begins to write at once, which took eight times the processor time.
fn write_one(path: &Path, heartbeat: &Heartbeat) -> std::io::Result<()> {
    let temporary = temporary(path);
    let mut text = serde_json::to_vec(heartbeat)?;
    text.resize(text.len().max(FILE_LEN - 1), b' ');
    text.push(b'\n');
    // A directory that is gone belongs to a sandbox that was just removed.
    let mut file = match std::fs::File::options().create(true).truncate(false).write(true).open(&temporary) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    file.write_all(&text)?;
    match rustix::fs::renameat_with(CWD, &temporary, CWD, path, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(()),
        // The first beat of a run, or a file system that cannot exchange.
        Err(_) => std::fs::rename(&temporary, path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(number: u128) -> BootId {
        BootId(uuid::Uuid::from_u128(number))
    }

    #[test]
    fn three_missed_beats_are_death_and_one_less_is_not() {
        let mut watch = BeatWatch::new(boot(1), EngineChoice::Kvm, 0);
        assert!(watch.hear(boot(1), 1, 1_000));
        assert_eq!(watch.look(4_999), Verdict::LookAgain(5_000));
        assert_eq!(watch.look(5_000), Verdict::Silent);
        let mut emulated = BeatWatch::new(boot(1), EngineChoice::Qemu, 0);
        assert_eq!(emulated.look(5_000), Verdict::LookAgain(11_000));
        assert_eq!(emulated.look(11_000), Verdict::Silent);
    }

    #[test]
    fn an_adopted_machine_has_time_for_its_first_beat_and_no_more_than_others_afterwards() {
        let mut watch = BeatWatch::new(boot(1), EngineChoice::Kvm, 0).adopted();
        assert_eq!(watch.look(5_000), Verdict::LookAgain(20_000));
        assert_eq!(watch.look(20_000), Verdict::Silent);
        assert!(watch.hear(boot(1), 1, 6_000));
        assert_eq!(watch.look(10_000), Verdict::Silent);
    }

    #[test]
    fn beats_of_another_boot_and_old_beats_count_for_nothing() {
        let mut watch = BeatWatch::new(boot(2), EngineChoice::Kvm, 0);
        assert!(!watch.hear(boot(1), 900, 1_000));
        assert!(watch.hear(boot(2), 2, 1_000));
        assert!(!watch.hear(boot(2), 2, 3_000));
        assert!(!watch.hear(boot(2), 1, 3_000));
        assert_eq!(watch.look(5_000), Verdict::Silent);
    }

    #[test]
    fn a_stalled_or_sleeping_host_begins_anew() {
        let mut watch = BeatWatch::new(boot(1), EngineChoice::Kvm, 0);
        assert_eq!(watch.look(4_000 + STALL_MS + 1), Verdict::LookAgain(8_501));
        assert_eq!(watch.look(8_501), Verdict::Silent);
    }

    #[test]
    fn the_file_is_replaced_as_a_whole_and_a_removed_directory_is_no_failure() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("heartbeat.json");
        // The longest there is comes first, and nothing of it is left in what follows.
        for sequence in [u64::MAX, 1, 2, 3] {
            let short = if sequence == u64::MAX { u32::MAX } else { 0 };
            let long = if sequence == u64::MAX { u64::MAX } else { 0 };
            let beat = Beat {
                sequence,
                uptime_ms: long,
                sessions: short,
                memory_used_bytes: long,
                memory_total_bytes: long,
                root_used_bytes: long,
                root_free_bytes: long,
                load_hundredths: short,
                processes: short,
            };
            write_one(&path, &Heartbeat::new(boot(7), &beat, Timestamp::MAX)).unwrap();
            let text = std::fs::read(&path).unwrap();
            let read: serde_json::Value = serde_json::from_slice(&text).unwrap();
            assert_eq!((read["version"].as_u64(), read["sequence"].as_u64()), (Some(1), Some(sequence)));
            assert_eq!(text.len(), FILE_LEN, "the longest has room");
        }
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 2);
        write_one(
            &home.path().join("gone/heartbeat.json"),
            &Heartbeat::new(boot(7), &Beat::default(), Timestamp::UNIX_EPOCH),
        )
        .unwrap();
    }
}
