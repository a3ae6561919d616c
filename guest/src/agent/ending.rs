//! The end of the sandbox, the one road for all of them: hook, stop signal, grace, kill, flush, goodbye, reset. A thread of its own
//! sleeps in [`EndSwitch`] until the end is due.
//!
//! ```text
//!  Ordered(Shutdown) ─► pre-stop hook (budget) ─► stop signal to main, TERM to execs ─► grace ─┐
//!  MainEnded ──────────────────────────────────────────────────────────────────────────────────┼─► kill all ─► ends told ─► sync,
//!  LinkLost ───────────────────────────────────────────────────────────────────────────────────┘    read-only ─► goodbye ─► reset
//! ```

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use msb_protocol::guest::{ExecConfig, Shutdown};

use super::Agent;
use super::link::Link;
use crate::session::process::Process;
use crate::session::pump::Pump;

/// How long killed processes may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// How long clients may take to read the last output before they are left behind.
const FAREWELL_LIMIT: Duration = Duration::from_millis(500);
/// How long `msb-vmm` may take to write the rest of the log.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to answer the goodbye.
const GOODBYE_LIMIT: Duration = Duration::from_secs(1);
/// Time between two looks at whether everything is gone.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// Why the end is due.
#[derive(Clone, Debug, PartialEq)]
pub enum Reason {
    /// The host said so.
    Ordered(Shutdown),
    /// The main workload has ended, or could not be started.
    MainEnded,
    /// The agent link is gone: nobody keeps the log, nobody would hear a goodbye.
    LinkLost,
}

/// Where the first reason to end is kept.
#[derive(Debug, Default)]
pub struct EndSwitch {
    reason: Mutex<Option<Reason>>,
    changed: Condvar,
}

impl EndSwitch {
    /// The end is due. Only the first reason counts.
    pub fn request(&self, reason: Reason) {
        let mut waiting = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.get_or_insert(reason);
        self.changed.notify_all();
    }

    /// Whether the end is due.
    pub fn is_due(&self) -> bool {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Waits for the first reason.
    pub fn wait(&self) -> Reason {
        let mut waiting = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(reason) = waiting.as_ref() {
                return reason.clone();
            }
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Waits for the end and carries it out up to the goodbye. Afterwards the machine can be reset. `flush` makes the disks clean.
pub(crate) fn run(agent: &Agent, link: &Link, flush: impl FnOnce() -> Result<(), String>) {
    let reason = agent.end.wait();
    if let Reason::Ordered(order) = &reason {
        agent.stop(order);
    } else {
        kill_all(agent);
    }
    let told = agent.main.wait_finished(FAREWELL_LIMIT);
    if !told {
        agent.main.door().hurry();
        agent.main.wait_finished(FAREWELL_LIMIT);
    }
    agent.guest.sessions.wait_empty(FAREWELL_LIMIT);
    // A file that is open to write would keep the disk from being made read-only.
    agent.files.close_all(FAREWELL_LIMIT);
    link.drain(DRAIN_LIMIT);
    if let Err(error) = flush() {
        crate::session::workload::Host::log(link, &format!("the disks could not be made read-only: {error}"));
    }
    if reason != Reason::LinkLost {
        link.say_goodbye(GOODBYE_LIMIT);
    }
}

/// Hook, signals, grace. Ends early when everything that was asked to stop has stopped.
pub(crate) fn stop_gently(agent: &Agent, order: &Shutdown) {
    if !order.pre_stop.is_empty() {
        run_hook(agent, order);
    }
    let configured = agent.guest.main().map_or(0, |main| main.stop_signal);
    let signal =
        [order.signal, configured].into_iter().find(|number| (1..=64).contains(number)).unwrap_or(libc::SIGTERM);
    let had_main = agent.main.is_alive();
    agent.main.signal(signal);
    agent.guest.sessions.signal(libc::SIGTERM);
    let grace = Duration::from_millis(order.grace_ms);
    if had_main {
        // Its end is the sandbox's end: nobody else is waited for.
        agent.main.wait_ended(grace);
    } else {
        agent.guest.sessions.wait_empty(grace);
    }
}

/// Runs the pre-stop hook as a session without clients: its output goes nowhere.
fn run_hook(agent: &Agent, order: &Shutdown) {
    let exec = ExecConfig { argv: order.pre_stop.clone(), ..ExecConfig::default() };
    let number = agent.guest.sessions.number();
    let process = match Process::start(&agent.guest, &exec, "pre-stop", false) {
        Ok(process) => process,
        Err(error) => {
            agent.host.log(&format!("the pre-stop hook could not be started: {error}"));
            return;
        }
    };
    let budget = Duration::from_millis(order.pre_stop_budget_ms);
    let mut pump = Pump::new(&agent.guest, number, process, Some(budget), false);
    let end = pump.run();
    pump.farewell();
    if end.timed_out {
        agent.host.log("the pre-stop hook was killed at the end of its budget");
    } else if end.signal != 0 || end.code != 0 {
        agent.host.log(&format!("the pre-stop hook failed with code {} signal {}", end.code, end.signal));
    }
}

/// Kills what is left and waits until it is gone.
pub(crate) fn kill_all(agent: &Agent) {
    let until = Instant::now() + KILL_LIMIT;
    loop {
        // Again and again: without cgroup.kill a fork could slip through.
        agent.guest.kill_everything();
        agent.main.signal(libc::SIGKILL);
        let populated = agent.guest.workload.as_ref().is_some_and(crate::cgroup::WorkloadGroup::is_populated);
        if (!populated && agent.guest.sessions.alive() == 0 && agent.main.wait_ended(LOOK_INTERVAL))
            || Instant::now() >= until
        {
            return;
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts() {
        let switch = EndSwitch::default();
        assert!(!switch.is_due());
        switch.request(Reason::MainEnded);
        switch.request(Reason::LinkLost);
        assert!(switch.is_due());
        assert_eq!(switch.wait(), Reason::MainEnded);
    }
}
