//! Sleep with memory over fake VMs: it is kept, used once and forgotten; whoever comes goes before it.

use msb_protocol::control::EventRecord;

use super::*;

fn suspends(text: &str) -> SandboxSpec {
    SandboxSpec { idle_timeout_ms: Some(5_000), on_idle: OnIdle::Suspend, ..detached(text) }
}

/// Directories of memory that are there.
fn kept(world: &World, text: &str) -> Vec<String> {
    let entries = std::fs::read_dir(world.directory.path().join("sandboxes").join(text)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("memory-")).collect()
}

async fn until_none_is_kept(world: &World, text: &str) {
    for _ in 0..20_000 {
        if kept(world, text).is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("{:?} stays", kept(world, text));
}

async fn told(world: &World, kind: &str) -> Vec<EventRecord> {
    let mut events = world.daemon.surroundings().journal.events_after(0, 10_000).await;
    events.retain(|event| event.event == kind);
    events
}

fn restored(world: &World, text: &str) -> bool {
    world.launcher.spec_of(text).unwrap().restore.is_some()
}

#[test]
fn a_sandbox_sleeps_with_its_memory_and_wakes_from_it_once() {
    simulate(|world| async move {
        let before = world.create(suspends("web")).await;
        assert!(world.launcher.spec_of("web").unwrap().suspends);
        world.turn(6_000).await;
        let asleep = world.until("web", SandboxState::Asleep).await;
        assert!(asleep.memory_allocated_bytes.is_some());
        let end = asleep.summary.last_end.unwrap();
        assert_eq!((end.cause, end.message.as_str()), (EndCause::Idle, "its memory is kept"));
        assert_eq!(kept(&world, "web"), [format!("memory-{}", before.boot_id.unwrap())]);
        // A new service finds it, and wakes it as any need of it does.
        let world = world.restart_daemon().await;
        world.until("web", SandboxState::Asleep).await;
        assert_eq!(kept(&world, "web").len(), 1);
        let exec = OpenKind::Exec(ExecConfig { argv: vec!["true".into()], ..ExecConfig::default() });
        drop(world.daemon.open(&name("web"), exec, ActivityKind::Exec).await.unwrap());
        assert!(restored(&world, "web"));
        let awake = world.until("web", SandboxState::Running).await;
        assert_ne!(awake.boot_id, before.boot_id);
        assert_eq!(awake.memory_allocated_bytes, None);
        until_none_is_kept(&world, "web").await;
        // It sleeps again; a stop then forgets it, and the next start is a boot.
        world.turn(6_000).await;
        world.until("web", SandboxState::Asleep).await;
        world.daemon.stop(&name("web"), None, false).await.unwrap();
        until_none_is_kept(&world, "web").await;
        world.daemon.start(&name("web"), false).await.unwrap();
        assert!(!restored(&world, "web"));
        world.turn(6_000).await;
        world.until("web", SandboxState::Asleep).await;
        world.daemon.remove(&name("web"), false).await.unwrap();
        assert!(!world.directory.path().join("sandboxes/web").exists());
    });
}

#[test]
fn without_room_for_its_memory_it_goes_on_and_sleeps_when_there_is() {
    simulate(|world| async move {
        world.launcher.fault(|faults| faults.save = true);
        let before = world.create(suspends("web")).await;
        world.turn(6_000).await;
        // It is written by a thread, which takes real time.
        while told(&world, "suspend_failed").await.is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        let awake = world.until("web", SandboxState::Running).await;
        assert_eq!(awake.boot_id, before.boot_id);
        world.turn(30_000).await;
        world.until("web", SandboxState::Running).await;
        let failed = told(&world, "suspend_failed").await;
        assert_eq!(failed.len(), 1, "it is tried again and again");
        assert!(failed[0].message.contains("no room"), "{failed:?}");
        until_none_is_kept(&world, "web").await;
        // Its faults were fixed when it was launched.
        world.launcher.fault(|faults| faults.save = false);
        world.daemon.restart(&name("web"), None).await.unwrap();
        world.turn(70_000).await;
        world.until("web", SandboxState::Asleep).await;
    });
}

#[test]
fn memory_that_cannot_go_on_is_told_and_the_sandbox_boots_from_its_disk() {
    simulate(|world| async move {
        for how in ["refused", "missing"] {
            world.create(suspends(how)).await;
        }
        world.turn(6_000).await;
        for how in ["refused", "missing"] {
            world.until(how, SandboxState::Asleep).await;
        }
        world.launcher.fault(|faults| faults.restore = true);
        world.daemon.start(&name("refused"), false).await.unwrap();
        let directory = kept(&world, "missing").remove(0);
        let memory = world.directory.path().join("sandboxes/missing").join(directory).join("memory.img");
        std::fs::remove_file(memory).unwrap();
        world.daemon.start(&name("missing"), false).await.unwrap();
        for how in ["refused", "missing"] {
            world.until(how, SandboxState::Running).await;
            assert!(!restored(&world, how));
            until_none_is_kept(&world, how).await;
        }
        let lost = told(&world, "memory_lost").await;
        assert_eq!(lost.len(), 2, "{lost:?}");
        assert!(lost.iter().all(|event| event.message.contains("boots from its disk")), "{lost:?}");
        assert!(lost[1].message.contains("memory.img"), "{lost:?}");
    });
}

#[test]
fn what_a_service_left_half_counts_for_nothing() {
    simulate(|world| async move {
        let first = world.create(suspends("web")).await;
        world.turn(6_000).await;
        world.until("web", SandboxState::Asleep).await;
        // As if an earlier one had died while it wrote down, or while it forgot.
        let root = world.directory.path().join("sandboxes/web");
        std::fs::create_dir(root.join("memory-0")).unwrap();
        std::fs::write(root.join("memory-0/memory.img"), "half").unwrap();
        let world = world.restart_daemon().await;
        world.until("web", SandboxState::Asleep).await;
        world.daemon.start(&name("web"), false).await.unwrap();
        let restored = world.launcher.spec_of("web").unwrap().restore.unwrap();
        assert!(restored.memory.to_string_lossy().contains(&first.boot_id.unwrap().to_string()));
        until_none_is_kept(&world, "web").await;
    });
}

#[test]
fn what_cannot_sleep_with_its_memory_is_refused_with_the_reason() {
    use msb_protocol::mount::{Mount, MountOptions, MountSource};
    use msb_protocol::spec::{EngineChoice, RootKind};
    type Edit = fn(&mut SandboxSpec);
    let mount = |target: &str, source| Mount { target: target.into(), source, options: MountOptions::default() };
    let directory = mount("/host", MountSource::Directory { path: "/etc".into() });
    let tmpfs = mount("/scratch", MountSource::Tmpfs { size_mib: None });
    simulate(|world| async move {
        let edits: [(Edit, ErrorCode, &str); 2] = [
            (|spec| spec.engine = EngineChoice::Qemu, ErrorCode::UnsupportedOperation, "engine qemu"),
            (|spec| (spec.root, spec.image) = (RootKind::Directory, "/".into()), ErrorCode::InvalidConfig, "root"),
        ];
        let mut specs: Vec<_> = edits
            .map(|(edit, code, word)| {
                let mut spec = suspends("web");
                edit(&mut spec);
                (spec, code, word)
            })
            .into();
        specs.push((
            SandboxSpec { mounts: vec![tmpfs.clone(), directory], ..suspends("web") },
            ErrorCode::InvalidConfig,
            "/etc",
        ));
        for (spec, code, word) in specs {
            let request = request(spec);
            let refused = world.daemon.create(request, None).await.unwrap_err();
            assert_eq!(refused.code, code);
            assert!(refused.message.contains(word), "{refused:?}");
        }
        assert_eq!(world.state("web").await, None);
        world.create(SandboxSpec { mounts: vec![tmpfs], ..suspends("web") }).await;
    });
}
