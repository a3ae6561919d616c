//! The machine's table as a snapshot, its rules as cases, its invariants as properties.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use proptest::prelude::*;

use super::*;

fn boot(number: u128) -> BootId {
    BootId(uuid::Uuid::from_u128(number))
}

fn at(now_ms: u64) -> Moment {
    Moment { now_ms, next_boot_id: boot(2) }
}

fn policy() -> Policy {
    Policy {
        restart: RestartPolicy::Default,
        on_idle: OnIdle::Stop,
        idle_timeout_ms: Some(5_000),
        max_duration_ms: Some(60_000),
        stop_grace_ms: 8_000,
        ephemeral: false,
        pre_stop_ms: None,
    }
}

fn run() -> Run {
    Run { boot_id: boot(1), hold_main: false, by_policy: false, wakes: None }
}

fn all_states() -> Vec<(&'static str, State)> {
    let starting = |phase, abandon| State::Starting { run: run(), phase, abandon };
    vec![
        ("created", State::Created),
        ("starting/planned", starting(StartPhase::Planned, None)),
        ("starting/image_leased", starting(StartPhase::ImageLeased, None)),
        ("starting/disks_made", starting(StartPhase::DisksMade, None)),
        ("starting/disks_made, abandoned", starting(StartPhase::DisksMade, Some(EndCause::StopRequested))),
        ("starting/vm_spawned", starting(StartPhase::VmSpawned, None)),
        (
            "starting/vm_spawned, from memory",
            State::Starting { run: Run { wakes: Some(boot(9)), ..run() }, phase: StartPhase::VmSpawned, abandon: None },
        ),
        ("running", State::Running { run: run(), ready_at_ms: 0 }),
        ("paused", State::Paused { run: run(), ready_at_ms: 0 }),
        ("suspending", State::Suspending { run: run(), ready_at_ms: 0, until_ms: 120_000 }),
        (
            "pre_stop/idle",
            State::PreStop {
                run: run(),
                cause: EndCause::Idle,
                then: Then::Settle,
                grace_ms: 8_000,
                until_ms: 10_000,
                ran_ms: 0,
            },
        ),
        (
            "draining/idle",
            State::Draining { run: run(), cause: EndCause::Idle, then: Then::Settle, until_ms: 8_000, ran_ms: 0 },
        ),
        ("stopping/stop_requested", stopping(run(), EndCause::StopRequested, Then::Settle, 8_000, 0)),
        ("stopping/completed", stopping(run(), EndCause::Completed, Then::Settle, 8_000, 0)),
        ("stopping/idle, then sleep", stopping(run(), EndCause::Idle, Then::Sleep, 8_000, 0)),
        ("stopped", State::Stopped),
        ("asleep", State::Asleep { memory: None }),
        ("asleep, with memory", State::Asleep { memory: Some(boot(9)) }),
        ("restarting", State::Restarting { at_ms: 10_000 }),
        ("crashed", State::Crashed),
        ("recovering/running", State::Recovering { run: run(), shown: SandboxState::Running, ending: None }),
        (
            "recovering/stopping",
            State::Recovering {
                run: run(),
                shown: SandboxState::Stopping,
                ending: Some((EndCause::StopRequested, Then::Settle)),
            },
        ),
        ("removed", State::Removed),
    ]
}

fn all_events() -> Vec<(&'static str, Event)> {
    vec![
        ("start", Event::Start { by: By::User, hold_main: false }),
        ("image leased", Event::PhaseDone(StartPhase::ImageLeased)),
        ("disks made", Event::PhaseDone(StartPhase::DisksMade)),
        ("vm spawned", Event::PhaseDone(StartPhase::VmSpawned)),
        ("phase failed", Event::PhaseFailed),
        ("agent ready", Event::AgentReady),
        ("suspended", Event::Suspended),
        ("suspend failed", Event::SuspendFailed),
        ("main exited", Event::MainExited),
        ("vm ended: completed", Event::VmEnded { cause: EndCause::Completed, success: true }),
        ("vm ended: idle", Event::VmEnded { cause: EndCause::Idle, success: false }),
        ("vm ended: vmm_crash", Event::VmEnded { cause: EndCause::VmmCrash, success: false }),
        ("stop", Event::Stop { grace_ms: None, then: Then::Settle }),
        ("restart", Event::Stop { grace_ms: None, then: Then::Start }),
        ("host stop", Event::HostStop),
        ("kill", Event::Kill),
        ("creator gone", Event::CreatorGone),
        ("unhealthy", Event::Unhealthy),
        ("hook done", Event::HookDone),
        ("agent silent", Event::AgentSilent),
        ("tick, nothing due", Event::Tick { last_activity_ms: None }),
        ("tick, all due", Event::Tick { last_activity_ms: Some(0) }),
        ("remove", Event::Remove { force: false }),
        ("remove by force", Event::Remove { force: true }),
        ("paused", Event::Paused),
        ("resumed", Event::Resumed),
        ("adopted", Event::Adopted { ready: true, paused: false }),
        ("adopted, paused", Event::Adopted { ready: true, paused: true }),
    ]
}

fn machine_in(state: State) -> Machine {
    let ever_spawned = !matches!(state, State::Created | State::Starting { .. });
    Machine { state, ever_spawned, ..Machine::new(policy(), false) }
}

