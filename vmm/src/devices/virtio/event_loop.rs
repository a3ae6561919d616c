//! The threads device workers run on: epoll loops that own their workers.
//!
//! A loop can carry one worker or many, so "a thread per device" and "one shared loop" are a choice of who gets which
//! [`LoopHandle`], not of code. Workers are attached when the driver activates a device and detached on reset; `detach` returns
//! only when the worker can no longer run, which is what makes giving its queues back sound.
//!
//! Built by `launch`; used by every device's `activate`/`deactivate`. A worker must never block for long on anything but its
//! own backing file, and nothing on the loop's own thread may call `attach` or `detach` (it would wait for itself).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId, SubscriberOps};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};
use virtio_queue::Queue;

use crate::jail::{self, ThreadClass};
use crate::transport::mmio::saved::SavedQueue;

/// Workers need little stack: no recursion, no big arrays.
const LOOP_STACK_BYTES: usize = 256 * 1024;
/// Ready events taken per epoll_wait.
const READY_EVENTS_MAX: usize = 64;

/// A device's active half: it registers its kick eventfds (and whatever else it polls) in `init` and serves them in `process`.
pub trait Worker: MutEventSubscriber + Send {
    /// Where its rings are, between two events: everything it has taken it has given back, or says how many it holds.
    ///
    /// # Errors
    /// In words: why it cannot be saved now.
    fn positions(&self) -> Result<Vec<SavedQueue>, String> {
        Err("it cannot be saved".into())
    }

    /// Takes the worker apart after it left its loop and returns its rings.
    fn into_queues(self: Box<Self>) -> Vec<Queue>;
}

