//! The end of a machine: reported by whichever vCPU, or by a [`Stopper`], first; waited for by `run`.
//!
//! Knows the vCPU threads only as [`Kick`]s, so that anybody may end the machine from any thread, at any time, any number of times.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use super::super::{EngineEnd, Stopper};

/// Something that makes a vCPU leave the guest.
pub trait Kick: Send {
    /// Never blocks; harmless when the vCPU has left already.
    fn kick(&self);
}

/// See the module's description.
#[derive(Default)]
pub struct Ending {
    over: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    end: Option<EngineEnd>,
    kicks: Vec<Box<dyn Kick>>,
}

impl Ending {
    /// Whether vCPUs have to leave. Cheap: asked before every entry into the guest.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Ends the machine as `end`, unless it has ended already, and gets every vCPU out of the guest.
    pub fn finish(&self, end: EngineEnd) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
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
        self.state.lock().unwrap_or_else(PoisonError::into_inner).kicks.push(kick);
    }

    /// Forgets all vCPUs; no kick is running or will run when this returns.
    pub fn clear_kicks(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).kicks.clear();
    }

    /// Blocks until the machine has ended.
    pub fn wait(&self) -> EngineEnd {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
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