fn show_effects(effects: &[Effect]) -> String {
    let words: Vec<String> = effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Record { .. } => None,
            Effect::RunHook => Some("run_hook".into()),
            Effect::ResumeVm => Some("resume_vm".into()),
            Effect::Suspend => Some("suspend".into()),
            Effect::GoOn => Some("go_on".into()),
            Effect::Shutdown { cause, .. } => Some(format!("shutdown({})", cause.as_str())),
            Effect::KillVm { cause } => Some(format!("kill_vm({})", cause.as_str())),
            Effect::EndRun { cause, .. } => Some(format!("end_run({})", cause.as_str())),
            Effect::LeaseImage => Some("lease_image".into()),
            Effect::MakeDisks => Some("make_disks".into()),
            Effect::SpawnVm => Some("spawn_vm".into()),
            Effect::ReleaseImage => Some("release_image".into()),
            Effect::RemoveFiles => Some("remove_files".into()),
            Effect::FailStart => Some("fail_start".into()),
            Effect::Adopt => Some("adopt".into()),
        })
        .collect();
    words.join(" ")
}

fn show_then(then: Then) -> &'static str {
    match then {
        Then::Start => ", then start",
        Then::Sleep => ", then sleep",
        Then::Wake => ", then wake",
        Then::Settle | Then::Park => "",
    }
}

fn show_state(machine: &Machine) -> String {
    match machine.state {
        State::Starting { run, phase, abandon } => {
            format!(
                "starting/{}{}{}",
                serde_json::to_value(phase).unwrap().as_str().unwrap(),
                if run.wakes.is_some() { ", from memory" } else { "" },
                if abandon.is_some() { ", abandoned" } else { "" }
            )
        }
        State::PreStop { cause, then, .. } => format!("pre_stop/{}{}", cause.as_str(), show_then(then)),
        State::Draining { cause, then, .. } => format!("draining/{}{}", cause.as_str(), show_then(then)),
        State::Stopping { cause, then, .. } => format!("stopping/{}{}", cause.as_str(), show_then(then)),
        State::Suspending { .. } => "suspending".into(),
        State::Asleep { memory: Some(_) } => "asleep, with memory".into(),
        State::Recovering { shown, .. } => format!("recovering/{}", shown.as_str()),
        State::Removed => "removed".into(),
        _ => machine.shown().as_str().into(),
    }
}

/// The whole table: an attached, named sandbox with an idle timeout of 5 s and a maximum duration of 60 s.
fn table() -> String {
    let mut text = String::from("| in state | on | goes to | and does |\n|---|---|---|---|\n");
    for (state_name, state) in all_states() {
        for (event_name, event) in all_events() {
            let mut machine = machine_in(state);
            // `nothing due` is early; everything else happens late enough for every limit but the maximum duration.
            let now_ms = if event_name == "tick, nothing due" { 1 } else { 20_000 };
            let outcome = machine.step(event, at(now_ms));
            let (to, does) = match outcome {
                Ok(effects) if effects.is_empty() && machine.state == state => continue,
                Ok(effects) => (show_state(&machine), show_effects(&effects)),
                Err(denial) => ("refused".into(), denial.to_string()),
            };
            writeln!(text, "| {state_name} | {event_name} | {to} | {does} |").unwrap();
        }
    }
    text
}

#[test]
fn the_whole_table() {
    insta::assert_snapshot!("table", table());
}

#[test]
fn the_documentation_has_this_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/lifecycle.md");
    let begin = "<!-- table of actors/src/sandbox/machine.rs -->\n";
    let end = "<!-- end of table -->\n";
    let document = std::fs::read_to_string(path).expect("docs/lifecycle.md");
    let (head, rest) = document.split_once(begin).expect("the table's beginning");
    let (body, tail) = rest.split_once(end).expect("the table's end");
    if std::env::var_os("MSB_UPDATE_DOCS").is_some() {
        std::fs::write(path, format!("{head}{begin}{}{end}{tail}", table())).unwrap();
        return;
    }
    assert!(body == table(), "docs/lifecycle.md is not what the machine does; write it anew with MSB_UPDATE_DOCS=1");
}

/// Drives a machine from `created` up to `running`.
fn running(policy: Policy, detached: bool) -> Machine {
    let mut machine = Machine::new(policy, detached);
    machine.step(Event::Start { by: By::User, hold_main: false }, at(0)).unwrap();
    bring_up(&mut machine, 0);
    machine
}

fn bring_up(machine: &mut Machine, now_ms: u64) {
    for phase in [StartPhase::ImageLeased, StartPhase::DisksMade, StartPhase::VmSpawned] {
        machine.step(Event::PhaseDone(phase), at(now_ms)).unwrap();
    }
    machine.step(Event::AgentReady, at(now_ms)).unwrap();
    assert_eq!(machine.shown(), SandboxState::Running);
}

fn ended(cause: EndCause, success: bool) -> Event {
    Event::VmEnded { cause, success }
}