/// Why a loop could not be used.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// epoll, eventfd or thread creation failed
    #[error("event loop could not be started")]
    Start(#[from] std::io::Error),
    /// the loop's thread is gone or refused
    #[error("event loop does not answer: {0}")]
    Gone(event_manager::Error),
    /// the loop's thread could not be confined
    #[error(transparent)]
    Jail(#[from] jail::JailError),
}

impl From<event_manager::Error> for LoopError {
    fn from(error: event_manager::Error) -> Self {
        Self::Gone(error)
    }
}

/// What a worker says of its rings.
pub type Positions = Result<Vec<SavedQueue>, String>;

/// A loop that stands until this is dropped.
#[derive(Debug)]
pub struct Frozen {
    positions: Vec<Positions>,
    _release: SyncSender<()>,
}

impl Frozen {
    /// What the workers said, in their order.
    pub fn positions(&self) -> Vec<Positions> {
        self.positions.clone()
    }
}

/// A worker's seat on its loop.
#[derive(Clone, Copy, Debug)]
pub struct WorkerId(SubscriberId);

/// A way to reach a loop; clones reach the same one. The thread ends with [`LoopHandle::stop`].
#[derive(Clone)]
pub struct LoopHandle {
    endpoint: RemoteEndpoint<Box<dyn Worker>>,
    stopping: Arc<AtomicBool>,
    class: ThreadClass,
}

impl LoopHandle {
    /// Starts a loop on a thread of its own called `name` (at most 15 bytes are shown by the kernel).
    pub fn start(name: &str) -> Result<Self, LoopError> {
        Self::start_as(name, ThreadClass::Device)
    }

    /// As [`LoopHandle::start`], for a thread that is another class to the jail.
    pub fn start_as(name: &str, class: ThreadClass) -> Result<Self, LoopError> {
        let stopping = Arc::new(AtomicBool::new(false));
        let stop_seen = Arc::clone(&stopping);
        // The manager holds boxed trait objects and is not Send as a whole: it is made on its own thread.
        let (ready, started) = std::sync::mpsc::sync_channel(1);
        thread::Builder::new().name(name.to_owned()).stack_size(LOOP_STACK_BYTES).spawn(move || {
            let mut manager = match EventManager::<Box<dyn Worker>>::new_with_capacity(READY_EVENTS_MAX) {
                Ok(manager) => manager,
                Err(error) => {
                    let _ = ready.send(Err(error));
                    return;
                }
            };
            if ready.send(Ok(manager.remote_endpoint())).is_err() {
                return;
            }
            while !stop_seen.load(Ordering::Acquire) {
                if let Err(error) = manager.run() {
                    tracing::error!(%error, "device event loop failed");
                    return;
                }
            }
        })?;
        let endpoint = started.recv().map_err(|_| LoopError::Gone(event_manager::Error::ChannelRecv))??;
        Ok(Self { endpoint, stopping, class })
    }

    /// Moves `worker` onto the loop; its `init` has run when this returns.
    pub fn attach(&self, worker: Box<dyn Worker>) -> Result<WorkerId, LoopError> {
        self.endpoint.call_blocking(move |operations| Ok(WorkerId(operations.add_subscriber(worker))))
    }

    /// Takes the worker off the loop; it is not running any more when this returns.
    pub fn detach(&self, worker: WorkerId) -> Result<Box<dyn Worker>, LoopError> {
        self.endpoint.call_blocking(move |operations| operations.remove_subscriber(worker.0).map_err(LoopError::from))
    }

    /// Whether both are the same loop.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.stopping, &other.stopping)
    }

    /// Makes the loop's thread stand between two events until the answer is dropped, and asks `workers` for their positions.
    ///
    /// # Errors
    /// The loop's thread is gone.
    pub fn freeze(&self, workers: Vec<WorkerId>) -> Result<Frozen, LoopError> {
        let (tell, told) = sync_channel(1);
        let (release, released) = sync_channel::<()>(0);
        self.endpoint.fire(move |operations: &mut dyn SubscriberOps<Subscriber = Box<dyn Worker>>| {
            let ask = |worker: &WorkerId| match operations.subscriber_mut(worker.0) {
                Ok(worker) => worker.positions(),
                Err(error) => Err(error.to_string()),
            };
            let positions: Vec<Positions> = workers.iter().map(ask).collect();
            if tell.send(positions).is_ok() {
                // Ends with the error of a sender that is dropped.
                let _ = released.recv();
            }
        })?;
        let positions = told.recv().map_err(|_| LoopError::Gone(event_manager::Error::ChannelRecv))?;
        Ok(Frozen { positions, _release: release })
    }

    /// Confines the loop's thread to what workers need. For after the jail has been closed; before, it does nothing.
    pub fn enter_jail(&self) -> Result<(), LoopError> {
        let class = self.class;
        self.endpoint.call_blocking(move |_| Ok::<(), LoopError>(jail::enter(class)?))
    }

    /// Gives the loop's thread a mask for the modes of new files that is its own and takes nothing away. For before the
    /// jail is closed; where the host lets no thread differ in that, nothing changes.
    pub fn clear_mode_mask(&self) -> Result<(), LoopError> {
        self.endpoint.call_blocking(|_| {
            if unshare(CloneFlags::CLONE_FS).is_ok() {
                umask(Mode::empty());
            }
            Ok::<(), LoopError>(())
        })
    }

    /// Ends the thread after its current event; workers still attached are dropped.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        let _ = self.endpoint.kick();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use event_manager::{EventOps, EventSet, Events};

    use super::*;
    use crate::devices::virtio::notifier::Notifier;

    struct Echo {
        kick: Notifier,
        seen: mpsc::Sender<()>,
    }

    impl MutEventSubscriber for Echo {
        fn init(&mut self, operations: &mut EventOps) {
            operations.add(Events::new(&self.kick, EventSet::IN)).expect("fresh descriptor");
        }

        fn process(&mut self, _events: Events, _operations: &mut EventOps) {
            if self.kick.drain() {
                let _ = self.seen.send(());
            }
        }
    }

    impl Worker for Echo {
        fn into_queues(self: Box<Self>) -> Vec<Queue> {
            Vec::new()
        }
    }

    #[test]
    fn a_worker_runs_until_it_is_detached() {
        let kick = Notifier::new().expect("eventfd");
        let (seen, events) = mpsc::channel();
        let handle = LoopHandle::start("test-loop").expect("loop");
        let worker = Echo { kick: kick.try_clone().expect("clone"), seen };
        let id = handle.attach(Box::new(worker)).expect("attach");
        kick.notify().expect("notify");
        events.recv_timeout(Duration::from_secs(5)).expect("the worker saw the kick");
        handle.detach(id).expect("detach");
        kick.notify().expect("notify");
        assert!(events.recv_timeout(Duration::from_millis(50)).is_err());
        assert!(handle.detach(id).is_err(), "a seat is given up once");
        handle.stop();
    }
}
