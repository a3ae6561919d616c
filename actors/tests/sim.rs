//! The sim tier: supervisor and actors over fake VMs and a turned clock. Every wait of the rules passes in an instant.
#![expect(clippy::print_stdout, reason = "figures for the reader of the output")]

#[path = "sim/activity.rs"]
mod activity;
#[path = "sim/care.rs"]
mod care;
#[path = "sim/deaths.rs"]
mod deaths;
#[path = "sim/faults.rs"]
mod faults;
#[path = "sim/load.rs"]
mod load;
#[path = "sim/pause.rs"]
mod pause;
#[path = "sim/pool.rs"]
mod pool;
#[path = "sim/sleep.rs"]
mod sleep;
#[path = "sim/starts.rs"]
mod starts;

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use msb_actors::clock::Clock;
use msb_actors::daemon::{Creator, Daemon};
use msb_actors::identity::ProcessIdentity;
use msb_actors::sandbox::activity::ActivityKind;
use msb_actors::sandbox::actor::PanicNow;
use msb_actors::simulation::{FakeLauncher, TurnedClock, daemon};
use msb_protocol::control::{CreateRequest, SandboxDetail};
use msb_protocol::error::ErrorCode;
use msb_protocol::guest::{ExecConfig, OpenKind};

use msb_protocol::id::SandboxName;
use msb_protocol::images::PullPolicy;
use msb_protocol::paths::HomeLayout;
use msb_protocol::spec::{OnIdle, RestartPolicy, SandboxSpec, Workload};
use msb_protocol::state::{EndCause, ProcessEnd, SandboxState};

struct World {
    directory: tempfile::TempDir,
    clock: Arc<TurnedClock>,
    launcher: Arc<FakeLauncher>,
    daemon: Daemon,
}

fn simulate<F: Future<Output = ()>>(test: impl FnOnce(World) -> F) {
    System::new().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let clock = Arc::new(TurnedClock::default());
        let launcher = FakeLauncher::new(clock.clone());
        let daemon = daemon(directory.path(), clock.clone(), launcher.clone());
        let limit = tokio::time::timeout(Duration::from_secs(120), test(World { directory, clock, launcher, daemon }));
        limit.await.expect("the test hangs");
    });
}

fn name(text: &str) -> SandboxName {
    text.parse().unwrap()
}

fn detached(text: &str) -> SandboxSpec {
    SandboxSpec { name: Some(name(text)), detached: true, workload: Workload::Main, ..SandboxSpec::new("busybox") }
}

fn words(text: &str) -> Option<Vec<String>> {
    Some(text.split(' ').map(String::from).collect())
}

fn request(spec: SandboxSpec) -> CreateRequest {
    CreateRequest { spec, hold_main: false, replace_grace_ms: None, pull: PullPolicy::IfMissing }
}

impl World {
    async fn create(&self, spec: SandboxSpec) -> SandboxDetail {
        self.daemon.create(request(spec), None).await.unwrap()
    }

    async fn state(&self, text: &str) -> Option<SandboxState> {
        self.daemon.inspect(&name(text)).await.ok().map(|detail| detail.summary.status)
    }

