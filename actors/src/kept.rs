//! An actor that there is one of, and that is always made again: supervisor, images, metrics.
//!
//! ```text
//!  Kept (handle) ──send──► incarnation 1 ──panic──► Life dropped ─► keeper task ─(back-off)─► make(Life) ─► incarnation 2
//!      └── waits while there is none                                                          │
//!      ◄────────────────────────────────────── the new address ───────────────────────────────┘
//! ```
//!
//! actix lets a panicking actor vanish without a word, so each incarnation holds a [`Life`] whose drop tells the keeper. A request that the
//! dead incarnation had is answered with an error: nobody knows how far it came. Those that come later wait for the next incarnation.
//! Sandboxes are not kept by this but by `SupervisorActor`, which gives one up that dies too often.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use actix::dev::ToEnvelope;
use actix::prelude::*;
use tokio::sync::{mpsc, watch};

use crate::clock::Clock;
use crate::sandbox::machine::{STEADY_AFTER_MS, back_off_ms};

/// Held by an incarnation; its drop is the incarnation's death.
#[derive(Debug)]
pub struct Life {
    deaths: mpsc::UnboundedSender<Option<&'static str>>,
    expected: bool,
}

impl Life {
    /// The end that follows is meant; nobody is made again.
    pub fn disarm(&mut self) {
        self.expected = true;
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let cause = if std::thread::panicking() { "a handler panicked" } else { "its context ended" };
        // A keeper that is gone itself has no use for it.
        let _ = self.deaths.send((!self.expected).then_some(cause));
    }
}

/// Where the present incarnation is.
enum Place<A: Actor> {
    Up(Addr<A>),
    Down,
    Over,
}

struct Shared<A: Actor> {
    place: watch::Sender<Place<A>>,
    waiting: Arc<AtomicUsize>,
    restarts: AtomicU32,
    last_cause: Mutex<Option<String>>,
}

/// The way to the actor; clones lead to the same one.
pub struct Kept<A: Actor> {
    shared: Arc<Shared<A>>,
}

impl<A: Actor> Clone for Kept<A> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

impl<A: Actor> std::fmt::Debug for Kept<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept").finish_non_exhaustive()
    }
}

/// A message on its way; counts in the depth of the mailbox until it is dropped.
#[derive(Debug)]
pub struct Ticket(Arc<AtomicUsize>);

impl Ticket {
    /// One more is on its way.
    #[must_use]
    pub fn new(waiting: &Arc<AtomicUsize>) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting.clone())
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A handle that does not keep the actor in the world.
pub struct WeakKept<A: Actor>(Weak<Shared<A>>);

impl<A: Actor> WeakKept<A> {
    /// The handle, while somebody else holds one.
    #[must_use]
    pub fn upgrade(&self) -> Option<Kept<A>> {
        self.0.upgrade().map(|shared| Kept { shared })
    }
}

impl<A: Actor<Context = Context<A>>> Kept<A> {
    /// Starts the first incarnation and whoever makes the next ones. Must be called on the actors' own thread.
    #[must_use]
    pub fn keep(name: &'static str, clock: Arc<dyn Clock>, mut make: impl FnMut(Life) -> A + 'static) -> Self {
        let (deaths, mut dead) = mpsc::unbounded_channel();
        let life = move || Life { deaths: deaths.clone(), expected: false };
        let shared = Arc::new(Shared {
            place: watch::Sender::new(Place::Up(make(life()).start())),
            waiting: Arc::default(),
            restarts: AtomicU32::new(0),
            last_cause: Mutex::default(),
        });
        let keeper = Arc::downgrade(&shared);
        actix::spawn(async move {
            let (mut failures, mut born_ms) = (0u32, clock.now_ms());
            while let Some(death) = dead.recv().await {
                let Some(shared) = keeper.upgrade() else { return };
                let Some(cause) = death else {
                    shared.place.send_replace(Place::Over);
                    return;
                };
                tracing::error!(actor = name, cause, "an actor died and is made again");
                shared.place.send_replace(Place::Down);
                shared.restarts.fetch_add(1, Ordering::Relaxed);
                *shared.last_cause.lock().unwrap_or_else(PoisonError::into_inner) = Some(cause.to_owned());
                let now_ms = clock.now_ms();
                failures =
                    if now_ms.saturating_sub(born_ms) >= STEADY_AFTER_MS { 1 } else { failures.saturating_add(1) };
                // The first one at once: one accident should cost nothing.
                if failures > 1 {
                    clock.sleep_until(now_ms.saturating_add(back_off_ms(failures - 2))).await;
                }
                born_ms = clock.now_ms();
                shared.place.send_replace(Place::Up(make(life()).start()));
            }
        });
        Self { shared }
    }

    /// Sends a message and waits for its answer; waits for the next incarnation while there is none.
    ///
    /// # Errors
    /// `Closed` if the incarnation that had the message died, or if the actor has ended for good.
    pub async fn send<M>(&self, message: M) -> Result<M::Result, MailboxError>
    where
        A: Handler<M>,
        A::Context: ToEnvelope<A, M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        let _ticket = self.ticket();
        let address = {
            let mut place = self.shared.place.subscribe();
            let found = place
                .wait_for(|place| match place {
                    Place::Up(address) => address.connected(),
                    Place::Down => false,
                    Place::Over => true,
                })
                .await;
            match found.as_deref() {
                Ok(Place::Up(address)) => address.clone(),
                _ => return Err(MailboxError::Closed),
            }
        };
        address.send(message).await
    }

    /// Sends a message that may get lost, without waiting.
    ///
    /// # Errors
    /// There is no room for it, or nobody to take it.
    pub fn try_send<M>(&self, message: M) -> Result<(), SendError<M>>
    where
        A: Handler<M>,
        A::Context: ToEnvelope<A, M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        let address = match &*self.shared.place.borrow() {
            Place::Up(address) => address.clone(),
            Place::Down | Place::Over => return Err(SendError::Closed(message)),
        };
        address.try_send(message)
    }

    /// Counts a message of the caller's own as on its way.
    #[must_use]
    pub fn ticket(&self) -> Ticket {
        Ticket::new(&self.shared.waiting)
    }

    /// Messages that have been sent and not answered yet.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.shared.waiting.load(Ordering::Relaxed) as u64
    }

    /// How often it was made again.
    #[must_use]
    pub fn restarts(&self) -> u32 {
        self.shared.restarts.load(Ordering::Relaxed)
    }

    /// Why the last one died.
    #[must_use]
    pub fn last_cause(&self) -> Option<String> {
        self.shared.last_cause.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A handle that does not keep it in the world.
    #[must_use]
    pub fn downgrade(&self) -> WeakKept<A> {
        WeakKept(Arc::downgrade(&self.shared))
    }
}
