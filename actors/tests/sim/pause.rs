//! Halted sandboxes over fake VMs: nothing counts while they stand, a new daemon finds them as they are, every stop lets them go on first.

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
