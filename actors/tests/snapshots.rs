//! Snapshots over fake VMs and real files: who may be snapshotted, what a chain forbids, and what a kill at each step leaves.

use std::future::Future;
use std::io::{Cursor, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix::System;
use msb_actors::daemon::Daemon;
use msb_actors::simulation::{FakeLauncher, TurnedClock, daemon};
use msb_actors::snapshots::fault::{self, Step};
use msb_protocol::control::CreateRequest;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::SandboxName;
use msb_protocol::images::{PruneRequest, PullPolicy};
use msb_protocol::mount::Patch;
use msb_protocol::snapshot::{CreateSnapshot, SnapshotDetail};
use msb_protocol::spec::{SandboxSpec, Workload};
use msb_protocol::state::SandboxState;

fn name(text: &str) -> SandboxName {
    text.parse().unwrap()
}

fn in_world<F: Future<Output = ()>>(directory: &Path, test: impl FnOnce(Daemon) -> F) {
    System::new().block_on(async {
        let clock = Arc::new(TurnedClock::default());
        let daemon = daemon(directory, clock.clone(), FakeLauncher::new(clock));
        daemon.recovered(Duration::from_secs(60)).await;
        tokio::time::timeout(Duration::from_secs(120), test(daemon.clone())).await.expect("the test hangs");
        daemon.let_go().await;
    });
}

fn request(spec: SandboxSpec) -> CreateRequest {
    CreateRequest { spec, hold_main: false, replace_grace_ms: None, pull: PullPolicy::IfMissing }
}

fn spec(text: &str) -> SandboxSpec {
    let base = SandboxSpec::new("app");
    SandboxSpec { name: Some(name(text)), detached: true, workload: Workload::Main, root_size_mib: 256, ..base }
}

/// A sandbox at rest whose disk says something.
async fn rested(daemon: &Daemon, directory: &Path, text: &str, says: &str) {
    daemon.create(request(spec(text)), None).await.unwrap();
    daemon.stop(&name(text), None, false).await.unwrap();
    write_disk(directory, text, says);
}

fn disk(directory: &Path, sandbox: &str) -> std::path::PathBuf {
    directory.join("sandboxes").join(sandbox).join("upper.img")
}

fn write_disk(directory: &Path, sandbox: &str, says: &str) {
    let mut file = std::fs::File::create(disk(directory, sandbox)).unwrap();
    file.write_all(says.as_bytes()).unwrap();
    file.set_len(1 << 20).unwrap();
}

fn said(directory: &Path, sandbox: &str) -> String {
    let bytes = std::fs::read(disk(directory, sandbox)).unwrap();
    String::from_utf8(bytes.into_iter().take_while(|byte| *byte != 0).collect()).unwrap()
}

async fn take(daemon: &Daemon, text: &str, from: &str) -> Result<SnapshotDetail, ApiError> {
    let (name, from) = (name(text), name(from));
    daemon.take_snapshot(CreateSnapshot { name, from, labels: Default::default(), memory: false }).await
}

async fn take_memory(daemon: &Daemon, text: &str, from: &str) -> Result<SnapshotDetail, ApiError> {
    let (name, from) = (name(text), name(from));
    daemon.take_snapshot(CreateSnapshot { name, from, labels: Default::default(), memory: true }).await
}

fn of_snapshot(sandbox: &str, snapshot: &SnapshotDetail) -> SandboxSpec {
    SandboxSpec {
        name: Some(name(sandbox)),
        detached: true,
        workload: Workload::Main,
        snapshot: Some(snapshot.summary.name.clone()),
        ..snapshot.spec.clone()
    }
}

/// Collects an export.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

async fn export(daemon: &Daemon, text: &str) -> Vec<u8> {
    let sink = Sink::default();
    daemon.export_snapshot(&name(text), Box::new(sink.clone())).await.unwrap();
    sink.0.lock().unwrap().clone()
}

fn entries(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory.join("snapshots")).into_iter().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_snapshot_outlives_its_sandbox_and_begins_others() {
    let home = tempfile::tempdir().unwrap();
    let directory = home.path();
    in_world(directory, |daemon| async move {
        daemon.create(request(spec("box")), None).await.unwrap();
        let error = take(&daemon, "warm", "box").await.unwrap_err();
        assert_eq!(error.code, ErrorCode::SandboxStillRunning);
        assert!(error.hint.contains("msb stop box"), "{error:?}");
        daemon.stop(&name("box"), None, false).await.unwrap();
        write_disk(directory, "box", "first");
        let taken = take(&daemon, "warm", "box").await.unwrap();
        assert_eq!(
            (taken.summary.image.digest.as_str(), taken.summary.parent.clone()),
            ("sha256:a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0", None)
        );
        assert_eq!(take(&daemon, "warm", "box").await.unwrap_err().code, ErrorCode::SnapshotAlreadyExists);
        assert_eq!(take(&daemon, "other", "nobody").await.unwrap_err().code, ErrorCode::SandboxNotFound);
        // It is nobody's but its own: the sandbox goes on, and goes.
        daemon.start(&name("box"), false).await.unwrap();
        daemon.remove(&name("box"), true).await.unwrap();
        // Its image stays, for prune and for whoever removes images.
        let unused = daemon.prune_images(PruneRequest::default()).await.unwrap();
        assert_eq!(unused.manifests_removed, 1, "only the other image");
        let error = daemon.remove_image("app".into(), false).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::ImageInUse);
        assert!(error.message.contains("snapshot warm"), "{error:?}");
        assert_eq!(daemon.inspect_image("app".into()).await.unwrap().used_by_snapshots, [name("warm")]);

        let made = daemon.create(request(of_snapshot("two", &taken)), None).await.unwrap();
        assert_eq!(
            (made.image_digest.as_str(), made.spec.image.as_str()),
            ("sha256:a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0", "app")
        );
        assert_eq!(said(directory, "two"), "first");
        assert_eq!(std::fs::metadata(disk(directory, "two")).unwrap().len(), 256 << 20);
        // What it does to its disk stays there, also over a restart, and a snapshot of it has a parent.
        daemon.stop(&name("two"), None, false).await.unwrap();
        write_disk(directory, "two", "second");
        let child = take(&daemon, "warmer", "two").await.unwrap();
        assert_eq!(child.summary.parent.as_ref().map(|parent| parent.id.as_str()), Some(taken.summary.id.as_str()));
        assert_eq!(daemon.inspect_snapshot("warm").await.unwrap().children, [name("warmer")]);
        let error = daemon.remove_snapshot(name("warm")).await.unwrap_err();
        assert_eq!((error.code, error.details), (ErrorCode::SnapshotInUse, vec!["warmer".to_owned()]));
        daemon.remove_snapshot(name("warmer")).await.unwrap();
        daemon.remove_snapshot(name("warm")).await.unwrap();
        assert_eq!(daemon.remove_snapshot(name("warm")).await.unwrap_err().code, ErrorCode::SnapshotNotFound);
        assert_eq!(entries(directory), [""; 0]);
        // The sandbox has its own disk and does not miss the snapshot.
        daemon.start(&name("two"), false).await.unwrap();
        assert_eq!(said(directory, "two"), "second");
        let error = daemon.create(request(of_snapshot("three", &taken)), None).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::SnapshotNotFound);
        assert_eq!(daemon.list(&[]).await.unwrap().len(), 1, "a refused request makes nothing");
    });
}

