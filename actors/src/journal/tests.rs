//! What the journal promises: durable, in order, bounded, and alive after damage.

use std::sync::Arc;

use jiff::Timestamp;
use msb_protocol::id::{SandboxId, SandboxName};
use msb_protocol::spec::SandboxSpec;
use msb_protocol::state::SandboxState;

use super::*;
use crate::clock::SystemClock;
use crate::sandbox::machine::{State, Stored};

fn record(name: &str) -> SandboxRecord {
    SandboxRecord {
        id: SandboxId::generate(),
        name: SandboxName::parse(name).unwrap(),
        spec: SandboxSpec::new("busybox"),
        labels: Default::default(),
        image_digest: "sha256:0".into(),
        command: Vec::new(),
        created_at: Timestamp::UNIX_EPOCH,
        started_at: None,
        machine: Stored {
            state: State::Stopped,
            restarts: 0,
            failures: 0,
            detached: true,
            removing: false,
            ever_spawned: true,
        },
        vmm: None,
        creator: None,
        last_end: None,
        boot_error: None,
        engine: None,
        engine_reason: None,
        boot_phases: Vec::new(),
        jail: Default::default(),
        ports: Vec::new(),
        snapshot: None,
    }
}

fn draft(record: &SandboxRecord, event: &str) -> EventDraft {
    EventDraft {
        sandbox: record.name.clone(),
        sandbox_id: record.id,
        boot_id: None,
        event: event.into(),
        state: SandboxState::Stopped,
        cause: None,
        actor: "user".into(),
        message: String::new(),
    }
}

fn open(path: &Path) -> (Journal, Found) {
    open_with(path, MIGRATIONS).unwrap()
}

/// Opens, waiting for the thread of an earlier handle to let go of the file.
fn open_with(path: &Path, migrations: &'static [Migration]) -> Result<(Journal, Found), JournalError> {
    for _ in 0..200 {
        match Journal::open_with(path, Arc::new(SystemClock::default()), migrations) {
            Err(JournalError::Open { reason, .. }) if reason.contains("already open") => {
                std::thread::sleep(std::time::Duration::from_millis(5))
            }
            other => return other,
        }
    }
    panic!("the journal stays open");
}

#[tokio::test]
async fn what_was_answered_is_there_after_a_restart_and_numbers_go_on() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("state/msb.redb");
    let (journal, found) = open(&path);
    assert!(found.records.is_empty() && found.problems.is_empty());
    let (kept, removed) = (record("kept"), record("removed"));
    for record in [&kept, &removed] {
        journal.write(Change::Put(Box::new(record.clone()), Some(draft(record, "created")))).await.unwrap();
    }
    journal.write(Change::Remove(removed.id, draft(&removed, "removed"))).await.unwrap();
    assert_eq!(journal.load(kept.id).await, Some(kept.clone()));
    assert_eq!(journal.load(removed.id).await, None);
    drop(journal);

    let (journal, found) = open(&path);
    assert_eq!(found.records.as_slice(), std::slice::from_ref(&kept));
    let mut live = journal.live_events();
    journal.write(Change::Event(draft(&kept, "state"))).await.unwrap();
    assert_eq!(live.recv().await.unwrap().sequence, 4);
    let events = journal.events_after(1, 100).await;
    assert_eq!(
        events.iter().map(|event| (event.sequence, event.event.as_str())).collect::<Vec<_>>(),
        [(2, "created"), (3, "removed"), (4, "state")]
    );
    assert_eq!(journal.events_after(1, 1).await.len(), 1);
}

#[tokio::test]
async fn a_damaged_record_goes_into_quarantine_and_the_rest_lives() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("msb.redb");
    let (journal, _) = open(&path);
    let (good, bad) = (record("good"), record("bad"));
    for record in [&good, &bad] {
        journal.write(Change::Put(Box::new(record.clone()), None)).await.unwrap();
    }
    drop(journal);
    drop(open(&path));
    std::thread::sleep(std::time::Duration::from_millis(50));
    writer::damage(&path, bad.id);
    let (journal, found) = open(&path);
    assert_eq!(found.records, [good]);
    assert!(found.problems.len() == 1 && found.problems[0].contains(&bad.id.to_string()), "{:?}", found.problems);
    drop(journal);
    assert!(open(&path).1.problems.is_empty(), "told once");
}

