//! Halted and copied sandboxes over fake VMs: nothing counts while they stand, a new daemon finds them as they are, every stop lets them go on first.

use super::*;

#[test]
fn a_paused_sandbox_stands_still_for_everything_that_counts_and_outlives_the_daemon() {
    simulate(|world| async move {
        world.create(SandboxSpec { idle_timeout_ms: Some(5_000), ..detached("web") }).await;
        let before = world.daemon.inspect(&name("web")).await.unwrap();
        world.turn(3_000).await;
        let paused = world.daemon.pause(&name("web")).await.unwrap();
        assert_eq!((paused.summary.status, paused.boot_id), (SandboxState::Paused, before.boot_id));
        assert_eq!(paused.summary.started_at, before.summary.started_at);
        world.daemon.pause(&name("web")).await.unwrap();
        // Longer than beats may be missed, and than it may be idle.
        world.turn(60_000).await;
        assert_eq!(world.state("web").await, Some(SandboxState::Paused));
        let exec = OpenKind::Exec(ExecConfig { argv: vec!["true".into()], ..ExecConfig::default() });
        let refused = world.daemon.open(&name("web"), exec, ActivityKind::Exec).await.err().unwrap();
        assert_eq!(refused.code, ErrorCode::SandboxPaused);
        assert_eq!(world.daemon.start(&name("web"), false).await.err().unwrap().code, ErrorCode::SandboxPaused);
        assert_eq!(world.daemon.touch(&name("web")).await.err().unwrap().code, ErrorCode::SandboxPaused);
        let world = world.restart_daemon().await;
        let found = world.until("web", SandboxState::Paused).await;
        assert_eq!(found.boot_id, before.boot_id);
        let resumed = world.daemon.resume(&name("web")).await.unwrap();
        assert_eq!((resumed.summary.status, resumed.boot_id), (SandboxState::Running, before.boot_id));
        world.turn(4_000).await;
        assert_eq!(world.state("web").await, Some(SandboxState::Running), "the idle time began anew");
        world.turn(4_000).await;
        world.until("web", SandboxState::Asleep).await;
        for outcome in [world.daemon.pause(&name("web")).await, world.daemon.resume(&name("web")).await] {
            assert_eq!(outcome.unwrap_err().code, ErrorCode::SandboxNotRunning);
        }
    });
}

#[test]
fn a_paused_sandbox_is_stopped_killed_and_removed_like_any_other() {
    simulate(|world| async move {
        for (text, force) in [("stopped", false), ("killed", true)] {
            world.create(detached(text)).await;
            world.daemon.pause(&name(text)).await.unwrap();
            assert_eq!(world.daemon.remove(&name(text), false).await.unwrap_err().code, ErrorCode::SandboxStillRunning);
            let stopped = world.daemon.stop(&name(text), None, force).await.unwrap();
            let cause = stopped.summary.last_end.unwrap().cause;
            assert_eq!(cause, if force { EndCause::Killed } else { EndCause::StopRequested });
        }
        world.create(detached("removed")).await;
        world.daemon.pause(&name("removed")).await.unwrap();
        world.daemon.remove(&name("removed"), true).await.unwrap();
        assert_eq!(world.launcher.alive(), 0);
    });
}

#[test]
fn a_fork_goes_on_from_memory_once_and_leaves_no_snapshot_behind() {
    use msb_protocol::snapshot::{CreateSnapshot, ForkRequest, SnapshotKind};
    simulate(|world| async move {
        world.create(SandboxSpec { labels: [("a".into(), "b".into())].into(), ..detached("web") }).await;
        let taking = CreateSnapshot { name: name("warm"), from: name("web"), labels: Default::default(), memory: true };
        let detail = world.daemon.take_snapshot(taking.clone()).await.unwrap();
        assert_eq!((detail.summary.kind, detail.memory.unwrap().network), (SnapshotKind::Memory, true));
        assert_eq!(world.state("web").await, Some(SandboxState::Running));
        assert!(world.daemon.verify_snapshot(&name("warm")).await.unwrap().problems.is_empty());
        assert_eq!(world.daemon.take_snapshot(taking).await.unwrap_err().code, ErrorCode::SnapshotAlreadyExists);

        let made = world.daemon.fork(&name("web"), ForkRequest { count: 2, name: Some(name("twin")) }).await.unwrap();
        let names: Vec<_> = made.iter().map(|fork| fork.summary.name.to_string()).collect();
        assert_eq!(names, ["twin-1", "twin-2"]);
        assert!(made.iter().all(|fork| fork.summary.labels.contains_key("a") && fork.spec.detached));
        assert_eq!(world.daemon.list_snapshots().await.unwrap().len(), 1, "only the one that was asked for");
        assert!(world.launcher.spec_of("twin-1").unwrap().restore.is_some());
        assert!(world.launcher.spec_of("web").unwrap().restore.is_none());
        // Its disk has been lived in since: memory of before does not fit it any more.
        world.daemon.restart(&name("twin-1"), None).await.unwrap();
        assert!(world.launcher.spec_of("twin-1").unwrap().restore.is_none());

        for (count, code) in [(0, ErrorCode::InvalidRequest), (101, ErrorCode::InvalidRequest)] {
            assert_eq!(
                world.daemon.fork(&name("web"), ForkRequest { count, name: None }).await.unwrap_err().code,
                code
            );
        }
        // All or none: the second name is taken.
        let half = ForkRequest { count: 2, name: Some(name("twin")) };
        world.daemon.remove(&name("twin-1"), true).await.unwrap();
        assert_eq!(world.daemon.fork(&name("web"), half).await.unwrap_err().code, ErrorCode::SandboxAlreadyExists);
        assert_eq!(world.state("twin-1").await, None);
        world.daemon.pause(&name("web")).await.unwrap();
        let refused = world.daemon.fork(&name("web"), ForkRequest { count: 1, name: None }).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::SandboxPaused);
        world.daemon.stop(&name("web"), None, false).await.unwrap();
        let refused = world.daemon.fork(&name("web"), ForkRequest { count: 1, name: None }).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::SandboxNotRunning);
    });
}