#[test]
fn what_follows_an_end_is_what_docker_says() {
    use RestartPolicy::{Always, Default as Standard, No, OnFailure, UnlessStopped};
    let three = OnFailure { max_retries: Some(3) };
    for (restart, detached, cause, success, expected) in [
        (Standard, true, EndCause::Completed, false, SandboxState::Stopped),
        (Standard, true, EndCause::VmmCrash, false, SandboxState::Restarting),
        (Standard, false, EndCause::VmmCrash, false, SandboxState::Crashed),
        (No, true, EndCause::VmmCrash, false, SandboxState::Crashed),
        (No, true, EndCause::Completed, true, SandboxState::Stopped),
        (three, true, EndCause::Completed, true, SandboxState::Stopped),
        (three, true, EndCause::Completed, false, SandboxState::Restarting),
        (three, false, EndCause::GuestPanic, false, SandboxState::Restarting),
        (Always, true, EndCause::Completed, true, SandboxState::Restarting),
        (UnlessStopped, true, EndCause::Completed, true, SandboxState::Restarting),
        (Always, true, EndCause::StopRequested, true, SandboxState::Stopped),
        (Always, true, EndCause::Idle, true, SandboxState::Asleep),
        (Always, true, EndCause::MaxDuration, true, SandboxState::Stopped),
        (Always, true, EndCause::HostShutdown, false, SandboxState::Restarting),
        (Standard, true, EndCause::HostShutdown, false, SandboxState::Stopped),
    ] {
        let mut machine = running(Policy { restart, ..policy() }, detached);
        machine.step(ended(cause, success), at(10)).unwrap();
        assert_eq!(machine.shown(), expected, "{restart:?} {detached} {cause:?} {success}");
    }
}

#[test]
fn the_crash_budget_is_five_with_doubling_waits_and_steady_running_resets_it() {
    let mut machine = running(Policy { max_duration_ms: None, idle_timeout_ms: None, ..policy() }, true);
    let mut now = 0;
    for failure in 0..CRASH_BUDGET {
        machine.step(ended(EndCause::VmmCrash, false), at(now)).unwrap();
        let State::Restarting { at_ms } = machine.state else { panic!("{:?}", machine.state) };
        assert_eq!(at_ms - now, 100 << failure);
        assert!(machine.step(Event::Tick { last_activity_ms: None }, at(at_ms - 1)).unwrap().is_empty());
        now = at_ms;
        machine.step(Event::Tick { last_activity_ms: None }, at(now)).unwrap();
        bring_up(&mut machine, now);
        assert_eq!(machine.restarts(), failure + 1);
    }
    let mut spent = machine.clone();
    spent.step(ended(EndCause::VmmCrash, false), at(now + STEADY_AFTER_MS - 1)).unwrap();
    assert_eq!(spent.shown(), SandboxState::Crashed);
    machine.step(ended(EndCause::VmmCrash, false), at(now + STEADY_AFTER_MS)).unwrap();
    assert_eq!(machine.state, State::Restarting { at_ms: now + STEADY_AFTER_MS + BACK_OFF_FIRST_MS });
}

#[test]
fn waits_double_to_a_minute() {
    assert_eq!([0, 1, 2, 9, 10, 40].map(back_off_ms), [100, 200, 400, 51_200, 60_000, 60_000]);
}

#[test]
fn idleness_counts_from_the_later_of_ready_and_activity_and_never_during_activity() {
    let mut machine = running(policy(), true);
    assert_eq!(machine.deadline_ms(Some(2_000)), Some(7_000));
    assert_eq!(machine.deadline_ms(None), Some(60_000));
    assert!(machine.step(Event::Tick { last_activity_ms: None }, at(50_000)).unwrap().is_empty());
    assert!(machine.step(Event::Tick { last_activity_ms: Some(46_000) }, at(50_000)).unwrap().is_empty());
    let effects = machine.step(Event::Tick { last_activity_ms: Some(45_000) }, at(50_000)).unwrap();
    assert!(effects.contains(&Effect::Shutdown { cause: EndCause::Idle, grace_ms: 8_000 }));
    machine.step(ended(EndCause::Completed, true), at(50_010)).unwrap();
    assert_eq!(machine.shown(), SandboxState::Asleep);
    machine.step(Event::Start { by: By::Supervisor, hold_main: false }, at(60_000)).unwrap();
    assert_eq!(machine.shown(), SandboxState::Starting);
}

#[test]
fn a_crash_during_a_wanted_stop_is_told_and_not_restarted() {
    let mut machine = running(policy(), true);
    machine.step(Event::Stop { grace_ms: None, then: Then::Settle }, at(1)).unwrap();
    let effects = machine.step(ended(EndCause::GuestPanic, false), at(2)).unwrap();
    assert!(effects.contains(&Effect::EndRun { boot_id: boot(2), cause: EndCause::GuestPanic }));
    assert_eq!(machine.shown(), SandboxState::Stopped);
}