#[test]
fn what_cannot_be_is_refused_with_its_reason() {
    let home = tempfile::tempdir().unwrap();
    let directory = home.path();
    in_world(directory, |daemon| async move {
        rested(&daemon, directory, "box", "x").await;
        let taken = take(&daemon, "warm", "box").await.unwrap();
        let mut patched = of_snapshot("a", &taken);
        patched.patches.push(Patch::Mkdir { path: "/srv".into(), mode: 0o755 });
        let error = daemon.create(request(patched), None).await.unwrap_err();
        assert!(error.message.contains("exclude each other") && !error.hint.is_empty(), "{error:?}");
        // A file that was cut is told before a guest sees it; nothing half is left of the sandbox's disk.
        let path = directory.join("snapshots/warm/disk.img");
        let mut permissions = std::fs::metadata(&path).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o600);
        std::fs::set_permissions(&path, permissions).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(5).unwrap();
        let error = daemon.create(request(of_snapshot("a", &taken)), None).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::SnapshotDamaged);
        assert!(!disk(directory, "a").exists());
        let check = daemon.verify_snapshot(&name("warm")).await.unwrap();
        assert_eq!(check.problems.len(), 1, "{check:?}");
        // Nothing smaller than its disk.
        std::fs::remove_dir_all(directory.join("snapshots/warm")).unwrap();
        assert_eq!(daemon.verify_snapshot(&name("warm")).await.unwrap().problems.len(), 2);
        daemon.remove_snapshot(name("warm")).await.unwrap();
    });
}