#[tokio::test]
async fn a_file_that_is_no_journal_is_put_aside_and_not_lost() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("msb.redb");
    std::fs::write(&path, vec![7u8; 8192]).unwrap();
    let (_journal, found) = open(&path);
    assert!(found.problems[0].contains("damaged"), "{:?}", found.problems);
    let kept = std::fs::read_dir(home.path())
        .unwrap()
        .filter_map(Result::ok)
        .find(|entry| entry.file_name().to_string_lossy().contains("damaged-"));
    assert_eq!(std::fs::read(kept.unwrap().path()).unwrap(), vec![7u8; 8192]);
}

#[tokio::test]
async fn an_older_schema_is_migrated_with_a_backup_and_a_newer_one_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("msb.redb");
    let (journal, _) = open(&path);
    let kept = record("kept");
    journal.write(Change::Put(Box::new(kept.clone()), None)).await.unwrap();
    drop(journal);
    const TO_TWO: &[Migration] = &[|_| Ok(())];
    let (journal, found) = open_with(&path, TO_TWO).unwrap();
    assert_eq!(found.records, [kept]);
    assert!(found.problems[0].contains("schema 1 to 2"));
    assert!(home.path().join("msb.schema-1.bak").exists());
    drop(journal);
    assert!(matches!(open_with(&path, MIGRATIONS), Err(JournalError::TooNew { found: 2, known: 1, .. })));
}

#[tokio::test]
async fn the_ring_of_events_is_bounded() {
    let home = tempfile::tempdir().unwrap();
    let (journal, _) = open(&home.path().join("msb.redb"));
    let one = record("one");
    let writes = (0..EVENTS_MAX + 50).map(|_| journal.write(Change::Event(draft(&one, "state"))));
    for outcome in futures_util::future::join_all(writes).await {
        outcome.unwrap();
    }
    let events = journal.events_after(0, usize::MAX).await;
    assert_eq!((events.len() as u64, events[0].sequence), (EVENTS_MAX, 51));
}

/// Needs root for a file system that can be full; without it there is none to fill.
#[tokio::test]
async fn a_full_disk_is_told_and_the_journal_goes_on_when_there_is_room_again() {
    let mount = tempfile::tempdir().unwrap();
    let mounted = rustix::process::geteuid().is_root()
        && nix::mount::mount(Some("none"), mount.path(), Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=4m"))
            .is_ok();
    if !mounted {
        #[expect(clippy::print_stderr, reason = "a skipped test says so in words")]
        {
            eprintln!("skipped: mounting a small tmpfs needs root");
        }
        return;
    }
    let path = mount.path().join("msb.redb");
    let (journal, _) = open(&path);
    let one = record("one");
    journal.write(Change::Put(Box::new(one.clone()), None)).await.unwrap();
    let ballast = mount.path().join("ballast");
    let filled = std::fs::write(&ballast, vec![1u8; 8 << 20]);
    assert!(filled.is_err(), "the file system takes more than it has");
    let mut failure = None;
    for number in 0..2_000 {
        let mut more = record(&format!("more-{number}"));
        more.spec.env.insert("A".into(), "x".repeat(10_000));
        if let Err(error) = journal.write(Change::Put(Box::new(more), None)).await {
            failure = Some(error);
            break;
        }
    }
    assert_eq!(failure.expect("a full disk fails a write").code, ErrorCode::DiskFull);
    std::fs::remove_file(&ballast).unwrap();
    journal.write(Change::Put(Box::new(record("after")), None)).await.unwrap();
    assert_eq!(journal.load(one.id).await, Some(one));
    drop(journal);
    std::thread::sleep(std::time::Duration::from_millis(100));
    nix::mount::umount2(mount.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
}