#[test]
fn a_pre_stop_hook_comes_before_every_stop_but_a_forced_one_and_has_its_own_time() {
    let hooked = Policy { pre_stop_ms: Some(3_000), restart: RestartPolicy::Always, ..policy() };
    for (event, now_ms, cause) in [
        (Event::Stop { grace_ms: Some(2_000), then: Then::Settle }, 1_000, EndCause::StopRequested),
        (Event::CreatorGone, 1_000, EndCause::CreatorGone),
        (Event::Unhealthy, 1_000, EndCause::Unhealthy),
        (Event::Tick { last_activity_ms: Some(0) }, 5_000, EndCause::Idle),
        (Event::Tick { last_activity_ms: None }, 60_000, EndCause::MaxDuration),
    ] {
        let grace_ms = if cause == EndCause::StopRequested { 2_000 } else { 8_000 };
        let mut machine = running(hooked.clone(), false);
        let effects = machine.step(event, at(now_ms)).unwrap();
        assert!(effects.contains(&Effect::RunHook) && !effects.iter().any(|e| matches!(e, Effect::Shutdown { .. })));
        assert_eq!((machine.shown(), machine.deadline_ms(None)), (SandboxState::Draining, Some(now_ms + 3_000)));
        // Its end or the end of its time: the grace begins then.
        for (over, later) in [(Event::HookDone, 500), (Event::Tick { last_activity_ms: None }, 3_000)] {
            let mut machine = machine.clone();
            assert!(machine.step(Event::Tick { last_activity_ms: None }, at(now_ms + 499)).unwrap().is_empty());
            let effects = machine.step(over, at(now_ms + later)).unwrap();
            assert!(effects.contains(&Effect::Shutdown { cause, grace_ms }), "{cause:?} {effects:?}");
            assert_eq!(machine.deadline_ms(None), Some(now_ms + later + grace_ms));
            // A hook that ends late changes nothing.
            assert!(machine.step(Event::HookDone, at(now_ms + later)).unwrap().is_empty());
        }
    }
    let mut machine = running(hooked.clone(), true);
    assert!(machine.step(Event::Kill, at(1)).unwrap().contains(&Effect::KillVm { cause: EndCause::Killed }));
    // A stop during the hook of an idle stop is a person's from there on, and the hook does not begin again.
    let mut machine = running(hooked.clone(), true);
    machine.step(Event::Tick { last_activity_ms: Some(0) }, at(5_000)).unwrap();
    let effects = machine.step(Event::Stop { grace_ms: Some(1), then: Then::Settle }, at(5_001)).unwrap();
    assert!(!effects.contains(&Effect::RunHook));
    let effects = machine.step(Event::HookDone, at(5_002)).unwrap();
    assert!(effects.contains(&Effect::Shutdown { cause: EndCause::StopRequested, grace_ms: 1 }));
    // A new daemon does not know how far it came.
    let mut machine = running(hooked.clone(), true);
    machine.step(Event::Stop { grace_ms: None, then: Then::Settle }, at(1)).unwrap();
    let (mut machine, _) = Machine::recover(hooked, &machine.stored(), 500);
    assert!(machine.step(Event::Adopted { ready: true, paused: false }, at(500)).unwrap().contains(&Effect::RunHook));
}

#[test]
fn a_host_that_goes_down_flushes_and_the_next_daemon_brings_back_what_the_policy_wants() {
    use RestartPolicy::{Always, Default as Standard, UnlessStopped};
    for (restart, back) in [(Standard, false), (Always, true), (UnlessStopped, true)] {
        let policy = Policy { restart, ..policy() };
        let mut machine = running(policy.clone(), true);
        let effects = machine.step(Event::HostStop, at(1)).unwrap();
        assert!(effects.contains(&Effect::Shutdown { cause: EndCause::HostShutdown, grace_ms: 8_000 }));
        machine.step(ended(EndCause::Completed, true), at(2)).unwrap();
        assert!(machine.run().is_none());
        // Not by this daemon, however long it still lives.
        machine.step(Event::Tick { last_activity_ms: None }, at(1 << 40)).unwrap();
        assert!(machine.run().is_none(), "{restart:?}");
        let (mut machine, _) = Machine::recover(policy, &machine.stored(), 500);
        machine.step(Event::Tick { last_activity_ms: None }, at(500)).unwrap();
        assert_eq!(machine.run().is_some(), back, "{restart:?}");
    }
}

#[test]
fn ill_health_restarts_by_policy_and_is_only_shown_without_one() {
    use RestartPolicy::{Always, Default as Standard, No, OnFailure, UnlessStopped};
    for (restart, again) in [
        (Standard, false),
        (No, false),
        (OnFailure { max_retries: Some(1) }, true),
        (Always, true),
        (UnlessStopped, true),
    ] {
        let mut machine = running(Policy { restart, ..policy() }, true);
        let effects = machine.step(Event::Unhealthy, at(10)).unwrap();
        assert_eq!(effects.is_empty(), !again, "{restart:?}");
        if again {
            let effects = machine.step(ended(EndCause::Completed, true), at(20)).unwrap();
            assert!(effects.contains(&Effect::EndRun { boot_id: boot(2), cause: EndCause::Unhealthy }));
            assert_eq!(machine.state, State::Restarting { at_ms: 20 + BACK_OFF_FIRST_MS });
        } else {
            assert_eq!(machine.shown(), SandboxState::Running);
        }
    }
}

