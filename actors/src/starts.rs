//! The queue of starts: so many machines boot at once, the others wait for their turn.
//!
//! ```text
//!  enter ─► waits, oldest first ─► Turn ─► its VM is spawned ─► its agent is there, or the run is over, or TURN_MAX_MS ─► the next one's
//! ```
//!
//! A boot is work for a processor, and a hundred at once (a service that brings everything back, `msb fork --count 100`) take each a hundred
//! times as long, while the boot timeout of each runs from the moment its VM is spawned. A guest that hangs keeps its turn for
//! [`TURN_MAX_MS`], so that nobody keeps others from starting. Used by `sandbox::actor`; it never knows whose turn it is.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::{Semaphore, oneshot};

use crate::clock::Clock;

/// Longest turn in milliseconds: a slow boot counts as one that hangs then, and another begins beside it.
pub const TURN_MAX_MS: u64 = 10_000;
/// Fewest machines that boot at once, also where there is one processor: a boot waits for disks, too.
const AT_ONCE_MIN: usize = 4;

/// The queue.
#[derive(Clone, Debug)]
pub struct Starts {
    free: Arc<Semaphore>,
    clock: Arc<dyn Clock>,
}

/// The right to boot a machine, until this is dropped or has lasted too long.
#[derive(Debug)]
pub struct Turn {
    _over: oneshot::Sender<()>,
}

impl Starts {
    /// A queue for `at_once` boots.
    #[must_use]
    pub fn new(at_once: usize, clock: Arc<dyn Clock>) -> Self {
        Self { free: Arc::new(Semaphore::new(at_once)), clock }
    }

    /// As many at once as the host has work for: two for each processor.
    #[must_use]
    pub fn for_this_host(clock: Arc<dyn Clock>) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self::new((2 * processors).max(AT_ONCE_MIN), clock)
    }

    /// Waits for a turn. Whoever drops this leaves the queue.
    pub fn enter(&self) -> impl Future<Output = Turn> + Send + 'static {
        let Self { free, clock } = self.clone();
        async move {
            // Never closed: an error would be a turn for everybody.
            let permit = free.acquire_owned().await.ok();
            let (over, ended) = oneshot::channel();
            let lasts = clock.sleep_until(clock.now_ms().saturating_add(TURN_MAX_MS));
            tokio::spawn(async move {
                tokio::select! {
                    _ = ended => {}
                    () = lasts => {}
                }
                drop(permit);
            });
            Turn { _over: over }
        }
    }
}
