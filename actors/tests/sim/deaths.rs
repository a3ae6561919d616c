//! Deaths at every moment: of the VM process, of the daemon, of the creator, of the host.

use msb_protocol::health::PreStop;

use super::*;

fn hanging() -> Option<PreStop> {
    Some(PreStop { command: vec!["hang".into()], timeout_ms: 600_000 })
}

/// Brings `web` into a state and leaves it there: what is asked for hangs, because the agent never comes or never listens.
async fn bring(world: &World, state: &str, restart: RestartPolicy) {
    let spec = SandboxSpec { restart, pre_stop: (state == "hook").then(hanging).flatten(), ..detached("web") };
    let daemon = world.daemon.clone();
    if state == "starting" {
        world.launcher.fault(|faults| faults.silent_boot = true);
        tokio::task::spawn_local(async move { daemon.create(request(spec), None).await });
        while world.launcher.spec_of("web").is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        world.until("web", SandboxState::Starting).await;
        world.launcher.fault(|faults| faults.silent_boot = false);
        return;
    }
    world.launcher.fault(|faults| faults.deaf = true);
    world.create(spec).await;
    world.launcher.fault(|faults| faults.deaf = false);
    if state == "running" {
        return;
    }
    tokio::task::spawn_local(async move { daemon.stop(&name("web"), Some(2_000), false).await });
    world.until("web", SandboxState::Draining).await;
    if state == "stopping" {
        world.turn(2_250).await;
        world.until("web", SandboxState::Stopping).await;
    }
}

const STATES: [&str; 5] = ["starting", "running", "hook", "draining", "stopping"];

#[test]
fn a_vm_process_that_dies_in_any_state_is_settled_once_and_told_truly() {
    for state in STATES {
        simulate(|world| async move {
            bring(&world, state, RestartPolicy::No).await;
            world.launcher.crash("web", EndCause::VmmCrash);
            // Nobody asked for the end of the first two.
            let resting =
                if ["starting", "running"].contains(&state) { SandboxState::Crashed } else { SandboxState::Stopped };
            let detail = world.until("web", resting).await;
            assert_eq!(detail.summary.last_end.unwrap().cause, EndCause::VmmCrash, "{state}");
            assert_eq!(world.launcher.alive(), 0, "{state}");
            // It is as good as any: it goes up again and away.
            world.daemon.start(&name("web"), false).await.unwrap();
            world.daemon.remove(&name("web"), true).await.unwrap();
        });
    }
}