#[test]
fn a_restart_is_a_stop_and_then_a_start_with_a_new_run() {
    let mut machine = running(policy(), true);
    machine.step(Event::Stop { grace_ms: Some(1), then: Then::Start }, at(1)).unwrap();
    let effects =
        machine.step(ended(EndCause::StopRequested, true), Moment { now_ms: 2, next_boot_id: boot(3) }).unwrap();
    assert!(effects.contains(&Effect::LeaseImage));
    assert_eq!(machine.run().unwrap().boot_id, boot(3));
}

#[test]
fn a_first_start_that_fails_before_its_vm_leaves_nothing_and_a_later_one_keeps_the_sandbox() {
    for phases in 0..3 {
        let mut machine = Machine::new(policy(), true);
        machine.step(Event::Start { by: By::User, hold_main: false }, at(0)).unwrap();
        for phase in [StartPhase::ImageLeased, StartPhase::DisksMade].into_iter().take(phases) {
            machine.step(Event::PhaseDone(phase), at(0)).unwrap();
        }
        let effects = machine.step(Event::PhaseFailed, at(1)).unwrap();
        assert_eq!(machine.state, State::Removed);
        assert_eq!(effects.contains(&Effect::ReleaseImage), phases > 0);
        assert!(effects.ends_with(&[Effect::RemoveFiles]));
    }
    let mut machine = running(policy(), true);
    machine.step(ended(EndCause::Completed, true), at(1)).unwrap();
    machine.step(Event::Start { by: By::User, hold_main: false }, at(2)).unwrap();
    machine.step(Event::PhaseFailed, at(3)).unwrap();
    assert_eq!(machine.shown(), SandboxState::Crashed);
}

#[test]
fn an_ephemeral_sandbox_vanishes_at_its_end_but_not_in_its_sleep() {
    let ephemeral = Policy { ephemeral: true, ..policy() };
    for (cause, gone) in [
        (EndCause::Completed, true),
        (EndCause::VmmCrash, true),
        (EndCause::CreatorGone, true),
        (EndCause::Idle, false),
    ] {
        let mut machine = running(ephemeral.clone(), false);
        machine.step(ended(cause, true), at(1)).unwrap();
        assert_eq!(machine.state == State::Removed, gone, "{cause:?}");
    }
}

#[test]
fn a_recovered_record_looks_for_its_vm_and_goes_on_from_what_it_finds() {
    let live = running(policy(), true);
    let (mut machine, effects) = Machine::recover(policy(), &live.stored(), 500);
    assert_eq!((effects, machine.shown()), (vec![Effect::Adopt], SandboxState::Running));
    machine.step(Event::Adopted { ready: true, paused: false }, at(500)).unwrap();
    assert_eq!(machine.state, State::Running { run: live.run().unwrap(), ready_at_ms: 500 });

    let (mut machine, _) = Machine::recover(policy(), &live.stored(), 500);
    machine.step(ended(EndCause::VmmCrash, false), at(500)).unwrap();
    assert_eq!(machine.shown(), SandboxState::Restarting);

    let mut half = Machine::new(policy(), true);
    half.step(Event::Start { by: By::User, hold_main: false }, at(0)).unwrap();
    let (mut machine, _) = Machine::recover(policy(), &half.stored(), 500);
    let effects = machine.step(ended(EndCause::VmmCrash, false), at(500)).unwrap();
    assert_eq!(machine.state, State::Removed);
    assert!(effects.ends_with(&[Effect::RemoveFiles]));

    let (machine, _) = Machine::recover(
        Policy { restart: RestartPolicy::Always, ..policy() },
        &Stored { state: State::Stopped, ..live.stored() },
        500,
    );
    assert_eq!(machine.shown(), SandboxState::Restarting);
}

#[test]
fn a_paused_sandbox_is_neither_idle_nor_started_and_every_stop_resumes_it_first() {
    let mut machine = running(policy(), false);
    let since = machine.run();
    machine.step(Event::Paused, at(1_000)).unwrap();
    assert_eq!((machine.shown(), machine.run()), (SandboxState::Paused, since));
    // Idle after 5 s, over after 60 s: only the second counts.
    assert_eq!(machine.deadline_ms(Some(0)), Some(60_000));
    assert!(machine.step(Event::Tick { last_activity_ms: Some(0) }, at(50_000)).unwrap().is_empty());
    assert_eq!(machine.step(Event::Start { by: By::User, hold_main: false }, at(2_000)), Err(Denial::Paused));
    assert!(machine.step(Event::AgentSilent, at(2_000)).unwrap().is_empty());
    for (event, now_ms) in [
        (Event::Stop { grace_ms: None, then: Then::Settle }, 2_000),
        (Event::CreatorGone, 2_000),
        (Event::HostStop, 2_000),
        (Event::Tick { last_activity_ms: Some(0) }, 60_000),
    ] {
        let mut machine = machine.clone();
        let effects = machine.step(event, at(now_ms)).unwrap();
        assert!(
            matches!(effects[..], [Effect::Record { .. }, Effect::ResumeVm, Effect::Shutdown { .. }]),
            "{event:?} {effects:?}"
        );
        assert_eq!(machine.shown(), SandboxState::Draining);
    }
    let mut killed = machine.clone();
    assert!(killed.step(Event::Kill, at(2_000)).unwrap().contains(&Effect::KillVm { cause: EndCause::Killed }));
    let (mut adopted, _) = Machine::recover(policy(), &machine.stored(), 500);
    assert_eq!(adopted.shown(), SandboxState::Paused);
    adopted.step(Event::Adopted { ready: true, paused: true }, at(500)).unwrap();
    assert_eq!(adopted.shown(), SandboxState::Paused);
    machine.step(Event::Resumed, at(40_000)).unwrap();
    assert_eq!((machine.shown(), machine.run()), (SandboxState::Running, since));
    // A stop that came first wins: whoever halted the VM must let it go on.
    machine.step(Event::Stop { grace_ms: None, then: Then::Settle }, at(40_001)).unwrap();
    assert_eq!(machine.step(Event::Paused, at(40_002)), Err(Denial::Busy("draining")));
}

