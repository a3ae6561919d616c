//! What counts as activity: one test for each row of the table in `docs/lifecycle.md`. SSH sessions have theirs in `sim.rs`.

use msb_actors::metrics::snapshot::Choice;
use msb_protocol::guest::OpenAttach;
use msb_protocol::vmm::Sample;

use super::*;

/// A sandbox that is put to sleep after five seconds without activity.
async fn drowsy(world: &World) {
    world.create(SandboxSpec { idle_timeout_ms: Some(5_000), ..detached("web") }).await;
}

/// It is up after all this time, and counts this as what happened last.
async fn is_awake_for(world: &World, ms: u64, kind: &str) {
    world.turn(ms).await;
    let detail = world.daemon.inspect(&name("web")).await.unwrap();
    assert_eq!((detail.summary.status, detail.last_activity.as_deref()), (SandboxState::Running, Some(kind)));
}

async fn falls_asleep(world: &World) {
    world.turn(6_000).await;
    let asleep = world.until("web", SandboxState::Asleep).await;
    assert_eq!(asleep.summary.last_end.unwrap().cause, EndCause::Idle);
}

#[test]
fn a_command_counts_from_its_start_to_its_end() {
    simulate(|world| async move {
        drowsy(&world).await;
        let exec = OpenKind::Exec(ExecConfig { argv: words("cat").unwrap(), ..ExecConfig::default() });
        let session = world.daemon.open(&name("web"), exec, ActivityKind::Exec).await.unwrap();
        is_awake_for(&world, 20_000, "exec").await;
        drop(session);
        is_awake_for(&world, 4_000, "exec").await;
        falls_asleep(&world).await;
    });
}

#[test]
fn an_attached_client_counts_from_its_start_to_its_end() {
    simulate(|world| async move {
        drowsy(&world).await;
        let attach = OpenKind::Attach(OpenAttach::default());
        let session = world.daemon.open(&name("web"), attach, ActivityKind::Attach).await.unwrap();
        is_awake_for(&world, 20_000, "attach").await;
        drop(session);
        falls_asleep(&world).await;
    });
}

#[test]
fn a_forwarded_connection_counts_by_its_bytes_and_not_by_being_open() {
    simulate(|world| async move {
        drowsy(&world).await;
        let exec = OpenKind::Exec(ExecConfig { argv: words("echo").unwrap(), ..ExecConfig::default() });
        let (session, guard) = world.daemon.open(&name("web"), exec, ActivityKind::Exec).await.unwrap();
        let bytes = guard.activity().clone();
        drop((session, guard));
        for _ in 0..4 {
            bytes.touch(ActivityKind::Forward);
            is_awake_for(&world, 4_000, "forward").await;
        }
        falls_asleep(&world).await;
    });
}

#[test]
fn a_connection_to_a_published_port_counts_while_it_is_open_and_when_it_was_opened() {
    simulate(|world| async move {
        drowsy(&world).await;
        // One that is open; then one that came and went between two samples.
        for (opened, open) in [(1, 1), (1, 1), (1, 1), (2, 0)] {
            let sample = Sample { network_inbound_opened: opened, network_inbound_open: open, ..Sample::default() };
            world.launcher.tell("web", sample);
            tokio::time::sleep(Duration::from_millis(5)).await;
            is_awake_for(&world, 4_000, "connection").await;
        }
        falls_asleep(&world).await;
    });
}

#[test]
fn a_touch_counts_once() {
    simulate(|world| async move {
        drowsy(&world).await;
        world.turn(4_000).await;
        world.daemon.touch(&name("web")).await.unwrap();
        is_awake_for(&world, 4_000, "touch").await;
        falls_asleep(&world).await;
    });
}

#[test]
fn whoever_only_looks_keeps_nothing_awake() {
    simulate(|world| async move {
        drowsy(&world).await;
        let web = name("web");
        let waiting = tokio::task::spawn_local({
            let (daemon, web) = (world.daemon.clone(), web.clone());
            async move { daemon.wait(&web).await }
        });
        for second in 0..5 {
            world.daemon.inspect(&web).await.unwrap();
            world.daemon.list(&[]).await.unwrap();
            world.daemon.actors().await.unwrap();
            world.daemon.metrics(&Choice::default()).await.unwrap();
            world.daemon.metrics_history(&web, u64::MAX, 10).await.unwrap();
            world.daemon.surroundings().journal.events_after(0, 100).await;
            // The simulated agent is too old to answer, and is asked all the same.
            assert!(world.daemon.ping(&web).await.is_err());
            let set = [("looked".to_owned(), second.to_string())].into();
            let request = msb_protocol::control::LabelRequest { set, remove: Vec::new() };
            world.daemon.label(&web, request).await.unwrap();
            world.turn(900).await;
        }
        assert_eq!(world.daemon.inspect(&web).await.unwrap().last_activity, None);
        world.turn(1_500).await;
        world.until("web", SandboxState::Asleep).await;
        // Heartbeats and samples came all the time, too, and whoever waited for the end has seen it.
        assert_eq!(waiting.await.unwrap().unwrap().summary.last_end.unwrap().cause, EndCause::Idle);
    });
}
