//! When a session is over. Pure: events and the time come in, a verdict comes out.
//!
//! ```text
//!  running ── process ends ──► draining ── every output at its end ─────────────────────────────► over
//!     │                           ├─ what it wrote is delivered, and LINGER has passed ──────────► over
//!     │                           └─ wait_output: only the outputs' end, or the timeout's kill ──► over
//!     └─ timeout: kill everything of the session, then as above
//! ```
//!
//! What the process itself wrote is never cut off: at its end the bytes in its pipes are counted ("owed") and they are delivered
//! however slow the reader is. A grandchild that holds a pipe open gets [`LINGER`] for a last word and then holds nothing up.

use std::time::{Duration, Instant};

/// How long output of others than the process itself is awaited after its end.
pub const LINGER: Duration = Duration::from_millis(100);

/// What the owner is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on; look again at the given time at the latest.
    GoOn(Option<Instant>),
    /// Kill everything of the session now (said once).
    TimedOut,
    /// Over: tell the clients.
    Over,
}

/// The end of one session.
#[derive(Debug)]
pub struct Ending {
    wait_output: bool,
    deadline: Option<Instant>,
    timed_out: bool,
    exited_at: Option<Instant>,
    outputs: [Output; 2],
}

#[derive(Clone, Copy, Debug)]
struct Output {
    open: bool,
    owed: u64,
}

impl Ending {
    /// A session that has just started. `outputs`: which of stdout and stderr exist.
    pub fn new(started: Instant, timeout: Option<Duration>, wait_output: bool, outputs: [bool; 2]) -> Self {
        let outputs = outputs.map(|open| Output { open, owed: 0 });
        // A timeout beyond what the clock can hold is none.
        let deadline = timeout.and_then(|timeout| started.checked_add(timeout));
        Self { wait_output, deadline, timed_out: false, exited_at: None, outputs }
    }

    /// The process ended; `waiting` bytes were in its pipes then.
    pub fn process_ended(&mut self, now: Instant, waiting: [u64; 2]) {
        self.exited_at = Some(now);
        for (output, waiting) in self.outputs.iter_mut().zip(waiting) {
            output.owed = waiting;
        }
    }

    /// Bytes of an output were read.
    pub fn read(&mut self, output: usize, len: usize) {
        if let Some(output) = self.outputs.get_mut(output) {
            output.owed = output.owed.saturating_sub(len as u64);
        }
    }

    /// An output is at its end.
    pub fn output_ended(&mut self, output: usize) {
        if let Some(output) = self.outputs.get_mut(output) {
            *output = Output { open: false, owed: 0 };
        }
    }

    /// Nobody listens any more: the end of the process is enough.
    pub fn stop_waiting_for_output(&mut self) {
        self.wait_output = false;
    }

    /// Whether the process has ended.
    pub fn has_exited(&self) -> bool {
        self.exited_at.is_some()
    }

    /// Whether the timeout struck.
    pub fn timed_out(&self) -> bool {
        self.timed_out
    }

    /// What to do now.
    pub fn verdict(&mut self, now: Instant) -> Verdict {
        let ended = self.outputs.iter().all(|output| !output.open);
        let Some(exited_at) = self.exited_at else {
            return self.or_timeout(now, None);
        };
        if ended {
            return Verdict::Over;
        }
        if self.wait_output && !self.timed_out {
            return self.or_timeout(now, None);
        }
        if self.outputs.iter().any(|output| output.owed > 0) {
            return Verdict::GoOn(None);
        }
        let until = exited_at + LINGER;
        if now >= until { Verdict::Over } else { Verdict::GoOn(Some(until)) }
    }

    fn or_timeout(&mut self, now: Instant, until: Option<Instant>) -> Verdict {
        match self.deadline {
            Some(deadline) if !self.timed_out && now >= deadline => {
                self.timed_out = true;
                Verdict::TimedOut
            }
            Some(deadline) if !self.timed_out => Verdict::GoOn(Some(deadline)),
            _ => Verdict::GoOn(until),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn session(timeout: Option<Duration>, wait_output: bool) -> (Instant, Ending) {
        let start = Instant::now();
        (start, Ending::new(start, timeout, wait_output, [true, true]))
    }

    #[test]
    fn outputs_end_with_the_process_and_the_session_is_over_at_once() {
        let (start, mut ending) = session(None, false);
        assert_eq!(ending.verdict(start), Verdict::GoOn(None));
        ending.output_ended(0);
        ending.output_ended(1);
        assert_eq!(ending.verdict(start), Verdict::GoOn(None), "closing its output does not end a process");
        ending.process_ended(start, [0, 0]);
        assert_eq!(ending.verdict(start), Verdict::Over);
    }

    #[test]
    fn a_grandchild_holds_nothing_up_but_what_was_written_is_owed() {
        let (start, mut ending) = session(None, false);
        ending.process_ended(start, [10, 0]);
        assert_eq!(ending.verdict(start + 500 * MS), Verdict::GoOn(None), "owed bytes wait for a slow reader");
        ending.read(0, 4);
        assert_eq!(ending.verdict(start + 500 * MS), Verdict::GoOn(None));
        ending.read(0, 100);
        assert_eq!(ending.verdict(start + 50 * MS), Verdict::GoOn(Some(start + LINGER)));
        assert_eq!(ending.verdict(start + LINGER), Verdict::Over);
    }

    #[test]
    fn wait_output_waits_for_every_holder() {
        let (start, mut ending) = session(None, true);
        ending.process_ended(start, [0, 0]);
        assert_eq!(ending.verdict(start + 10_000 * MS), Verdict::GoOn(None));
        ending.output_ended(0);
        assert_eq!(ending.verdict(start + 10_000 * MS), Verdict::GoOn(None));
        ending.output_ended(1);
        assert_eq!(ending.verdict(start + 10_000 * MS), Verdict::Over);
        let (start, mut ending) = session(None, true);
        ending.process_ended(start, [0, 0]);
        ending.stop_waiting_for_output();
        assert_eq!(ending.verdict(start + LINGER), Verdict::Over);
    }

    #[test]
    fn the_timeout_kills_once_and_then_the_end_is_awaited() {
        let (start, mut ending) = session(Some(1000 * MS), false);
        assert_eq!(ending.verdict(start), Verdict::GoOn(Some(start + 1000 * MS)));
        assert_eq!(ending.verdict(start + 1000 * MS), Verdict::TimedOut);
        assert_eq!(ending.verdict(start + 1001 * MS), Verdict::GoOn(None));
        ending.process_ended(start + 1002 * MS, [0, 0]);
        assert_eq!(ending.verdict(start + 1002 * MS + LINGER), Verdict::Over);
        assert!(ending.timed_out());
    }

    #[test]
    fn the_timeout_also_ends_a_wait_for_output_but_not_a_delivery() {
        let (start, mut ending) = session(Some(1000 * MS), true);
        ending.process_ended(start, [0, 0]);
        assert_eq!(ending.verdict(start + 1000 * MS), Verdict::TimedOut);
        assert_eq!(ending.verdict(start + 1000 * MS), Verdict::Over);
        let (start, mut ending) = session(Some(1000 * MS), false);
        ending.process_ended(start, [5, 0]);
        assert_eq!(ending.verdict(start + 2000 * MS), Verdict::GoOn(None));
        assert!(!ending.timed_out());
    }

    #[test]
    fn an_endless_timeout_is_none() {
        let (start, mut ending) = session(Some(Duration::MAX), false);
        assert_eq!(ending.verdict(start), Verdict::GoOn(None));
    }
}
