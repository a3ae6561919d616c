//! Health checks, the pre-stop hook and live labels, over fake VMs: `exists PATH` is a command whose outcome the test decides.

use msb_protocol::control::{EventRecord, LabelRequest};
use msb_protocol::health::{HealthCheck, HealthStatus, PreStop};

use super::*;

fn check(path: &std::path::Path) -> HealthCheck {
    HealthCheck {
        interval_ms: 1_000,
        retries: 2,
        ..HealthCheck::new(vec!["exists".into(), path.display().to_string()])
    }
}

async fn until_health(world: &World, text: &str, status: HealthStatus) {
    for _ in 0..2_000 {
        if world.daemon.inspect(&name(text)).await.is_ok_and(|detail| detail.summary.health == Some(status)) {
            return;
        }
        world.turn(250).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("{text} never is {status:?}: {:?}", world.daemon.inspect(&name(text)).await);
}

async fn events(world: &World, text: &str, kind: &str) -> Vec<EventRecord> {
    let mut events = world.daemon.surroundings().journal.events_after(0, 10_000).await;
    events.retain(|event| event.sandbox == name(text) && event.event == kind);
    events
}

#[test]
fn ill_health_is_shown_told_and_by_policy_a_restart() {
    simulate(|world| async move {
        let well = world.directory.path().join("well");
        std::fs::write(&well, "").unwrap();
        let health = Some(check(&well));
        world.create(SandboxSpec { health: health.clone(), ..detached("shown") }).await;
        let restart = RestartPolicy::OnFailure { max_retries: None };
        let boot = world.create(SandboxSpec { health, restart, ..detached("restarted") }).await.boot_id;
        let starting = world.daemon.inspect(&name("shown")).await.unwrap();
        assert_eq!(starting.summary.health, Some(HealthStatus::Starting));
        until_health(&world, "shown", HealthStatus::Healthy).await;
        until_health(&world, "restarted", HealthStatus::Healthy).await;
        std::fs::remove_file(&well).unwrap();
        until_health(&world, "shown", HealthStatus::Unhealthy).await;
        let detail = world.daemon.inspect(&name("shown")).await.unwrap();
        assert_eq!(detail.summary.status, SandboxState::Running, "without a policy it goes on");
        let report = detail.health_report.unwrap();
        assert!(report.failing_streak >= 2 && report.outcome == "exit code 1", "{report:?}");
        let told: Vec<_> = events(&world, "shown", "health").await.into_iter().map(|event| event.message).collect();
        assert_eq!(told, ["healthy: exit code 0", "unhealthy: exit code 1"]);
        std::fs::write(&well, "").unwrap();
        for _ in 0..2_000 {
            let detail = world.daemon.inspect(&name("restarted")).await.unwrap();
            if detail.boot_id.is_some_and(|now| Some(now) != boot)
                && detail.summary.health == Some(HealthStatus::Healthy)
            {
                assert_eq!(detail.summary.last_end.unwrap().cause, EndCause::Unhealthy);
                return;
            }
            world.turn(250).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("the ill one was not restarted");
    });
}

#[test]
fn health_checks_keep_nothing_awake() {
    simulate(|world| async move {
        let spec = SandboxSpec {
            health: Some(check(world.directory.path())),
            idle_timeout_ms: Some(10_000),
            ..detached("web")
        };
        world.create(spec).await;
        until_health(&world, "web", HealthStatus::Healthy).await;
        for _ in 0..200 {
            if world.state("web").await == Some(SandboxState::Asleep) {
                let detail = world.daemon.inspect(&name("web")).await.unwrap();
                assert_eq!((detail.summary.health, detail.last_activity), (None, None));
                return;
            }
            world.turn(250).await;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        panic!("it stays awake");
    });
}

#[test]
fn a_hook_runs_before_the_stop_and_one_that_hangs_costs_its_own_time() {
    simulate(|world| async move {
        let hook = |command: &str| Some(PreStop { command: words(command).unwrap(), timeout_ms: 5_000 });
        world.create(SandboxSpec { pre_stop: hook("exit 3"), ..detached("quick") }).await;
        world.daemon.stop(&name("quick"), None, false).await.unwrap();
        let told = events(&world, "quick", "pre_stop").await;
        assert_eq!((told.len(), told[0].message.as_str()), (1, "exit code 3: going"));
        let stopped = events(&world, "quick", "state").await;
        assert!(stopped.last().unwrap().sequence > told[0].sequence, "the hook came after the stop");

        world.create(SandboxSpec { pre_stop: hook("hang"), ..detached("slow") }).await;
        let stopping = {
            let daemon = world.daemon.clone();
            tokio::task::spawn_local(async move { daemon.stop(&name("slow"), None, false).await })
        };
        world.until("slow", SandboxState::Draining).await;
        world.turn(4_750).await;
        assert_eq!(world.launcher.alive(), 1, "its time is not over");
        world.turn(500).await;
        let end = stopping.await.unwrap().unwrap().summary.last_end.unwrap();
        assert_eq!(end.cause, EndCause::StopRequested);

        world.create(SandboxSpec { pre_stop: hook("hang"), ..detached("forced") }).await;
        world.daemon.stop(&name("forced"), None, true).await.unwrap();
        assert!(events(&world, "forced", "pre_stop").await.is_empty(), "a kill asks nobody");
    });
}

#[test]
fn labels_change_live_durably_and_what_was_the_images_stays_away() {
    simulate(|world| async move {
        world
            .create(SandboxSpec {
                image: "app".into(),
                labels: [("mine".to_owned(), "1".to_owned())].into(),
                ..detached("web")
            })
            .await;
        let request = |set: &[(&str, &str)], remove: &[&str]| LabelRequest {
            set: set.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            remove: remove.iter().map(|key| (*key).to_owned()).collect(),
        };
        let detail = world
            .daemon
            .label(&name("web"), request(&[("mine", "2"), ("gpu", "")], &["team", "nothing"]))
            .await
            .unwrap();
        let shown: Vec<_> = detail.summary.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(shown, ["gpu=", "mine=2"]);
        for bad in [request(&[("service.x", "")], &[]), request(&(0..65).map(|_| ("", "")).collect::<Vec<_>>(), &[])] {
            assert_eq!(world.daemon.label(&name("web"), bad).await.unwrap_err().code, ErrorCode::InvalidLabel);
        }
        let many: Vec<String> = (0..63).map(|number| format!("k{number}")).collect();
        let many: Vec<_> = many.iter().map(|key| (key.as_str(), "")).collect();
        assert_eq!(
            world.daemon.label(&name("web"), request(&many, &[])).await.unwrap_err().code,
            ErrorCode::InvalidLabel
        );
        let world = world.restart_daemon().await;
        world.until("web", SandboxState::Running).await;
        world.daemon.restart(&name("web"), None).await.unwrap();
        let again = world.daemon.inspect(&name("web")).await.unwrap();
        assert_eq!(again.summary.labels, detail.summary.labels, "a new run brings the image's labels back");
        assert_eq!(events(&world, "web", "labels").await[0].actor, "user");
    });
}
