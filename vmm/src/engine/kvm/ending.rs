//! The end of a machine: reported by whichever vCPU, or by a [`Stopper`], first; waited for by `run`. And its halts before that.
//!
//! ```text
//!  halt: halting = true ─► kick all ─► each vCPU parks before its next entry ─► all parked: halted     go_on: halting = false, all leave
//! ```
//!
//! Knows the vCPU threads only as [`Kick`]s, so that anybody may end the machine from any thread, at any time, any number of times.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::super::{EngineEnd, HaltError, Halter, Stopper};
use super::saved::Part;

/// Time for every vCPU to leave the guest. An exit under way may wait for a device that is being reset.
const HALT_LIMIT: Duration = Duration::from_secs(5);

/// Something that makes a vCPU leave the guest.
pub trait Kick: Send {
    /// Never blocks; harmless when the vCPU has left already.
    fn kick(&self);
}

/// See the module's description.
#[derive(Default)]
pub struct Ending {
    over: AtomicBool,
    halting: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    end: Option<EngineEnd>,
    kicks: Vec<Box<dyn Kick>>,
    /// vCPUs that wait to go on.
    parked: usize,
    /// How often those that are parked were asked to write themselves down.
    round: u64,
    /// What they wrote in this round.
    parts: Vec<Part>,
}

impl Ending {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether vCPUs have to park. Asked after a kick.
    pub fn is_halting(&self) -> bool {
        self.halting.load(Ordering::SeqCst)
    }

    /// Where a vCPU's thread waits while the machine is halted; `write` writes its vCPU down, whenever that is asked for.
    pub fn park(&self, mut write: impl FnMut() -> Part) {
        let mut state = self.lock();
        let mut round = state.round;
        state.parked += 1;
        self.changed.notify_all();
        while self.is_halting() && state.end.is_none() {
            if state.round != round {
                round = state.round;
                drop(state);
                let part = write();
                state = self.lock();
                state.parts.push(part);
                self.changed.notify_all();
                continue;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
    }

    /// What every vCPU of a halted machine writes down.
    ///
    /// # Errors
    /// It is not halted, or has ended.
    pub fn collect(&self) -> Result<Vec<Part>, HaltError> {
        let mut state = self.lock();
        if !self.is_halting() || state.parked < state.kicks.len() {
            return Err(HaltError::Stuck);
        }
        state.round += 1;
        state.parts.clear();
        self.changed.notify_all();
        let until = Instant::now() + HALT_LIMIT;
        while state.parts.len() < state.kicks.len() {
            let left = until.saturating_duration_since(Instant::now());
            if state.end.is_some() {
                return Err(HaltError::Ended);
            }
            if left.is_zero() {
                return Err(HaltError::Stuck);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(std::mem::take(&mut state.parts))
    }

    /// Whether vCPUs have to leave. Cheap: asked before every entry into the guest.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Ends the machine as `end`, unless it has ended already, and gets every vCPU out of the guest.
    pub fn finish(&self, end: EngineEnd) {
        let mut state = self.lock();
        if state.end.is_none() {
            state.end = Some(end);
        }
        // Before the kicks: a vCPU that misses its kick sees this before it enters again.
        self.over.store(true, Ordering::SeqCst);
        for kick in &state.kicks {
            kick.kick();
        }
        self.changed.notify_all();
    }

    /// Adds a vCPU to those that [`Ending::finish`] kicks.
    pub fn add_kick(&self, kick: Box<dyn Kick>) {
        self.lock().kicks.push(kick);
    }

    /// Forgets all vCPUs; no kick is running or will run when this returns.
    pub fn clear_kicks(&self) {
        self.lock().kicks.clear();
    }

    /// Blocks until the machine has ended.
    pub fn wait(&self) -> EngineEnd {
        let mut state = self.lock();
        loop {
            if let Some(end) = &state.end {
                return end.clone();
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Stopper for Ending {
    fn stop(&self) {
        self.finish(EngineEnd::Stopped);
    }
}

impl Halter for Ending {
    fn halt(&self) -> Result<(), HaltError> {
        let mut state = self.lock();
        // Before the kicks: a vCPU that misses its kick sees this after it.
        self.halting.store(true, Ordering::SeqCst);
        for kick in &state.kicks {
            kick.kick();
        }
        let until = Instant::now() + HALT_LIMIT;
        let outcome = loop {
            if state.end.is_some() {
                break Err(HaltError::Ended);
            }
            if state.parked >= state.kicks.len() {
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Err(HaltError::Stuck);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        self.halting.store(false, Ordering::SeqCst);
        self.changed.notify_all();
        outcome
    }

    fn go_on(&self) {
        let _state = self.lock();
        self.halting.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }
}

impl std::fmt::Debug for Ending {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        to.debug_struct("Ending").field("over", &self.is_over()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    use super::*;

    struct Counted(Arc<AtomicU32>);
    impl Kick for Counted {
        fn kick(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// A vCPU that runs until it is kicked and then does what the real ones do.
    struct Signalled(Arc<(Mutex<bool>, Condvar)>);
    impl Kick for Signalled {
        fn kick(&self) {
            *self.0.0.lock().unwrap() = true;
            self.0.1.notify_all();
        }
    }

    #[test]
    fn a_halt_waits_for_every_vcpu_and_ends_with_the_machine() {
        let ending = Arc::new(Ending::default());
        let entries = Arc::new(AtomicU32::new(0));
        let vcpus: Vec<_> = (0..3)
            .map(|_| {
                let signal = Arc::new((Mutex::new(false), Condvar::new()));
                ending.add_kick(Box::new(Signalled(Arc::clone(&signal))));
                let (ending, entries) = (Arc::clone(&ending), Arc::clone(&entries));
                std::thread::spawn(move || {
                    while !ending.is_over() {
                        entries.fetch_add(1, Ordering::SeqCst);
                        let mut kicked = signal.0.lock().unwrap();
                        while !*kicked {
                            kicked = signal.1.wait(kicked).unwrap();
                        }
                        *kicked = false;
                        drop(kicked);
                        if ending.is_halting() {
                            ending.park(|| Err("nothing to write".into()));
                        }
                    }
                })
            })
            .collect();
        for _ in 0..50 {
            ending.halt().expect("halted");
            let before = entries.load(Ordering::SeqCst);
            ending.halt().expect("halted already");
            std::thread::yield_now();
            assert_eq!(ending.collect().expect("parts").len(), 3);
            assert_eq!(entries.load(Ordering::SeqCst), before, "a vCPU runs in a halted machine");
            ending.go_on();
        }
        ending.halt().expect("halted");
        ending.stop();
        assert_eq!(ending.halt(), Err(HaltError::Ended));
        for vcpu in vcpus {
            vcpu.join().unwrap();
        }
    }

    #[test]
    fn the_first_end_counts_and_everybody_is_kicked() {
        let ending = Arc::new(Ending::default());
        let kicks = Arc::new(AtomicU32::new(0));
        ending.add_kick(Box::new(Counted(Arc::clone(&kicks))));
        ending.add_kick(Box::new(Counted(Arc::clone(&kicks))));
        assert!(!ending.is_over());
        let waiter = std::thread::spawn({
            let ending = Arc::clone(&ending);
            move || ending.wait()
        });
        ending.finish(EngineEnd::Reset);
        ending.stop();
        assert_eq!(waiter.join().unwrap(), EngineEnd::Reset);
        assert!(ending.is_over());
        assert_eq!(kicks.load(Ordering::SeqCst), 4);
        ending.clear_kicks();
        ending.stop();
        assert_eq!(kicks.load(Ordering::SeqCst), 4);
    }
}
