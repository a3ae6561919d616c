//! The credit of a stream: how many bytes of stdin may still be sent. Filled by the service's `stdin_credit` messages, drained
//! by the writer. It never grows beyond [`WINDOW_MAX`], whatever the service says.

use std::sync::Mutex;

use tokio::sync::Notify;

/// Most credit that is ever kept, in bytes.
pub(crate) const WINDOW_MAX: u64 = 64 << 20;

/// Credit shared by the reader of a session, which adds, and the writer, which takes.
#[derive(Debug)]
pub(crate) struct Window {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    available: u64,
    closed: bool,
}

impl Window {
    /// A window of this many bytes.
    pub(crate) fn new(available: u64) -> Self {
        Self {
            state: Mutex::new(State { available: available.min(WINDOW_MAX), closed: false }),
            changed: Notify::new(),
        }
    }

    /// Adds credit.
    pub(crate) fn add(&self, bytes: u64) {
        let mut state = self.lock();
        state.available = state.available.saturating_add(bytes).min(WINDOW_MAX);
        drop(state);
        self.changed.notify_one();
    }

    /// The stream is over: whoever waits for credit gets none.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_waiters();
        self.changed.notify_one();
    }

    /// Takes 1 to `wanted` bytes of credit, waiting until there is some; `None` once the stream is over.
    pub(crate) async fn take(&self, wanted: usize) -> Option<usize> {
        loop {
            {
                let mut state = self.lock();
                if state.closed {
                    return None;
                }
                let granted = state.available.min(wanted as u64);
                if granted > 0 || wanted == 0 {
                    state.available -= granted;
                    return usize::try_from(granted).ok();
                }
            }
            // There is one writer, and `notify_one` leaves a permit behind, so a wake-up between the look and the wait counts.
            self.changed.notified().await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn credit_is_taken_to_the_last_byte_and_then_waited_for() {
        let window = Arc::new(Window::new(10));
        assert_eq!(window.take(4).await, Some(4));
        assert_eq!(window.take(100).await, Some(6));
        let waiter = tokio::spawn({
            let window = Arc::clone(&window);
            async move { window.take(100).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        window.add(3);
        assert_eq!(waiter.await.unwrap(), Some(3));
    }

    #[tokio::test]
    async fn a_closed_window_gives_nothing_and_wakes_the_waiter() {
        let window = Arc::new(Window::new(0));
        let waiter = tokio::spawn({
            let window = Arc::clone(&window);
            async move { window.take(1).await }
        });
        tokio::task::yield_now().await;
        window.close();
        assert_eq!(waiter.await.unwrap(), None);
        assert_eq!(window.take(1).await, None);
    }

    #[tokio::test]
    async fn absurd_credit_is_bounded() {
        let window = Window::new(u64::MAX);
        window.add(u64::MAX);
        assert_eq!(window.take(usize::MAX).await, usize::try_from(WINDOW_MAX).ok());
    }
}