/// A machine that is about to sleep with its memory; the run that is written down.
fn suspending() -> (Machine, BootId) {
    let mut machine = running(Policy { on_idle: OnIdle::Suspend, pre_stop_ms: Some(1), ..policy() }, true);
    let run = machine.run().unwrap().boot_id;
    let effects = machine.step(Event::Tick { last_activity_ms: Some(0) }, at(5_000)).unwrap();
    assert!(effects.contains(&Effect::Suspend) && !effects.contains(&Effect::RunHook));
    assert_eq!((machine.memory(), machine.shown()), (Some(run), SandboxState::Stopping));
    (machine, run)
}

/// One that sleeps with it.
fn asleep() -> (Machine, BootId) {
    let (mut machine, run) = suspending();
    assert!(machine.step(Event::Suspended, at(5_001)).unwrap().contains(&Effect::KillVm { cause: EndCause::Idle }));
    machine.step(ended(EndCause::Idle, false), at(5_002)).unwrap();
    assert_eq!(machine.state, State::Asleep { memory: Some(run) });
    (machine, run)
}

#[test]
fn a_sandbox_goes_on_from_its_memory_once_and_boots_from_its_disk_if_that_fails() {
    let (asleep, run) = asleep();
    // Also after the service and the host were started anew.
    let policy = Policy { on_idle: OnIdle::Suspend, ..policy() };
    let (mut machine, effects) = Machine::recover(policy.clone(), &asleep.stored(), 0);
    assert!(effects.is_empty());
    let next = |now_ms, number| Moment { now_ms, next_boot_id: boot(number) };
    machine.step(Event::Start { by: By::User, hold_main: false }, next(6_000, 3)).unwrap();
    assert_eq!((machine.run().unwrap().wakes, machine.memory()), (Some(run), Some(run)));
    // A start that was under way with an earlier service, whose VM lives or is gone.
    let (mut lived, _) = Machine::recover(policy.clone(), &machine.stored(), 0);
    assert_eq!(lived.memory(), Some(run));
    lived.step(Event::Adopted { ready: true, paused: false }, at(0)).unwrap();
    assert_eq!((lived.shown(), lived.memory()), (SandboxState::Running, None));
    let (mut gone, _) = Machine::recover(policy, &machine.stored(), 0);
    gone.step(ended(EndCause::VmmCrash, false), next(0, 4)).unwrap();
    assert_eq!((gone.shown(), gone.run().unwrap().wakes), (SandboxState::Starting, None));
    let mut ready = machine.clone();
    bring_up(&mut ready, 6_000);
    assert_eq!(ready.memory(), None);
    // Whatever fails on the way: the next try is from the disk, and its failure is a failure.
    for phases in 0..=3 {
        let mut machine = machine.clone();
        for phase in [StartPhase::ImageLeased, StartPhase::DisksMade, StartPhase::VmSpawned].into_iter().take(phases) {
            machine.step(Event::PhaseDone(phase), at(6_000)).unwrap();
        }
        let event = if phases == 3 { ended(EndCause::BootFailed, false) } else { Event::PhaseFailed };
        let effects = machine.step(event, next(6_001, 5)).unwrap();
        assert!(effects.contains(&Effect::LeaseImage) && !effects.contains(&Effect::FailStart), "{effects:?}");
        assert_eq!((machine.run().unwrap().boot_id, machine.memory()), (boot(5), None));
        assert!(machine.step(Event::PhaseFailed, at(6_002)).unwrap().contains(&Effect::FailStart));
        assert_eq!(machine.shown(), SandboxState::Crashed);
    }
    // A person's stop, removal or restart forgets it.
    for event in [
        Event::Stop { grace_ms: None, then: Then::Settle },
        Event::Stop { grace_ms: None, then: Then::Start },
        Event::Kill,
        Event::Remove { force: false },
    ] {
        let mut machine = asleep.clone();
        machine.step(event, at(7_000)).unwrap();
        assert_eq!(machine.memory(), None, "{event:?}");
    }
}

