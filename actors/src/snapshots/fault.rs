//! Where a test kills the process: the steps of making and removing a snapshot. Outside of tests passing one costs nothing and does
//! nothing.

/// A step that was just done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// The journal knows that a snapshot is being made.
    Recorded = 1,
    /// A directory of work exists.
    Drafted,
    /// The disk is copied.
    Copied,
    /// Everything is durable and has no name.
    Sealed,
    /// The files have their name.
    Published,
    /// The journal knows that a snapshot is being removed.
    Removing,
    /// Its files are gone.
    Removed,
    /// A machine is written down and stands.
    Saved,
}

impl Step {
    /// Every step of one of a disk, in order.
    pub const ALL: [Self; 7] =
        [Self::Recorded, Self::Drafted, Self::Copied, Self::Sealed, Self::Published, Self::Removing, Self::Removed];
    /// Every step of taking one with memory, in order.
    pub const OF_MEMORY: [Self; 6] =
        [Self::Recorded, Self::Drafted, Self::Saved, Self::Copied, Self::Sealed, Self::Published];
}

/// A step is done.
#[cfg(not(any(test, feature = "simulation")))]
pub(super) fn reached(_: Step) {}

#[cfg(any(test, feature = "simulation"))]
pub use armed::kill_at;
#[cfg(any(test, feature = "simulation"))]
pub(super) use armed::reached;

#[cfg(any(test, feature = "simulation"))]
mod armed {
    use std::sync::atomic::{AtomicU8, Ordering};

    use super::Step;

    static KILL_AT: AtomicU8 = AtomicU8::new(0);

    /// This process dies by SIGKILL once it has done this step.
    pub fn kill_at(step: Step) {
        KILL_AT.store(step as u8, Ordering::SeqCst);
    }

    pub(in crate::snapshots) fn reached(step: Step) {
        if KILL_AT.load(Ordering::SeqCst) == step as u8 {
            let own = rustix::process::getpid();
            rustix::process::kill_process(own, rustix::process::Signal::KILL).expect("a signal to ourselves");
            // It comes before this thread goes on, but nobody promises so.
            loop {
                std::thread::park();
            }
        }
    }
}