#[test]
fn a_daemon_that_dies_in_any_state_goes_on_where_it_was() {
    for state in STATES {
        simulate(|world| async move {
            bring(&world, state, RestartPolicy::No).await;
            let boots = world.launcher.boots();
            let world = world.restart_daemon().await;
            let ending = ["hook", "draining", "stopping"].contains(&state);
            if !ending {
                // A boot that was under way comes to its end with the same VM.
                world.launcher.ready("web");
                world.until("web", SandboxState::Running).await;
                assert_eq!(world.launcher.boots(), boots, "{state}: another VM was started");
                return;
            }
            // A stop that was under way is gone on with: its times begin anew, and the kill comes at their end.
            for _ in 0..2_000 {
                if world.state("web").await == Some(SandboxState::Stopped) {
                    break;
                }
                world.turn(1_000).await;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            world.until("web", SandboxState::Stopped).await;
            assert_eq!(world.launcher.alive(), 0, "{state}");
        });
    }
}

/// A new daemon on a host that starts everything at once waits longer for the first beat, and from then on as long as any.
#[test]
fn an_adopted_vm_that_falls_silent_is_a_crash_after_three_beats_and_one_that_was_silent_before_a_little_later() {
    for beats_first in [true, false] {
        simulate(|world| async move {
            world.create(SandboxSpec { restart: RestartPolicy::No, ..detached("web") }).await;
            world.turn(5_000).await;
            if !beats_first {
                world.launcher.silence("web");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let world = world.restart_daemon().await;
            // Until then it is shown as it was last seen, and nothing is waited for yet.
            world.daemon.recovered(Duration::from_secs(60)).await;
            assert_eq!(world.state("web").await, Some(SandboxState::Running));
            if beats_first {
                world.turn(2_000).await;
                world.launcher.silence("web");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            // The last beat was heard up to a second ago.
            let (alive_ms, then_ms) = if beats_first { (2_750, 2_250) } else { (19_000, 2_000) };
            world.turn(alive_ms).await;
            assert_eq!(world.state("web").await, Some(SandboxState::Running), "beats first: {beats_first}");
            world.turn(then_ms).await;
            let crashed = world.until("web", SandboxState::Crashed).await;
            assert_eq!(crashed.summary.last_end.unwrap().cause, EndCause::AgentLost);
        });
    }
}

#[test]
fn a_silent_vm_on_a_starved_host_has_three_times_as_long() {
    simulate(|world| async move {
        let pressure = world.directory.path().join(msb_actors::simulation::PRESSURE_FILE);
        std::fs::write(pressure, "some avg10=80.00 avg60=9.00 avg300=7.94 total=1\n").unwrap();
        world.create(SandboxSpec { restart: RestartPolicy::No, ..detached("web") }).await;
        world.turn(5_000).await;
        world.launcher.silence("web");
        tokio::time::sleep(Duration::from_millis(20)).await;
        world.turn(10_750).await;
        assert_eq!(world.state("web").await, Some(SandboxState::Running));
        world.turn(2_250).await;
        let crashed = world.until("web", SandboxState::Crashed).await;
        assert_eq!(crashed.summary.last_end.unwrap().cause, EndCause::AgentLost);
    });
}

#[test]
fn a_creator_that_dies_between_request_and_answer_leaves_nothing() {
    simulate(|world| async move {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        world.launcher.fault(|faults| faults.silent_boot = true);
        let daemon = world.daemon.clone();
        let creator = creator(&child);
        let spec = SandboxSpec { detached: false, ephemeral: true, ..detached("web") };
        let asked = tokio::task::spawn_local(async move { daemon.create(request(spec), Some(creator)).await });
        world.until("web", SandboxState::Starting).await;
        while world.launcher.spec_of("web").is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(asked.await.unwrap().is_err());
        world.until_gone("web").await;
        assert_eq!(world.launcher.alive(), 0);

        // One that was dead before anybody looked is no different.
        world.launcher.fault(|faults| faults.silent_boot = false);
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let creator = super::creator(&child);
        child.kill().unwrap();
        child.wait().unwrap();
        let spec = SandboxSpec { detached: false, ephemeral: true, ..detached("late") };
        // It may come up for a moment: its end begins at once all the same.
        let _ = world.daemon.create(request(spec), Some(creator)).await;
        world.until_gone("late").await;
        assert_eq!(world.launcher.alive(), 0);
    });
}

#[test]
fn a_host_that_goes_down_flushes_all_and_brings_back_what_is_to_come_back() {
    simulate(|world| async move {
        for (text, restart) in [
            ("plain", RestartPolicy::Default),
            ("always", RestartPolicy::Always),
            ("unless", RestartPolicy::UnlessStopped),
        ] {
            world.create(SandboxSpec { restart, ..detached(text) }).await;
        }
        world.create(SandboxSpec { restart: RestartPolicy::UnlessStopped, ..detached("stopped") }).await;
        world.daemon.stop(&name("stopped"), None, false).await.unwrap();
        assert_eq!(world.daemon.host_stop().await.unwrap(), 3);
        assert_eq!(world.launcher.alive(), 0);
        world.turn(10_000).await;
        assert_eq!(world.launcher.alive(), 0, "this daemon starts nothing any more");
        let world = world.restart_daemon().await;
        for text in ["always", "unless"] {
            let detail = world.until(text, SandboxState::Running).await;
            assert_eq!(detail.summary.last_end.unwrap().cause, EndCause::HostShutdown, "{text}");
        }
        for text in ["plain", "stopped"] {
            world.until(text, SandboxState::Stopped).await;
        }
    });
}

#[test]
fn a_full_disk_under_the_heartbeat_costs_the_file_and_not_the_sandbox() {
    simulate(|world| async move {
        world.create(detached("web")).await;
        let folder = world.directory.path().join("sandboxes/web");
        let (path, temporary) = (folder.join("heartbeat.json"), folder.join("heartbeat.json.tmp"));
        let sequence = || {
            let text = std::fs::read(&path).unwrap_or_default();
            serde_json::from_slice::<serde_json::Value>(&text).ok().and_then(|beat| beat["sequence"].as_u64())
        };
        let until = async |beyond: u64| {
            for _ in 0..20_000 {
                if sequence().is_some_and(|sequence| sequence > beyond) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            panic!("no beat after the {beyond}th was written");
        };
        world.turn(3_000).await;
        until(0).await;
        // Every byte that is written there meets a full disk.
        std::os::unix::fs::symlink("/dev/full", &temporary).unwrap();
        std::fs::remove_file(&path).unwrap();
        for _ in 0..10 {
            world.turn(1_000).await;
            tokio::time::sleep(msb_actors::sandbox::heartbeat::PAUSE / 4).await;
        }
        assert_eq!(world.state("web").await, Some(SandboxState::Running));
        assert_eq!(sequence(), None, "a full disk took it");
        std::fs::remove_file(&temporary).unwrap();
        world.turn(3_000).await;
        until(10).await;
    });
}
