//! Where the time of a boot goes: named points on the monotonic clock, kept for `Status` and `boot-error.json` and passed on as
//! they happen.
//!
//! Marked by engines, devices and the agent link from any thread. At most [`PHASES_MAX`] are kept.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// More marks than any boot makes; a bound all the same, because the guest's hello carries phases too.
const PHASES_MAX: usize = 64;

/// A point in the life of a boot.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Phase {
    /// Stable snake_case name: `engine_started`, `kernel_loaded`, `first_console_byte`, `agent_hello`, …
    pub name: String,
    /// Microseconds since the VM process got its launch request.
    pub at_us: u64,
}

type Observer = Box<dyn Fn(&Phase) + Send + Sync>;

struct State {
    marks: Mutex<Marks>,
    observer: Option<Observer>,
}

struct Marks {
    start: Instant,
    all: Vec<Phase>,
}

/// A shared list of marks; clones are the same list.
#[derive(Clone)]
pub struct Phases(Arc<State>);

impl Phases {
    /// Begins counting at `start`; `observer` sees each mark once, on the marking thread.
    pub fn new(start: Instant, observer: Option<Observer>) -> Self {
        Self(Arc::new(State { marks: Mutex::new(Marks { start, all: Vec::new() }), observer }))
    }

    /// Forgets all marks and begins again at `start`: the machine stood by until then.
    pub fn begin_again(&self, start: Instant) {
        *self.lock() = Marks { start, all: Vec::new() };
    }

    fn lock(&self) -> MutexGuard<'_, Marks> {
        self.0.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that `name` was reached now. A name is recorded once; later marks of it are ignored.
    pub fn mark(&self, name: &str) {
        let start = self.lock().start;
        self.mark_at(name, u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX));
    }

    /// Records a phase measured elsewhere (the guest's own, shifted to this process's clock).
    pub fn mark_at(&self, name: &str, at_us: u64) {
        let phase = Phase { name: name.to_owned(), at_us };
        {
            let marks = &mut self.lock().all;
            if marks.len() >= PHASES_MAX || marks.iter().any(|mark| mark.name == name) {
                return;
            }
            marks.push(phase.clone());
        }
        if let Some(observer) = &self.0.observer {
            observer(&phase);
        }
    }

    /// All marks so far, in the order they were made.
    pub fn all(&self) -> Vec<Phase> {
        self.lock().all.clone()
    }

    /// Whether `name` was marked.
    pub fn has(&self, name: &str) -> bool {
        self.lock().all.iter().any(|mark| mark.name == name)
    }

    /// The last phase reached, for the evidence of a failed boot.
    pub fn last_name(&self) -> Option<String> {
        self.lock().all.last().map(|mark| mark.name.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_is_recorded_once_and_the_list_is_bounded() {
        let phases = Phases::new(Instant::now(), None);
        phases.mark("a");
        phases.mark("a");
        for number in 0..PHASES_MAX * 2 {
            phases.mark(&format!("p{number}"));
        }
        assert_eq!(phases.all().len(), PHASES_MAX);
        assert_eq!(phases.all().iter().filter(|mark| mark.name == "a").count(), 1);
        phases.begin_again(Instant::now());
        phases.mark("a");
        assert_eq!(phases.all().len(), 1);
    }
}
