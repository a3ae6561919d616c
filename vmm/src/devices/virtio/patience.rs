//! Whether a worker that has answered goes on looking at its ring for a moment before it sleeps.
//!
//! A driver that waits for each answer sends its next request some ten microseconds after it. To sleep and be woken in
//! between costs more than that: the driver's kick is an exit of the guest, and the wake-up often rouses an idle
//! processor. So a worker looks on while that pays: the last request came soon after the answer before it. The first
//! one that does not ends it, so an idle device costs nothing.
//!
//! Used by the workers of disks and shared directories. Where the host has one processor, which the guest needs, nobody
//! ever looks on.

use std::time::{Duration, Instant};

/// How long a worker looks.
const LOOK: Duration = Duration::from_micros(150);
/// A request that wakes the worker so soon after its last answer would have been found by looking.
const SOON: Duration = Duration::from_micros(250);

/// What a worker knows about its driver's pace.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    has_processors: bool,
    pays: bool,
    sleeps_since: Option<Instant>,
}

impl Patience {
    /// Of a device that was just made on this host. Asks it, so not for behind the jail; a worker gets a copy.
    pub fn of_this_host() -> Self {
        let has_processors = std::thread::available_parallelism().is_ok_and(|count| count.get() > 1);
        Self { has_processors, pays: false, sleeps_since: None }
    }

    /// Everything is answered: looks on if that pays. True when there is more.
    pub fn look(&mut self, has_more: impl Fn() -> bool) -> bool {
        if !self.has_processors {
            return false;
        }
        let began = Instant::now();
        self.sleeps_since = Some(began);
        while self.pays {
            if has_more() {
                return true;
            }
            self.pays = began.elapsed() < LOOK;
            // Whoever brings the answer to the guest may need this processor.
            std::thread::yield_now();
        }
        false
    }

    /// The driver's kick woke the worker.
    pub fn woken(&mut self) {
        self.pays = self.sleeps_since.take().is_some_and(|since| since.elapsed() < SOON);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn patience() -> Patience {
        Patience { has_processors: true, pays: false, sleeps_since: None }
    }

    #[test]
    fn a_driver_in_a_hurry_is_waited_for_until_it_is_late() {
        let mut patience = patience();
        let looks = Cell::new(0);
        let never = || {
            looks.set(looks.get() + 1);
            false
        };
        assert!(!patience.look(never));
        assert_eq!(looks.get(), 0, "nothing is known of the driver yet");
        patience.sleeps_since = Some(Instant::now());
        patience.woken();
        assert!(patience.look(|| true));
        let began = Instant::now();
        assert!(!patience.look(never));
        assert!(began.elapsed() >= LOOK && looks.get() > 0);
        looks.set(0);
        assert!(!patience.look(never));
        assert_eq!(looks.get(), 0, "it was late");
    }

    #[test]
    fn a_late_kick_or_a_single_processor_makes_nobody_look() {
        let mut late = patience();
        late.sleeps_since = Instant::now().checked_sub(2 * SOON);
        late.woken();
        assert!(!late.look(|| true));
        let mut alone = Patience { has_processors: false, pays: true, sleeps_since: None };
        assert!(!alone.look(|| true));
    }
}