    /// Turns the clock in small steps, so that whoever was woken has acted before the next one is.
    async fn turn(&self, by_ms: u64) {
        let mut left = by_ms;
        while left > 0 {
            let step = left.min(250);
            self.clock.turn(step);
            left -= step;
            for _ in 0..16 {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Waits, in real time, for what other threads (journal, disks) still do; the clock stands.
    async fn until(&self, text: &str, state: SandboxState) -> SandboxDetail {
        for _ in 0..20_000 {
            if let Ok(detail) = self.daemon.inspect(&name(text)).await
                && detail.summary.status == state
            {
                return detail;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("{text} is {:?} and never {state:?}", self.state(text).await);
    }

    async fn until_gone(&self, text: &str) {
        for _ in 0..20_000 {
            if self.state(text).await.is_none() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("{text} is {:?} and not gone", self.state(text).await);
    }

    /// The daemon ends, as by `kill -9`; VMs go on; another one begins.
    async fn restart_daemon(self) -> Self {
        self.daemon.let_go().await;
        let Self { directory, clock, launcher, daemon: old } = self;
        drop(old);
        // Its actors end in turns of this very thread, and ten thousand of them have many.
        let journal = std::fs::File::open(HomeLayout::new(directory.path()).journal()).unwrap();
        for _ in 0..3_000 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            if journal.try_lock().is_ok() {
                break;
            }
        }
        drop(journal);
        let daemon = daemon(directory.path(), clock.clone(), launcher.clone());
        Self { directory, clock, launcher, daemon }
    }
}

fn creator(child: &std::process::Child) -> Creator {
    let identity = ProcessIdentity::of(child.id()).unwrap();
    let pidfd = identity.open().unwrap();
    Creator { identity, pidfd }
}

#[test]
fn a_sandbox_goes_up_down_up_and_away() {
    simulate(|world| async move {
        let detail = world.create(detached("web")).await;
        assert_eq!(
            (detail.summary.status, detail.image_digest.as_str()),
            (SandboxState::Running, "sha256:b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0")
        );
        let first_boot = detail.boot_id.unwrap();
        let stopped = world.daemon.stop(&name("web"), None, false).await.unwrap();
        assert_eq!(stopped.summary.status, SandboxState::Stopped);
        assert_eq!(stopped.summary.last_end.unwrap().cause, EndCause::StopRequested);
        assert_eq!(world.launcher.alive(), 0);
        let again = world.daemon.start(&name("web"), false).await.unwrap();
        assert_ne!(again.boot_id.unwrap(), first_boot);
        assert_eq!(world.daemon.remove(&name("web"), false).await.unwrap_err().code, ErrorCode::SandboxStillRunning);
        world.daemon.remove(&name("web"), true).await.unwrap();
        assert_eq!(world.daemon.inspect(&name("web")).await.unwrap_err().code, ErrorCode::SandboxNotFound);
        assert!(!world.directory.path().join("sandboxes/web").exists());
        // The name is free at once.
        world.create(detached("web")).await;
    });
}

#[test]
fn a_workload_that_ends_before_anybody_looks_was_still_a_success() {
    simulate(|world| async move {
        for (command, code) in [("true", 0), ("false", 1)] {
            world.create(SandboxSpec { command: words(command), ..detached(command) }).await;
            let detail = world.daemon.wait(&name(command)).await.unwrap();
            let end = detail.summary.last_end.unwrap();
            assert_eq!(
                (detail.summary.status, end.cause, end.process),
                (SandboxState::Stopped, EndCause::Completed, Some(ProcessEnd::exited(code)))
            );
        }
        let ephemeral = SandboxSpec { command: words("true"), ephemeral: true, ..detached("gone") };
        world.create(ephemeral).await;
        world.until_gone("gone").await;
        assert!(!world.directory.path().join("sandboxes/gone").exists());
    });
}

#[test]
fn what_cannot_be_is_refused_with_its_reason_and_leaves_nothing() {
    simulate(|world| async move {
        let create = |spec: SandboxSpec| world.daemon.create(request(spec), None);
        assert_eq!(
            create(SandboxSpec { image: "nginx".into(), ..detached("a") }).await.unwrap_err().code,
            ErrorCode::ImageNotFound
        );
        world.launcher.fault(|faults| faults.launch = true);
        assert_eq!(create(detached("a")).await.unwrap_err().code, ErrorCode::EngineUnavailable);
        world.launcher.fault(|faults| *faults = Default::default());
        assert_eq!(
            create(SandboxSpec { detached: false, ..detached("a") }).await.unwrap_err().code,
            ErrorCode::CreatorUnwatchable
        );
        assert_eq!(
            create(SandboxSpec { entrypoint: Some(Vec::new()), ..detached("a") }).await.unwrap_err().code,
            ErrorCode::InvalidConfig
        );
        assert!(world.daemon.list(&[]).await.unwrap().is_empty());
        assert_eq!(std::fs::read_dir(world.directory.path().join("sandboxes")).map_or(0, Iterator::count), 0);
        world.create(detached("a")).await;
        assert_eq!(create(detached("a")).await.unwrap_err().code, ErrorCode::SandboxAlreadyExists);
        let replace = CreateRequest {
            spec: detached("a"),
            hold_main: false,
            replace_grace_ms: Some(1_000),
            pull: PullPolicy::IfMissing,
        };
        world.daemon.create(replace, None).await.unwrap();
        assert_eq!(world.launcher.alive(), 1);
    });
}

#[test]
fn a_boot_that_fails_is_told_and_keeps_a_named_sandbox() {
    simulate(|world| async move {
        world.launcher.fault(|faults| faults.boot = true);
        let request = CreateRequest {
            spec: detached("ill"),
            hold_main: false,
            replace_grace_ms: None,
            pull: PullPolicy::IfMissing,
        };
        assert_eq!(world.daemon.create(request, None).await.unwrap_err().code, ErrorCode::BootFailed);
        world.until("ill", SandboxState::Crashed).await;
        world.launcher.fault(|faults| faults.boot = false);
        assert_eq!(world.daemon.start(&name("ill"), false).await.unwrap().summary.status, SandboxState::Running);
    });
}

#[test]
fn crashes_are_restarted_with_growing_waits_and_then_no_more() {
    simulate(|world| async move {
        let mut boot = world.create(detached("web")).await.boot_id;
        for restarts in 1..=5u32 {
            world.launcher.crash("web", EndCause::VmmCrash);
            let waiting = world.until("web", SandboxState::Restarting).await;
            assert!(waiting.next_try_at.is_some());
            world.turn(50 << restarts).await;
            let again = world.until("web", SandboxState::Running).await;
            assert_eq!(again.summary.restarts, restarts);
            assert_ne!(again.boot_id, boot);
            boot = again.boot_id;
        }
        world.launcher.crash("web", EndCause::GuestPanic);
        let crashed = world.until("web", SandboxState::Crashed).await;
        assert_eq!(crashed.summary.last_end.unwrap().cause, EndCause::GuestPanic);
    });
}

#[test]
fn a_silent_agent_is_a_crash() {
    simulate(|world| async move {
        world.launcher.fault(|faults| faults.no_beats = true);
        let first = world.create(SandboxSpec { restart: RestartPolicy::No, ..detached("web") }).await;
        world.turn(3_900).await;
        assert_eq!(world.state("web").await, Some(SandboxState::Running));
        world.turn(1_000).await;
        let crashed = world.until("web", SandboxState::Crashed).await;
        let end = crashed.summary.last_end.unwrap();
        assert_eq!((end.cause, Some(end.boot_id)), (EndCause::AgentLost, first.boot_id));
    });
}

#[test]
fn beats_keep_it_alive_and_are_written_with_their_boot() {
    simulate(|world| async move {
        let detail = world.create(detached("web")).await;
        world.turn(30_000).await;
        assert_eq!(world.state("web").await, Some(SandboxState::Running));
        let path = world.directory.path().join("sandboxes/web/heartbeat.json");
        let mut text = Vec::new();
        for _ in 0..2_000 {
            text = std::fs::read(&path).unwrap_or_default();
            if !text.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let beat: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(beat["boot_id"], detail.boot_id.unwrap().to_string());
        // A file of an earlier boot never survives into the next one's start.
        world.daemon.stop(&name("web"), None, false).await.unwrap();
        std::fs::write(&path, r#"{"boot_id":"stale","sequence":99999}"#).unwrap();
        world.launcher.fault(|faults| (faults.silent_boot, faults.boot_ms) = (true, 10_000));
        let starting = {
            let daemon = world.daemon.clone();
            tokio::task::spawn_local(async move { daemon.start(&name("web"), false).await })
        };
        world.until("web", SandboxState::Starting).await;
        while world.launcher.launched() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        world.turn(10_000).await;
        // The thread that writes them may be behind, but never for good.
        for _ in 0..2_000 {
            if !path.exists() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(!path.exists());
        assert_eq!(
            world.state("web").await,
            Some(SandboxState::Starting),
            "nothing of the old boot counts during a boot of 10 s"
        );
        world.launcher.ready("web");
        starting.await.unwrap().unwrap();
    });
}

#[test]
fn idle_with_restart_runs_under_three_successive_boot_ids() {
    simulate(|world| async move {
        world.create(SandboxSpec { idle_timeout_ms: Some(5_000), on_idle: OnIdle::Restart, ..detached("web") }).await;
        for boots in 2..=3 {
            world.turn(5_000).await;
            for _ in 0..5_000 {
                if world.launcher.boots().len() == boots && world.state("web").await == Some(SandboxState::Running) {
                    break;
                }
                world.clock.turn(1);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        let boots: BTreeSet<_> = world.launcher.boots().into_iter().collect();
        assert_eq!(boots.len(), 3);
    });
}

#[test]
fn idleness_puts_to_sleep_activity_prevents_it_and_exec_wakes() {
    simulate(|world| async move {
        world
            .create(SandboxSpec { idle_timeout_ms: Some(5_000), restart: RestartPolicy::Always, ..detached("web") })
            .await;
        let exec = |argv: &str| OpenKind::Exec(ExecConfig { argv: words(argv).unwrap(), ..ExecConfig::default() });
        let session = world.daemon.open(&name("web"), exec("cat"), ActivityKind::Exec).await.unwrap();
        world.turn(20_000).await;
        assert_eq!(world.state("web").await, Some(SandboxState::Running), "a session is activity");
        drop(session);
        world.turn(4_000).await;
        world.daemon.touch(&name("web")).await.unwrap();
        world.turn(4_000).await;
        let detail = world.daemon.inspect(&name("web")).await.unwrap();
        assert_eq!((detail.summary.status, detail.last_activity.as_deref()), (SandboxState::Running, Some("touch")));
        assert!(detail.idle_for_ms.unwrap() >= 4_000 && detail.stops_in_ms.unwrap() <= 1_000);
        // Looking at it, as just done, is none.
        world.turn(2_000).await;
        let asleep = world.until("web", SandboxState::Asleep).await;
        assert_eq!(asleep.summary.last_end.unwrap().cause, EndCause::Idle);
        let session = world.daemon.open(&name("web"), exec("echo awake"), ActivityKind::Exec).await.unwrap();
        assert_eq!(world.state("web").await, Some(SandboxState::Running));
        drop(session);
        world.daemon.stop(&name("web"), None, false).await.unwrap();
        let refused = world.daemon.open(&name("web"), exec("echo"), ActivityKind::Exec).await;
        assert_eq!(refused.err().unwrap().code, ErrorCode::SandboxNotRunning);
    });
}

#[test]
fn an_ssh_login_wakes_a_sandbox_and_its_session_keeps_it_awake() {
    use msb_ssh::client::{self, Heard, OneTimeKey, Request};
    simulate(|world| async move {
        let web = name("web");
        world.create(SandboxSpec { idle_timeout_ms: Some(5_000), ..detached("web") }).await;
        let host = world.daemon.ssh_host(&web).await.unwrap();
        assert_eq!((host.user.as_str(), host.sandbox.as_str()), ("root", "web"));
        world.turn(6_000).await;
        world.until("web", SandboxState::Asleep).await;

        let (forwarder, key) = (world.daemon.ssh(&web).await.unwrap(), OneTimeKey::generate().unwrap());
        assert!(forwarder.keys(Some("no key")).await.is_err());
        let keys = forwarder.keys(Some(&key.public_line())).await.unwrap();
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let serving = tokio::spawn({
            let forwarder = forwarder.clone();
            async move { forwarder.serve(theirs, keys, "test").await }
        });
        let request = Request { line: Some("cat".into()), ..Request::default() };
        let (mut ear, mouth) = client::start(ours, &host.host_key, key, &host.user, request).await.unwrap();
        mouth.write("to and fro".into()).await.unwrap();
        assert_eq!(ear.next().await, Some(Heard::Stdout("to and fro".into())));
        let detail = world.daemon.inspect(&web).await.unwrap();
        assert_eq!((detail.summary.status, detail.last_activity.as_deref()), (SandboxState::Running, Some("ssh")));
        world.turn(20_000).await;
        assert_eq!(world.state("web").await, Some(SandboxState::Running), "a session is activity");
        mouth.finish().await.unwrap();
        assert_eq!(ear.next().await, Some(Heard::Exited(0)));
        assert_eq!(ear.next().await, None);
        // The connection is still there, and no activity.
        world.turn(6_000).await;
        world.until("web", SandboxState::Asleep).await;

        // A stranger's key is no key, and the host key is the sandbox's for as long as it exists.
        assert!(world.daemon.authorize("ssh-rsa AAAA".into()).await.is_err());
        let line = OneTimeKey::generate().unwrap().public_line();
        assert_eq!(world.daemon.authorize(line.clone()).await.unwrap().added.len(), 1);
        assert_eq!(world.daemon.authorize(line).await.unwrap().added.len(), 0);
        assert_eq!(world.daemon.authorized_keys().await.unwrap().len(), 1);
        drop((ear, mouth, forwarder));
        tokio::time::timeout(Duration::from_secs(60), serving).await.unwrap().unwrap();
        let world = world.restart_daemon().await;
        assert_eq!(world.daemon.ssh_host(&web).await.unwrap().host_key, host.host_key);

        // A connection ends with its sandbox.
        let (forwarder, key) = (world.daemon.ssh(&web).await.unwrap(), OneTimeKey::generate().unwrap());
        let keys = forwarder.keys(Some(&key.public_line())).await.unwrap();
        let (_ours, theirs) = tokio::io::duplex(64 << 10);
        let serving = tokio::spawn(async move { forwarder.serve(theirs, keys, "test").await });
        world.daemon.remove(&web, true).await.unwrap();
        assert_eq!(world.daemon.ssh_host(&web).await.unwrap_err().code, ErrorCode::SandboxNotFound);
        tokio::time::timeout(Duration::from_secs(60), serving).await.unwrap().unwrap();
    });
}

#[test]
fn a_maximum_duration_ends_with_a_flush() {
    simulate(|world| async move {
        world
            .create(SandboxSpec { max_duration_ms: Some(60_000), restart: RestartPolicy::Always, ..detached("web") })
            .await;
        world.turn(59_000).await;
        assert_eq!(world.state("web").await, Some(SandboxState::Running));
        world.turn(2_000).await;
        let stopped = world.until("web", SandboxState::Stopped).await;
        let end = stopped.summary.last_end.unwrap();
        assert_eq!((end.cause, end.process), (EndCause::MaxDuration, Some(ProcessEnd::signalled(15))));
    });
}

#[test]
fn a_vm_that_ignores_everything_but_the_last_kill_is_gone_in_the_end() {
    simulate(|world| async move {
        world.launcher.fault(|faults| (faults.deaf, faults.stubborn_kills) = (true, 1));
        world.create(detached("web")).await;
        let stopping = {
            let daemon = world.daemon.clone();
            tokio::task::spawn_local(async move { daemon.stop(&name("web"), Some(2_000), false).await })
        };
        world.until("web", SandboxState::Draining).await;
        world.turn(2_250).await;
        world.until("web", SandboxState::Stopping).await;
        assert_eq!(world.daemon.start(&name("web"), false).await.unwrap_err().code, ErrorCode::SandboxBusy);
        world.turn(13_000).await;
        let detail = stopping.await.unwrap().unwrap();
        assert_eq!(detail.summary.last_end.unwrap().cause, EndCause::Killed);
        assert_eq!(world.launcher.alive(), 0);
    });
}

#[test]
fn a_creators_death_stops_what_is_attached_and_removes_what_is_ephemeral() {
    simulate(|world| async move {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let attached = |text: &str| SandboxSpec { detached: false, ..detached(text) };
        for spec in
            [attached("named"), SandboxSpec { ephemeral: true, ..attached("ephemeral") }, attached("detached-later")]
        {
            world.daemon.create(request(spec), Some(creator(&child))).await.unwrap();
        }
        world.daemon.detach(&name("detached-later")).await.unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let stopped = world.until("named", SandboxState::Stopped).await;
        assert_eq!(stopped.summary.last_end.unwrap().cause, EndCause::CreatorGone);
        world.until_gone("ephemeral").await;
        assert_eq!(world.state("detached-later").await, Some(SandboxState::Running));
        let events = world.daemon.surroundings().journal.events_after(0, 1_000).await;
        assert!(events.iter().any(|event| event.sandbox == name("named") && event.actor == "creator"));
        assert!(events.windows(2).all(|pair| pair[1].sequence == pair[0].sequence + 1), "numbers have no gaps");
    });
}

#[test]
fn a_creator_that_dies_while_the_daemon_is_away_is_noticed_by_the_next_one() {
    simulate(|world| async move {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let spec = SandboxSpec { detached: false, ..detached("named") };
        world.daemon.create(request(spec), Some(creator(&child))).await.unwrap();
        let world = world.restart_daemon().await;
        world.until("named", SandboxState::Running).await;
        let world = world.restart_daemon().await;
        child.kill().unwrap();
        child.wait().unwrap();
        world.until("named", SandboxState::Stopped).await;
        assert_eq!(world.launcher.alive(), 0);
    });
}

#[test]
fn five_hundred_creators_dying_at_once() {
    simulate(|world| async move {
        let mut children = Vec::new();
        for number in 0..500 {
            let child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
            let spec = SandboxSpec { detached: false, ephemeral: true, ..detached(&format!("s{number}")) };
            world.daemon.create(request(spec), Some(creator(&child))).await.unwrap();
            children.push(child);
        }
        assert_eq!(world.launcher.alive(), 500);
        for child in &mut children {
            child.kill().unwrap();
        }
        for child in &mut children {
            child.wait().unwrap();
        }
        for _ in 0..20_000 {
            if world.daemon.list(&[]).await.unwrap().is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(world.daemon.list(&[]).await.unwrap().is_empty());
        assert_eq!(world.launcher.alive(), 0);
    });
}

#[test]
fn a_machine_that_is_ready_before_its_launch_has_returned_is_not_missed() {
    simulate(|world| async move {
        // Its one word about being ready comes early; a sandbox that missed it stayed `starting` for ever.
        world.launcher.fault(|faults| (faults.silent_boot, faults.early_ready) = (true, true));
        let detail = world.create(detached("early")).await;
        assert_eq!(detail.summary.status, SandboxState::Running);
    });
}

#[test]
fn a_daemon_killed_in_each_phase_finds_the_truth_and_nothing_half_made_survives() {
    simulate(|mut world| async move {
        // Running, resting, asleep-to-be: adopted as they are.
        let boot = world.create(detached("running")).await.boot_id;
        world.create(detached("resting")).await;
        world.daemon.stop(&name("resting"), None, false).await.unwrap();
        world.create(detached("dies-meanwhile")).await;
        world.create(SandboxSpec { restart: RestartPolicy::No, ..detached("dies-for-good") }).await;
        // Booting: the VM exists, its agent is not ready.
        world.launcher.fault(|faults| faults.silent_boot = true);
        let daemon = world.daemon.clone();
        let booting = tokio::task::spawn_local(async move {
            daemon
                .create(
                    CreateRequest {
                        spec: detached("booting"),
                        hold_main: false,
                        replace_grace_ms: None,
                        pull: PullPolicy::IfMissing,
                    },
                    None,
                )
                .await
        });
        world.until("booting", SandboxState::Starting).await;
        while world.launcher.spec_of("booting").is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        world.launcher.fault(|faults| faults.silent_boot = false);
        world.daemon.let_go().await;
        world.launcher.crash("dies-meanwhile", EndCause::VmmCrash);
        world.launcher.crash("dies-for-good", EndCause::GuestPanic);
        tokio::time::sleep(Duration::from_millis(20)).await;
        world = world.restart_daemon().await;
        booting.abort();
        let running = world.until("running", SandboxState::Running).await;
        assert_eq!(running.boot_id, boot);
        world.until("resting", SandboxState::Stopped).await;
        world.until("dies-for-good", SandboxState::Crashed).await;
        world.until("dies-meanwhile", SandboxState::Restarting).await;
        world.turn(250).await;
        world.until("dies-meanwhile", SandboxState::Running).await;
        world.until("booting", SandboxState::Running).await;

        // A VM that was never launched: the record says starting, no process exists.
        world.daemon.let_go().await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        world = world.restart_daemon().await;
        assert_eq!(world.launcher.alive(), 3);
    });
}

#[test]
fn a_panicking_actor_is_made_again_with_the_same_vm_and_a_living_session() {
    simulate(|world| async move {
        let boot = world.create(detached("web")).await.boot_id;
        let (mut session, _guard) = {
            let exec = OpenKind::Exec(ExecConfig { argv: vec!["cat".into()], ..ExecConfig::default() });
            world.daemon.open(&name("web"), exec, ActivityKind::Exec).await.unwrap()
        };
        for deaths in 1..=3u32 {
            let address = loop {
                if let Some(address) = world.daemon.find(&name("web")).await.unwrap().address {
                    break address;
                }
                world.clock.turn(100);
                tokio::time::sleep(Duration::from_millis(1)).await;
            };
            assert!(address.send(PanicNow).await.is_err());
            loop {
                world.clock.turn(10);
                tokio::time::sleep(Duration::from_millis(1)).await;
                let tree = world.daemon.actors().await.unwrap();
                let row = tree.actors.iter().find(|row| row.name == "sandbox/web").unwrap();
                if row.restarts == deaths && row.state == "running" {
                    assert!(row.last_cause.is_some());
                    break;
                }
            }
        }
        let detail = world.until("web", SandboxState::Running).await;
        assert_eq!((detail.boot_id, world.launcher.launched()), (boot, 1));
        use msb_protocol::guest::{Data, GuestBody, HostBody};
        session.writer.send(HostBody::Stdin(Data { data: b"still here".to_vec() })).await.unwrap();
        loop {
            if let GuestBody::Output(output) = session.reader.next().await.unwrap().unwrap() {
                assert_eq!(output.data, b"still here");
                break;
            }
        }
        world.daemon.stop(&name("web"), None, false).await.unwrap();
        assert_eq!(world.launcher.alive(), 0);
    });
}

#[test]
fn an_actor_that_keeps_dying_is_given_up_until_somebody_asks() {
    simulate(|world| async move {
        world.create(detached("web")).await;
        let mut seen = 0;
        'dying: for _ in 0..200_000 {
            let tree = world.daemon.actors().await.unwrap();
            let row = tree.actors.iter().find(|row| row.name == "sandbox/web").unwrap();
            seen = row.restarts;
            if row.state.starts_with("given up") {
                break 'dying;
            }
            if row.state == "running"
                && let Some(address) = world.daemon.find(&name("web")).await.unwrap().address
            {
                // The death is the point, not the answer.
                let _ = address.send(PanicNow).await;
            }
            // Slow enough for nothing, fast enough that all deaths fall into one window of counting.
            if world.clock.now_ms() < 50_000 {
                world.clock.turn(1);
            }
            tokio::task::yield_now().await;
        }
        assert!(seen >= 9, "{seen}");
    });
}

/// What this actix version does when a handler panics; the whole of `supervisor.rs` stands on it.
#[test]
fn actix_lets_a_panicking_actor_vanish_without_a_word() {
    struct Fragile;
    impl Actor for Fragile {
        type Context = Context<Self>;
    }
    impl Supervised for Fragile {}
    struct Break;
    impl Message for Break {
        type Result = u8;
    }
    impl Handler<Break> for Fragile {
        type Result = u8;
        fn handle(&mut self, _: Break, _: &mut Self::Context) -> u8 {
            panic!("asked to")
        }
    }
    System::new().block_on(async {
        let plain = Fragile.start();
        let supervised = Supervisor::start(|_| Fragile);
        let sibling = Fragile.start();
        for address in [plain, supervised] {
            assert!(matches!(address.send(Break).await, Err(MailboxError::Closed)));
            assert!(matches!(address.send(Break).await, Err(MailboxError::Closed)), "nobody makes it again");
        }
        assert!(sibling.connected(), "siblings live");
    });
}

#[test]
fn a_thousand_idle_restarts_use_a_thousand_boots_and_no_two_vms() {
    simulate(|world| async move {
        world.launcher.fault(|faults| faults.no_beats = true);
        world.create(SandboxSpec { idle_timeout_ms: Some(1_000), on_idle: OnIdle::Restart, ..detached("web") }).await;
        while world.launcher.boots().len() <= 1_000 {
            world.clock.turn(50);
            assert!(world.launcher.alive() <= 1);
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        let boots = world.launcher.boots();
        assert_eq!(boots.iter().collect::<BTreeSet<_>>().len(), boots.len());
    });
}

#[test]
fn a_wall_clock_that_jumps_a_day_changes_nothing() {
    simulate(|world| async move {
        world
            .create(SandboxSpec { idle_timeout_ms: Some(60_000), max_duration_ms: Some(120_000), ..detached("web") })
            .await;
        for jump in [86_400_000, -2 * 86_400_000] {
            world.clock.jump_wall(jump);
            world.turn(5_000).await;
            assert_eq!(world.state("web").await, Some(SandboxState::Running));
        }
        assert_eq!(world.launcher.launched(), 1);
    });
}

#[test]
fn samples_are_told_while_a_run_lives_and_its_last_ones_after_it() {
    use msb_actors::metrics::snapshot::Choice;
    simulate(|world| async move {
        let spec = SandboxSpec { labels: [("team".to_owned(), "ml".to_owned())].into(), ..detached("web") };
        world.create(spec).await;
        world.turn(10_000).await;
        let all = Choice::default();
        let snapshot = world.daemon.metrics(&all).await.unwrap();
        let row = &snapshot.sandboxes[0];
        assert!((row.cpu_utilization - 0.5).abs() < 1e-6 && !row.last, "{row:?}");
        assert_eq!(snapshot.states["running"], 1);
        let history = world.daemon.metrics_history(&name("web"), u64::MAX, 1_000).await.unwrap();
        assert!(history.points.len() >= 8, "{}", history.points.len());
        assert!(history.points.iter().skip(1).all(|point| (point.cpu_utilization - 0.5).abs() < 1e-6));
        let other = Choice { names: vec![name("other")], ..Choice::default() };
        assert!(world.daemon.metrics(&other).await.unwrap().sandboxes.is_empty());

        let stopping = world.daemon.clone();
        let stop = tokio::task::spawn_local(async move { stopping.stop(&name("web"), None, true).await });
        while !stop.is_finished() {
            world.turn(250).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let row = world.daemon.metrics(&all).await.unwrap().sandboxes.remove(0);
        assert!(row.last && row.vmm_pid == 0 && row.status == SandboxState::Stopped, "{row:?}");
        world.daemon.remove(&name("web"), false).await.unwrap();
        let row = world.daemon.metrics(&all).await.unwrap().sandboxes.remove(0);
        assert!(row.last && row.labels["team"] == "ml", "{row:?}");
        world.turn(121_000).await;
        assert!(world.daemon.metrics(&all).await.unwrap().sandboxes.is_empty());
    });
}

/// What a fleet costs. Prints; asserts only what no busy machine changes.
#[test]
fn a_thousand_sandboxes_are_told_in_one_request() {
    use msb_actors::metrics::snapshot::Choice;
    simulate(|world| async move {
        let creating = (0..1_000).map(|number| world.create(detached(&format!("s{number}"))));
        futures_util::future::join_all(creating).await;
        world.turn(5_000).await;
        let begin = std::time::Instant::now();
        let snapshot = world.daemon.metrics(&Choice::default()).await.unwrap();
        let (taken, begin) = (begin.elapsed(), std::time::Instant::now());
        let text = serde_json::to_string(&snapshot).unwrap();
        println!("1,000 sandboxes: snapshot {taken:?}, JSON {:?}, {} bytes", begin.elapsed(), text.len());
        assert_eq!(snapshot.sandboxes.len(), 1_000);
        assert!(text.len() < 2 << 20, "{} bytes", text.len());
    });
}