#[test]
fn what_would_make_it_another_machine_is_refused_by_name() {
    use msb_protocol::snapshot::CreateSnapshot;
    use msb_protocol::spec::Workload;
    simulate(|world| async move {
        world.create(detached("web")).await;
        let taking = CreateSnapshot { name: name("warm"), from: name("web"), labels: Default::default(), memory: true };
        let saved = world.daemon.take_snapshot(taking).await.unwrap();
        type Edit = fn(&mut SandboxSpec);
        let edits: [(Edit, &str); 5] = [
            (|spec| spec.memory_mib *= 2, "memory"),
            (|spec| spec.cpus += 1, "processors"),
            (|spec| spec.network.enabled = false, "network card"),
            (|spec| spec.root_size_mib += 1, "disk"),
            (|spec| drop(spec.env.insert("A".into(), "b".into())), "environment"),
        ];
        for (edit, word) in edits {
            let mut spec = SandboxSpec {
                name: Some(name("no")),
                detached: true,
                snapshot: Some(name("warm")),
                ..saved.spec.clone()
            };
            edit(&mut spec);
            let request = request(spec);
            let refused = world.daemon.create(request, None).await.unwrap_err();
            assert!(refused.message.contains(word), "{word}: {refused:?}");
            assert_eq!(world.state("no").await, None);
        }
        // What had no main workload has room for one; what had one goes on with it and with no other.
        let spec = |sandbox: &str, saved: &SandboxSpec, snapshot: &str| SandboxSpec {
            name: Some(name(sandbox)),
            detached: true,
            snapshot: Some(name(snapshot)),
            workload: Workload::Main,
            ..saved.clone()
        };
        let made = world.create(spec("one", &saved.spec, "warm")).await;
        assert_eq!(made.spec.workload, Workload::Main);
        let taking = CreateSnapshot { name: name("busy"), from: name("one"), labels: Default::default(), memory: true };
        let saved = world.daemon.take_snapshot(taking).await.unwrap();
        assert!(saved.memory.as_ref().unwrap().main);
        let goes_on = SandboxSpec { workload: Workload::None, ..spec("two", &saved.spec, "busy") };
        assert_eq!(world.create(goes_on).await.spec.workload, Workload::Main);
        let other = SandboxSpec { command: Some(vec!["true".into()]), ..spec("three", &saved.spec, "busy") };
        let request = request(other);
        assert!(world.daemon.create(request, None).await.unwrap_err().message.contains("command"));
    });
}

#[test]
fn a_vm_process_of_an_older_generation_does_all_it_knows_and_refuses_what_is_newer() {
    simulate(|world| async move {
        world.launcher.fault(|faults| faults.vmm_generation = Some(1));
        let old = world.create(detached("web")).await.boot_id;
        world.launcher.fault(|faults| faults.vmm_generation = None);
        // The upgrade: a new daemon finds it.
        let world = world.restart_daemon().await;
        world.until("web", SandboxState::Running).await;
        let exec = OpenKind::Exec(ExecConfig { argv: words("echo on").unwrap(), ..ExecConfig::default() });
        let (mut session, _guard) = world.daemon.open(&name("web"), exec, ActivityKind::Exec).await.unwrap();
        use msb_protocol::guest::GuestBody;
        loop {
            if let GuestBody::Output(output) = session.reader.next().await.unwrap().unwrap() {
                assert_eq!(output.data, b"on\n");
                break;
            }
        }
        let refused = world.daemon.pause(&name("web")).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::UnsupportedOperation);
        assert!(refused.hint.contains("restart the sandbox"), "{refused:?}");
        assert_eq!(world.daemon.inspect(&name("web")).await.unwrap().boot_id, old);
        // It says the truth.
        world.daemon.stop(&name("web"), None, false).await.unwrap();
        world.daemon.start(&name("web"), false).await.unwrap();
        assert_eq!(world.daemon.pause(&name("web")).await.unwrap().summary.status, SandboxState::Paused);
    });
}