#[test]
fn a_suspension_gives_way_to_whoever_comes_and_counts_only_if_the_machine_stood_to_its_end() {
    let (machine, run) = suspending();
    let start = Event::Start { by: By::User, hold_main: false };
    // Somebody needs it: it goes on where it is, or, once it is being ended, right after.
    let mut needed = machine.clone();
    assert!(needed.step(start, at(5_001)).unwrap().contains(&Effect::GoOn));
    assert_eq!((needed.shown(), needed.memory()), (SandboxState::Running, None));
    assert!(needed.step(Event::Suspended, at(5_002)).unwrap().is_empty());
    let mut late = machine.clone();
    late.step(Event::Suspended, at(5_001)).unwrap();
    assert!(late.is_falling_asleep());
    late.step(start, at(5_002)).unwrap();
    late.step(ended(EndCause::Idle, false), Moment { now_ms: 5_003, next_boot_id: boot(3) }).unwrap();
    assert_eq!((late.shown(), late.memory()), (SandboxState::Starting, Some(run)));
    // Stops let it go on first, so that it can flush.
    for event in
        [Event::Stop { grace_ms: None, then: Then::Settle }, Event::HostStop, Event::Tick { last_activity_ms: Some(0) }]
    {
        let mut machine = machine.clone();
        let effects = machine.step(event, at(60_000)).unwrap();
        assert!(matches!(effects[..], [Effect::Record { .. }, Effect::GoOn, Effect::RunHook]), "{event:?} {effects:?}");
        assert_eq!(machine.memory(), None);
    }
    // No room, or too slow: it goes on, and is left alone for a while.
    for (event, now_ms) in
        [(Event::SuspendFailed, 5_001), (Event::Tick { last_activity_ms: Some(0) }, 5_000 + SUSPEND_LIMIT_MS)]
    {
        let mut machine = machine.clone();
        machine.policy.max_duration_ms = None;
        assert!(machine.step(event, at(now_ms)).unwrap().contains(&Effect::GoOn));
        let again = now_ms + SUSPEND_AGAIN_MS;
        assert_eq!(machine.deadline_ms(Some(0)), Some(again));
        assert!(machine.step(Event::Tick { last_activity_ms: Some(0) }, at(again - 1)).unwrap().is_empty());
        assert!(machine.step(Event::Tick { last_activity_ms: Some(0) }, at(again)).unwrap().contains(&Effect::Suspend));
    }
    // A VM that crashed while it was to end, a service that did not see it end, a person's stop: none of them leaves memory that counts.
    let mut ending = machine.clone();
    ending.step(Event::Suspended, at(5_001)).unwrap();
    let policy = ending.policy.clone();
    let (mut recovered, _) = Machine::recover(policy.clone(), &ending.stored(), 0);
    recovered.step(ended(EndCause::Idle, false), at(1)).unwrap();
    assert_eq!(recovered.state, State::Asleep { memory: None });
    let (mut recovered, _) = Machine::recover(policy, &machine.stored(), 0);
    assert_eq!(recovered.memory(), None);
    recovered.step(Event::Adopted { ready: true, paused: false }, at(1)).unwrap();
    assert_eq!(recovered.shown(), SandboxState::Running);
    let mut crashed = ending.clone();
    crashed.step(ended(EndCause::VmmCrash, false), at(5_002)).unwrap();
    assert_eq!(crashed.state, State::Asleep { memory: None });
    ending.step(Event::Stop { grace_ms: None, then: Then::Settle }, at(5_002)).unwrap();
    ending.step(ended(EndCause::Idle, false), at(5_003)).unwrap();
    assert_eq!(ending.state, State::Stopped);
}

