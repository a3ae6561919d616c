//! Where tests make handlers panic. Every handler of every actor begins with [`here`]; in the product that is nothing at all.

/// A place where a panic can be injected.
#[cfg(any(test, feature = "simulation"))]
#[expect(clippy::panic, reason = "the test is about panics")]
pub(crate) fn here(place: &'static str) {
    let armed = injected::ARMED.with_borrow_mut(|armed| match armed {
        Some((wanted, 0)) if *wanted == place => armed.take().is_some(),
        Some((wanted, left)) if *wanted == place => {
            *left -= 1;
            false
        }
        _ => false,
    });
    if armed {
        injected::FIRED.with(|fired| fired.set(fired.get() + 1));
        panic!("injected into {place}");
    }
}

/// A place where a panic can be injected.
#[cfg(not(any(test, feature = "simulation")))]
#[inline]
pub(crate) fn here(_: &'static str) {}

/// What tests see of it.
#[cfg(any(test, feature = "simulation"))]
pub mod injected {
    use std::cell::{Cell, RefCell};

    thread_local! {
        // Actors share one thread, and each simulation has a thread of its own.
        pub(super) static ARMED: RefCell<Option<(&'static str, u32)>> = const { RefCell::new(None) };
        pub(super) static FIRED: Cell<u32> = const { Cell::new(0) };
    }

    /// Every place: `actor/message`.
    pub const PLACES: &[&str] = &[
        "sandbox/started",
        "sandbox/ask",
        "sandbox/relabel",
        "sandbox/news",
        "sandbox/timer",
        "sandbox/vm_event",
        "sandbox/ssh",
        "sandbox/explain",
        "sandbox/inspect",
        "sandbox/hold_disk",
        "sandbox/pause",
        "sandbox/hold_machine",
        "supervisor/started",
        "supervisor/bury",
        "supervisor/create",
        "supervisor/find",
        "supervisor/all",
        "supervisor/views",
        "supervisor/image_users",
        "supervisor/rows",
        "pool/mind",
        "pool/take",
        "pool/count",
        "pool/inspect",
        "images/prepare",
        "images/make_upper",
        "images/list",
        "images/inspect",
        "images/work",
        "images/load",
        "images/check",
        "images/inspect_actor",
        "snapshots/list",
        "snapshots/find",
        "snapshots/make",
        "snapshots/remove",
        "snapshots/inspect",
        "metrics/sample",
        "metrics/forget",
        "metrics/latest",
        "metrics/history",
        "metrics/inspect",
    ];

    /// The handler panics the next time it is entered after `pass` times.
    pub fn arm(place: &'static str, pass: u32) {
        ARMED.set(Some((place, pass)));
    }

    /// Nothing panics any more. Says whether something was still armed.
    pub fn disarm() -> bool {
        ARMED.take().is_some()
    }

    /// How many panics this thread has seen injected.
    #[must_use]
    pub fn fired() -> u32 {
        FIRED.get()
    }
}
