//! Beats of the agent: when their absence means death (pure), and the file that shows them to people and watchdogs.
//!
//! The schema of the file is in `docs/lifecycle.md`. One thread writes the files of all sandboxes, so that a slow or full disk
//! holds up no actor; a beat it has no room for is left out. Nothing ever reads the file back to decide something.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use jiff::Timestamp;
use msb_protocol::guest::{BEAT_INTERVAL_MS, Beat};
use msb_protocol::id::{BootId, SandboxId};
use msb_protocol::spec::EngineChoice;
use serde::Serialize;

/// Beats that may be missed in a row on hardware.
pub const MISSED_MAX: u64 = 3;
/// Beats that may be missed in a row under software emulation, where a busy host slows the guest's own clock.
pub const MISSED_MAX_EMULATED: u64 = 10;
/// How many more times a machine that was adopted may miss that many before its first beat.
const ADOPTION_LIMITS: u64 = 4;
/// How late a timer of ours may be before the silence is held to be the host's and not the guest's.
const STALL_MS: u64 = 500;
/// How many times more a guest has as long, on a host that has no processor for everybody.
const STARVED_LIMITS: u64 = 2;
/// Size of a heartbeat file: longer than any, so that a shorter one leaves nothing of a longer one behind.
const FILE_LEN: usize = 512;
/// Time between two rounds of writing: what a file may be behind by.
pub const PAUSE: Duration = Duration::from_millis(250);
/// How often the thread looks whether anybody could still give it something.
const LAST_CLONE_INTERVAL: Duration = Duration::from_secs(5);
/// Beats after which it is looked whether a file is still the one at its path.
const LOOK_ANEW_BEATS: u64 = 8;
/// Files that stay open; the others are opened for each beat.
const OPEN_MAX: usize = 1_024;

/// Watches the beats of one boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BeatWatch {
    boot_id: BootId,
    limit_ms: u64,
    due_ms: u64,
    /// How many times the host's want of processors has been its excuse since it was heard.
    excused: u64,
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
        Self { boot_id, limit_ms, due_ms: now_ms.saturating_add(limit_ms), excused: 0, sequence: 0 }
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
        (self.sequence, self.excused) = (sequence, 0);
        self.forgive(now_ms);
        true
    }

    /// The silence until now is no fault of the agent: counting begins anew.
    pub fn forgive(&mut self, now_ms: u64) {
        self.due_ms = now_ms.saturating_add(self.limit_ms);
    }

    /// Looks at the silence. Called when the watch said to; if that is late, the host stalled, and counting begins anew. A host that
    /// [is starved](crate::pressure) may have had no processor for the guest: killing it and booting another would take what is left.
    pub fn look(&mut self, now_ms: u64, is_starved: impl FnOnce() -> bool) -> Verdict {
        if now_ms < self.due_ms {
            return Verdict::LookAgain(self.due_ms);
        }
        if now_ms > self.due_ms.saturating_add(STALL_MS) {
            self.forgive(now_ms);
            return Verdict::LookAgain(self.due_ms);
        }
        if self.excused < STARVED_LIMITS && is_starved() {
            self.excused += 1;
            self.forgive(now_ms);
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
    /// `sequence` once more: where the two differ the file was read while it was written, and wants to be read again.
    pub sequence_again: u64,
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
            sequence_again: beat.sequence,
        }
    }
}

/// Writes heartbeat files.
#[derive(Clone, Debug)]
pub struct HeartbeatWriter {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// What is to become of the file of each sandbox.
    waiting: Mutex<BTreeMap<SandboxId, Task>>,
    filled: Condvar,
}

/// The file, and the newest beat for it, or that it is to go.
type Task = (Arc<Path>, Option<Heartbeat>);

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Task>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, id: SandboxId, path: &Arc<Path>, heartbeat: Option<Heartbeat>) {
        let mut waiting = self.waiting();
        let is_first = waiting.is_empty();
        waiting.insert(id, (Arc::clone(path), heartbeat));
        drop(waiting);
        if is_first {
            self.filled.notify_one();
        }
    }
}

impl HeartbeatWriter {
    /// Starts the thread; it ends soon after the last clone.
    ///
    /// # Errors
    /// The host has no thread to give.
    pub fn start() -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let weak = Arc::downgrade(&shared);
        std::thread::Builder::new().name("heartbeats".into()).spawn(move || write_all(&weak))?;
        Ok(Self { shared })
    }

    /// Writes within [`PAUSE`], or whenever the disk takes it; of several beats only the newest.
    pub fn write(&self, id: SandboxId, path: &Arc<Path>, heartbeat: Heartbeat) {
        self.shared.put(id, path, Some(heartbeat));
    }

    /// Removes a file after everything that was written before: the run is over, and no late beat may outlive it.
    pub fn clear(&self, id: SandboxId, path: &Arc<Path>) {
        self.shared.put(id, path, None);
    }
}