#[test]
fn an_archive_goes_from_home_to_home_and_says_which_image_it_needs() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let archive = Arc::new(Mutex::new(Vec::new()));
    let (from, out) = (one.path(), archive.clone());
    in_world(from, |daemon| async move {
        rested(&daemon, from, "box", "travels").await;
        take(&daemon, "warm", "box").await.unwrap();
        *out.lock().unwrap() = export(&daemon, "warm").await;
    });
    let (to, archive) = (two.path(), archive.lock().unwrap().clone());
    in_world(to, |daemon| async move {
        let import = |name: Option<&str>, bytes: Vec<u8>| {
            let name = name.map(|text| text.parse().unwrap());
            let daemon = daemon.clone();
            async move { daemon.import_snapshot(name, Box::new(Cursor::new(bytes))).await }
        };
        let cut = archive[..archive.len() - 9].to_vec();
        assert_eq!(import(None, cut).await.unwrap_err().code, ErrorCode::InvalidArchive);
        assert!(daemon.list_snapshots().await.unwrap().is_empty() && entries(to).is_empty());
        let taken = import(Some("other"), archive.clone()).await.unwrap();
        assert_eq!(taken.summary.name, name("other"));
        assert_eq!(import(Some("other"), archive.clone()).await.unwrap_err().code, ErrorCode::SnapshotAlreadyExists);
        assert_eq!(import(None, archive.clone()).await.unwrap().summary.id, taken.summary.id);
        daemon.create(request(of_snapshot("box", &taken)), None).await.unwrap();
        assert_eq!(said(to, "box"), "travels");
    });
}

/// Not a test of its own: the process that [`a_kill_at_any_step_leaves_no_half_snapshot`] has killed.
#[test]
fn killed() {
    let (Some(directory), Ok(step)) = (std::env::var_os("SNAPSHOT_HOME"), std::env::var("SNAPSHOT_STEP")) else {
        return;
    };
    let directory = Path::new(&directory);
    in_world(directory, |daemon| async move {
        rested(&daemon, directory, "box", "kept").await;
        take(&daemon, "before", "box").await.unwrap();
        if let Some(number) = step.strip_prefix("memory-") {
            daemon.start(&name("box"), false).await.unwrap();
            fault::kill_at(Step::OF_MEMORY[number.parse::<usize>().unwrap()]);
            let _ = take_memory(&daemon, "after", "box").await;
            panic!("this process should be dead");
        }
        let step = Step::ALL[step.parse::<usize>().unwrap()];
        fault::kill_at(step);
        if matches!(step, Step::Removing | Step::Removed) {
            let _ = daemon.remove_snapshot(name("before")).await;
        } else {
            let _ = take(&daemon, "after", "box").await;
        }
        panic!("this process should be dead");
    });
}

/// Runs [`killed`] in a process of its own, which must die at that step.
fn kill_at(directory: &Path, step: &str) {
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "killed", "--test-threads", "1"])
        .env("SNAPSHOT_HOME", directory)
        .env("SNAPSHOT_STEP", step)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(9), "{step}");
}

#[test]
fn a_kill_at_any_step_leaves_no_half_snapshot_of_memory() {
    for (number, step) in Step::OF_MEMORY.into_iter().enumerate() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path();
        kill_at(directory, &format!("memory-{number}"));
        in_world(directory, |daemon| async move {
            let seen: Vec<String> =
                daemon.list_snapshots().await.unwrap().iter().map(|snapshot| snapshot.name.to_string()).collect();
            assert_eq!(
                (seen.as_slice(), entries(directory).as_slice()),
                (&*owned(&["before"]), &*owned(&["before"])),
                "{step:?}"
            );
            // These virtual machines end with their process, so the sandbox starts anew; the next try works.
            let _ = daemon.stop(&name("box"), None, true).await;
            daemon.start(&name("box"), false).await.unwrap();
            let taken = take_memory(&daemon, "after", "box").await.unwrap();
            assert!(daemon.verify_snapshot(&name("after")).await.unwrap().problems.is_empty(), "{step:?}");
            daemon.create(request(of_snapshot("again", &taken)), None).await.unwrap();
            // Bits that changed are found wherever they are.
            for file in ["memory.img", "machine.json", "disk.img", "manifest.json"] {
                flip(&directory.join("snapshots/after").join(file));
                assert_eq!(daemon.verify_snapshot(&name("after")).await.unwrap().problems.len(), 1, "{file}");
                flip(&directory.join("snapshots/after").join(file));
                assert!(daemon.verify_snapshot(&name("after")).await.unwrap().problems.is_empty(), "{file}");
            }
        });
    }
}