#[test]
fn what_an_older_service_wrote_of_a_sleeper_is_read() {
    let state: State = serde_json::from_str(r#"{"state":"asleep"}"#).unwrap();
    assert_eq!(state, State::Asleep { memory: None });
    assert_eq!(serde_json::to_string(&state).unwrap(), r#"{"state":"asleep"}"#);
}

fn event_strategy() -> impl Strategy<Value = Event> {
    let causes = prop::sample::select(vec![
        EndCause::Idle,
        EndCause::Completed,
        EndCause::StopRequested,
        EndCause::Killed,
        EndCause::GuestPanic,
        EndCause::BootFailed,
        EndCause::VmmCrash,
        EndCause::HostShutdown,
    ]);
    prop_oneof![
        any::<bool>()
            .prop_map(|user| Event::Start { by: if user { By::User } else { By::Supervisor }, hold_main: false }),
        Just(Event::PhaseFailed),
        Just(Event::PhaseDone(StartPhase::VmSpawned)),
        Just(Event::AgentReady),
        Just(Event::MainExited),
        (causes, any::<bool>()).prop_map(|(cause, success)| Event::VmEnded { cause, success }),
        any::<bool>()
            .prop_map(|start| Event::Stop { grace_ms: None, then: if start { Then::Start } else { Then::Settle } }),
        Just(Event::Kill),
        Just(Event::CreatorGone),
        Just(Event::Unhealthy),
        Just(Event::HookDone),
        Just(Event::Paused),
        Just(Event::Resumed),
        Just(Event::Suspended),
        Just(Event::SuspendFailed),
        Just(Event::HostStop),
        Just(Event::AgentSilent),
        prop::option::of(0u64..100_000).prop_map(|last_activity_ms| Event::Tick { last_activity_ms }),
        any::<bool>().prop_map(|force| Event::Remove { force }),
    ]
}

/// A world that answers effects as the glue would: phases are under way or not, a VM exists or not.
#[derive(Default)]
struct World {
    phase_under_way: Option<StartPhase>,
    vm: bool,
    begun: BTreeSet<BootId>,
    over: BTreeSet<BootId>,
    leased: bool,
    /// A machine is being written down, or stands because it was.
    stands: bool,
    /// The run that was written down and has not gone on since.
    saved: Option<BootId>,
    woken: BTreeSet<BootId>,
}

impl World {
    fn take(&mut self, machine: &Machine, effects: &[Effect]) {
        for effect in effects {
            match effect {
                Effect::LeaseImage => {
                    assert!(self.phase_under_way.is_none() && !self.vm, "a run begins while another is on");
                    let fresh = self.begun.insert(machine.run().expect("a run").boot_id);
                    assert!(fresh, "a boot id is used twice");
                    if let Some(memory) = machine.run().and_then(|run| run.wakes) {
                        assert_eq!(self.saved, Some(memory), "it wakes from memory that does not count");
                        assert!(self.woken.insert(memory), "memory is used twice");
                    }
                    self.phase_under_way = Some(StartPhase::ImageLeased);
                }
                Effect::MakeDisks => self.phase_under_way = Some(StartPhase::DisksMade),
                Effect::SpawnVm => self.phase_under_way = Some(StartPhase::VmSpawned),
                Effect::ReleaseImage => {
                    assert!(self.leased, "a lease is given back that nobody holds");
                    self.leased = false;
                }
                Effect::KillVm { .. } | Effect::Shutdown { .. } | Effect::RunHook | Effect::ResumeVm => {
                    assert!(self.vm, "nobody is there to be stopped")
                }
                Effect::Suspend => {
                    assert!(self.vm && !self.stands, "nobody is there to be written down");
                    self.stands = true;
                }
                Effect::GoOn => (self.stands, self.saved) = (false, None),
                Effect::EndRun { boot_id, .. } => {
                    self.stands = false;
                    assert!(
                        self.begun.contains(boot_id) && self.over.insert(*boot_id),
                        "a run ends that never began, or twice"
                    );
                }
                Effect::RemoveFiles => {
                    assert!(!self.vm && self.phase_under_way.is_none(), "files go while something uses them")
                }
                Effect::Record { .. } | Effect::FailStart | Effect::Adopt => {}
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_for_every_sequence(
        events in prop::collection::vec((event_strategy(), 0u64..20_000), 1..80),
        detached in any::<bool>(),
        ephemeral in any::<bool>(),
        restart in prop::sample::select(vec![
            RestartPolicy::Default, RestartPolicy::No, RestartPolicy::OnFailure { max_retries: Some(2) }, RestartPolicy::Always, RestartPolicy::UnlessStopped,
        ]),
        on_idle in prop::sample::select(vec![OnIdle::Stop, OnIdle::Restart, OnIdle::Suspend]),
        pre_stop_ms in prop::option::of(1u64..20_000),
    ) {
        let mut machine = Machine::new(Policy { restart, ephemeral, on_idle, pre_stop_ms, ..policy() }, detached);
        let (mut world, mut now, mut boots) = (World::default(), 0, 1u128);
        for (event, pause) in events {
            now += pause;
            // The world decides whether news of phases and VMs can be true at all.
            let event = match event {
                Event::PhaseDone(_) => match world.phase_under_way.take() {
                    Some(phase) => {
                        world.leased |= phase == StartPhase::ImageLeased;
                        world.vm |= phase == StartPhase::VmSpawned;
                        Event::PhaseDone(phase)
                    }
                    None => continue,
                },
                Event::PhaseFailed if world.phase_under_way.take().is_none() => continue,
                Event::AgentReady | Event::MainExited | Event::Paused | Event::Resumed if !world.vm => continue,
                Event::VmEnded { .. } if !std::mem::take(&mut world.vm) => continue,
                Event::Suspended | Event::SuspendFailed if !world.stands => continue,
                other => other,
            };
            boots += 1;
            let before = machine.clone();
            if let (Event::Suspended, State::Suspending { run, .. }) = (event, before.state) {
                world.saved = Some(run.boot_id);
            }
            match machine.step(event, Moment { now_ms: now, next_boot_id: boot(boots) }) {
                Ok(effects) => {
                    // Effects happen before a lease is counted as held by the phase that just ended.
                    world.take(&machine, &effects);
                    if before.stored() != machine.stored() {
                        prop_assert!(matches!(effects.first(), Some(Effect::Record { .. })), "a change nobody records");
                    }
                }
                Err(_) => prop_assert_eq!(&machine, &before, "a refused event changed something"),
            }
            let resting = machine.shown().is_resting() || machine.shown() == SandboxState::Restarting;
            prop_assert!(!(resting && world.vm), "at rest with a VM: {:?}", machine.state);
            prop_assert_eq!(machine.run().is_some(), world.begun.len() > world.over.len());
            prop_assert!(world.begun.len() - world.over.len() <= 1);
            if let State::Asleep { memory: Some(memory) } = machine.state {
                prop_assert_eq!(world.saved, Some(memory), "memory that does not count is kept");
            }
            if matches!(machine.state, State::Suspending { .. } | State::PreStop { .. } | State::Draining { .. } | State::Stopping { .. } | State::Restarting { .. }) {
                prop_assert!(machine.deadline_ms(None).is_some(), "nothing would ever end this state");
            }
        }
    }
}