/// Writes what waits, all at once and a few times a second: to be woken for each beat would cost more than to write it.
fn write_all(weak: &Weak<Shared>) {
    let (mut files, mut failing) = (HeartbeatFiles::default(), false);
    while let Some(shared) = weak.upgrade() {
        let (mut waiting, _) = shared
            .filled
            .wait_timeout_while(shared.waiting(), LAST_CLONE_INTERVAL, |waiting| waiting.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        let batch = std::mem::take(&mut *waiting);
        drop(waiting);
        drop(shared);
        for (id, (path, heartbeat)) in batch {
            let done = match heartbeat {
                Some(heartbeat) => files.write(id, &path, &heartbeat),
                None => files.remove(id, &path),
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
        std::thread::sleep(PAUSE);
    }
}

/// The files, most of them open.
///
/// A beat is written over the one before it, in one write of always the same length. With a second file that takes its place ext4 changes
/// two directories each second, which took six times the processor time; with a new file eight times that. What a reader sees that comes
/// in the middle of a write is told by `sequence_again`.
#[derive(Debug, Default)]
struct HeartbeatFiles {
    /// By sandbox, with the run that each is of.
    open: BTreeMap<SandboxId, (BootId, File)>,
    text: Vec<u8>,
}

impl HeartbeatFiles {
    fn write(&mut self, id: SandboxId, path: &Path, heartbeat: &Heartbeat) -> std::io::Result<()> {
        self.text.clear();
        serde_json::to_writer(&mut self.text, heartbeat)?;
        self.text.resize(self.text.len().max(FILE_LEN - 1), b' ');
        self.text.push(b'\n');
        // That of another run has been removed since; one that somebody removed is made anew, a little later.
        let looks_anew = heartbeat.sequence.is_multiple_of(LOOK_ANEW_BEATS);
        if let Some((boot_id, file)) = self.open.get(&id)
            && *boot_id == heartbeat.boot_id
            && (!looks_anew || file.metadata()?.nlink() > 0)
        {
            return file.write_all_at(&self.text, 0);
        }
        self.open.remove(&id);
        let Some(file) = make(path, &self.text)? else { return Ok(()) };
        if self.open.len() < OPEN_MAX {
            self.open.insert(id, (heartbeat.boot_id, file));
        }
        Ok(())
    }

    fn remove(&mut self, id: SandboxId, path: &Path) -> std::io::Result<()> {
        self.open.remove(&id);
        for path in [path, &temporary(path)] {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A file that is there with its first beat or not at all; none in a directory that is gone: it belonged to a sandbox that was just removed.
fn make(path: &Path, text: &[u8]) -> std::io::Result<Option<File>> {
    let temporary = temporary(path);
    let file = match File::create(&temporary) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    file.write_all_at(text, 0)?;
    std::fs::rename(&temporary, path)?;
    Ok(Some(file))
}

fn temporary(path: &Path) -> PathBuf {
    path.with_extension("json.tmp")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u128) -> SandboxId {
        SandboxId(uuid::Uuid::from_u128(number))
    }

    fn boot(number: u128) -> BootId {
        BootId(uuid::Uuid::from_u128(number))
    }

    /// A host with processors enough.
    fn enough() -> bool {
        false
    }

    #[test]
    fn a_starved_host_is_an_excuse_twice_and_anew_after_each_beat() {
        let mut watch = BeatWatch::new(boot(1), EngineChoice::Kvm, 0);
        for _ in 0..2 {
            assert_eq!(watch.look(4_000, || true), Verdict::LookAgain(8_000));
            assert_eq!(watch.look(8_000, || true), Verdict::LookAgain(12_000));
            assert_eq!(watch.look(12_000, || true), Verdict::Silent);
            watch = BeatWatch { due_ms: 4_000, ..watch };
            assert!(watch.hear(boot(1), watch.sequence + 1, 0));
        }
        assert_eq!(watch.look(4_000, enough), Verdict::Silent);
    }

    #[test]
    fn three_missed_beats_are_death_and_one_less_is_not() {
        let mut watch = BeatWatch::new(boot(1), EngineChoice::Kvm, 0);
        assert!(watch.hear(boot(1), 1, 1_000));
        assert_eq!(watch.look(4_999, enough), Verdict::LookAgain(5_000));
        assert_eq!(watch.look(5_000, enough), Verdict::Silent);
        let mut emulated = BeatWatch::new(boot(1), EngineChoice::Qemu, 0);
        assert_eq!(emulated.look(5_000, enough), Verdict::LookAgain(11_000));
        assert_eq!(emulated.look(11_000, enough), Verdict::Silent);
    }

    #[test]
    fn an_adopted_machine_has_time_for_its_first_beat_and_no_more_than_others_afterwards() {
        let mut watch = BeatWatch::new(boot(1), EngineChoice::Kvm, 0).adopted();
        assert_eq!(watch.look(5_000, enough), Verdict::LookAgain(20_000));
        assert_eq!(watch.look(20_000, enough), Verdict::Silent);
        assert!(watch.hear(boot(1), 1, 6_000));
        assert_eq!(watch.look(10_000, enough), Verdict::Silent);
    }

    #[test]
    fn beats_of_another_boot_and_old_beats_count_for_nothing() {
        let mut watch = BeatWatch::new(boot(2), EngineChoice::Kvm, 0);
        assert!(!watch.hear(boot(1), 900, 1_000));
        assert!(watch.hear(boot(2), 2, 1_000));
        assert!(!watch.hear(boot(2), 2, 3_000));
        assert!(!watch.hear(boot(2), 1, 3_000));
        assert_eq!(watch.look(5_000, enough), Verdict::Silent);
    }

    #[test]
    fn a_stalled_or_sleeping_host_begins_anew() {
        let mut watch = BeatWatch::new(boot(1), EngineChoice::Kvm, 0);
        assert_eq!(watch.look(4_000 + STALL_MS + 1, enough), Verdict::LookAgain(8_501));
        assert_eq!(watch.look(8_501, enough), Verdict::Silent);
    }

    #[test]
    fn each_beat_takes_the_place_of_the_one_before_and_a_removed_directory_is_no_failure() {
        let home = tempfile::tempdir().unwrap();
        let mut files = HeartbeatFiles::default();
        let path = home.path().join("heartbeat.json");
        // The longest there is comes first, and nothing of it is left in what follows.
        for sequence in [u64::MAX, 1, 2, LOOK_ANEW_BEATS] {
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
            files.write(id(1), &path, &Heartbeat::new(boot(7), &beat, Timestamp::MAX)).unwrap();
            let text = std::fs::read(&path).unwrap();
            let read: serde_json::Value = serde_json::from_slice(&text).unwrap();
            assert_eq!((read["version"].as_u64(), read["sequence"].as_u64()), (Some(1), Some(sequence)));
            assert_eq!(read["sequence_again"], read["sequence"]);
            assert_eq!(text.len(), FILE_LEN, "the longest has room");
            assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
            if sequence == 2 {
                std::fs::remove_file(&path).unwrap();
            }
        }
        // A run that begins before the file of the one before was cleared has its own from the first beat on.
        std::fs::remove_file(&path).unwrap();
        let first = Beat { sequence: 1, ..Beat::default() };
        files.write(id(1), &path, &Heartbeat::new(boot(8), &first, Timestamp::UNIX_EPOCH)).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().contains(&boot(8).to_string()));
        files.remove(id(1), &path).unwrap();
        files.remove(id(1), &path).unwrap();
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0);
        let beat = Heartbeat::new(boot(7), &Beat::default(), Timestamp::UNIX_EPOCH);
        files.write(id(2), &home.path().join("gone/heartbeat.json"), &beat).unwrap();
    }

    #[test]
    fn the_newest_of_each_file_is_written_soon_and_nothing_outlives_its_removal() {
        let home = tempfile::tempdir().unwrap();
        let path = |name| Arc::<Path>::from(home.path().join(name));
        let (lives, ended) = (path("lives.json"), path("ended.json"));
        let beat = |sequence| Heartbeat::new(boot(7), &Beat { sequence, ..Beat::default() }, Timestamp::UNIX_EPOCH);
        let writer = HeartbeatWriter::start().unwrap();
        for sequence in 1..=100 {
            writer.write(id(1), &lives, beat(sequence));
            writer.write(id(2), &ended, beat(sequence));
        }
        writer.clear(id(2), &ended);
        let newest = || {
            let read: serde_json::Value = serde_json::from_slice(&std::fs::read(&lives).ok()?).ok()?;
            read["sequence"].as_u64()
        };
        let began = std::time::Instant::now();
        while newest() != Some(100) {
            assert!(began.elapsed() < Duration::from_secs(30), "not written");
            std::thread::sleep(Duration::from_millis(5));
        }
        writer.write(id(2), &ended, beat(101));
        writer.clear(id(2), &ended);
        writer.write(id(1), &lives, beat(102));
        while newest() != Some(102) {
            assert!(began.elapsed() < Duration::from_secs(30), "not written");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!ended.exists());
    }
}