/// Turns one bit in the middle of a file, which nobody may write to.
fn flip(path: &Path) {
    use std::os::unix::fs::{FileExt, PermissionsExt};
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let (mut byte, place) = ([0u8], file.metadata().unwrap().len() / 2);
    file.read_exact_at(&mut byte, place).unwrap();
    file.write_all_at(&[byte[0] ^ 4], place).unwrap();
}

#[test]
fn a_kill_at_any_step_leaves_no_half_snapshot() {
    for (number, step) in Step::ALL.into_iter().enumerate() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path();
        kill_at(directory, &number.to_string());
        in_world(directory, |daemon| async move {
            let removed = matches!(step, Step::Removing | Step::Removed);
            let seen: Vec<String> =
                daemon.list_snapshots().await.unwrap().iter().map(|snapshot| snapshot.name.to_string()).collect();
            let expected: &[&str] = if removed { &[] } else { &["before"] };
            assert_eq!(
                (seen.as_slice(), entries(directory).as_slice()),
                (&*owned(expected), &*owned(expected)),
                "{step:?}"
            );
            // The sandbox is as it was, and the next try works.
            assert_eq!(daemon.inspect(&name("box")).await.unwrap().summary.status, SandboxState::Stopped);
            assert_eq!(said(directory, "box"), "kept");
            let taken = take(&daemon, "after", "box").await.unwrap();
            assert!(daemon.verify_snapshot(&name("after")).await.unwrap().problems.is_empty(), "{step:?}");
            daemon.create(request(of_snapshot("again", &taken)), None).await.unwrap();
            assert_eq!(said(directory, "again"), "kept");
        });
    }
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn snapshots_are_found_again_when_the_journal_is_lost() {
    let home = tempfile::tempdir().unwrap();
    let directory = home.path();
    let id = Arc::new(Mutex::new(String::new()));
    let kept = id.clone();
    in_world(directory, |daemon| async move {
        rested(&daemon, directory, "box", "kept").await;
        *kept.lock().unwrap() = take(&daemon, "warm", "box").await.unwrap().summary.id;
    });
    // The journal's thread lets go of its file a moment after the daemon.
    std::thread::sleep(Duration::from_millis(200));
    std::fs::remove_dir_all(directory.join("state")).unwrap();
    std::fs::create_dir(directory.join("snapshots/stranger")).unwrap();
    in_world(directory, |daemon| async move {
        let all = daemon.list_snapshots().await.unwrap();
        assert_eq!(
            all.iter().map(|one| (one.name.as_str(), one.id.as_str())).collect::<Vec<_>>(),
            [("warm", &**id.lock().unwrap())]
        );
        // What is no snapshot is left alone.
        assert_eq!(entries(directory), ["stranger", "warm"]);
    });
}

#[test]
fn a_full_disk_is_told_and_leaves_nothing_half() {
    let home = tempfile::tempdir().unwrap();
    let mounted =
        nix::mount::mount(Some("tmpfs"), home.path(), Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=12m"))
            .is_ok();
    if !mounted {
        #[expect(clippy::print_stderr, reason = "a skipped test says so in words")]
        {
            eprintln!("skipped: mounting a small tmpfs needs root");
        }
        return;
    }
    let directory = home.path();
    in_world(directory, |daemon| async move {
        rested(&daemon, directory, "box", "x").await;
        std::fs::write(disk(directory, "box"), vec![7; 6 << 20]).unwrap();
        let error = take(&daemon, "warm", "box").await.unwrap_err();
        assert_eq!(error.code, ErrorCode::DiskFull, "{error:?}");
        assert!(daemon.list_snapshots().await.unwrap().is_empty());
        assert_eq!(entries(directory), [""; 0]);
        std::fs::write(disk(directory, "box"), vec![7; 2 << 20]).unwrap();
        let taken = take(&daemon, "warm", "box").await.unwrap();
        // The disk of a new sandbox does not fit: it is refused, and the snapshot is as it was.
        let ballast = directory.join("ballast");
        drop(std::fs::write(&ballast, vec![1; 16 << 20]));
        let error = daemon.create(request(of_snapshot("two", &taken)), None).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::DiskFull, "{error:?}");
        assert!(!disk(directory, "two").exists());
        std::fs::remove_file(&ballast).unwrap();
        assert!(daemon.verify_snapshot(&name("warm")).await.unwrap().problems.is_empty());
    });
    std::thread::sleep(Duration::from_millis(200));
    nix::mount::umount2(home.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
}
