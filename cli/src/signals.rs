//! Signals that a command forwards to a workload instead of dying of them, and the counting that lets a person insist.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Requests to end that make msb give up on a polite end (as in docker).
pub const INSIST_COUNT: u32 = 3;

const SIGHUP: i32 = 1;
const SIGINT: i32 = 2;
const SIGQUIT: i32 = 3;
const SIGUSR1: i32 = 10;
const SIGUSR2: i32 = 12;
const SIGTERM: i32 = 15;
const SIGWINCH: i32 = 28;

/// What a signal to msb means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// Forward this number.
    Forward(i32),
    /// The terminal has another size.
    Resize,
    /// The person insists: end now, with the code of this signal.
    Insist(i32),
}

/// Receives the signals of this process from its creation on.
pub struct Signals {
    received: mpsc::Receiver<i32>,
    counter: Counter,
}

impl Signals {
    /// Takes over the signals. Must be called inside the runtime.
    #[must_use]
    pub fn take() -> Self {
        let (sender, received) = mpsc::channel(16);
        for number in [SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGTERM, SIGWINCH] {
            // A signal that cannot be taken over keeps its default, which is to end msb: the daemon then ends what was attached.
            let Ok(mut stream) = signal(SignalKind::from_raw(number)) else { continue };
            let sender = sender.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() {
                    if sender.send(number).await.is_err() {
                        return;
                    }
                }
            });
        }
        Self { received, counter: Counter::default() }
    }

    /// The next signal. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Meaning {
        match self.received.recv().await {
            Some(number) => self.counter.meaning(number),
            // Every stream ended: the runtime is going down, and so is whoever waits here.
            None => std::future::pending().await,
        }
    }

    /// The next signal that ends a process; for a wait in which there is nobody to forward one to.
    pub async fn ending(&mut self) -> i32 {
        loop {
            match self.next().await {
                Meaning::Forward(number @ (SIGHUP | SIGINT | SIGQUIT | SIGTERM)) | Meaning::Insist(number) => {
                    return number;
                }
                Meaning::Forward(_) | Meaning::Resize => {}
            }
        }
    }
}

/// Counts requests to end.
#[derive(Debug, Default)]
struct Counter {
    requests: u32,
}

impl Counter {
    fn meaning(&mut self, number: i32) -> Meaning {
        match number {
            SIGWINCH => Meaning::Resize,
            SIGINT | SIGTERM => {
                self.requests += 1;
                if self.requests >= INSIST_COUNT { Meaning::Insist(number) } else { Meaning::Forward(number) }
            }
            _ => Meaning::Forward(number),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_third_request_to_end_insists_and_other_signals_do_not_count() {
        let mut counter = Counter::default();
        let meanings = [SIGINT, SIGUSR1, SIGHUP, SIGTERM, SIGWINCH, SIGINT].map(|number| counter.meaning(number));
        use Meaning::*;
        assert_eq!(
            meanings,
            [Forward(SIGINT), Forward(SIGUSR1), Forward(SIGHUP), Forward(SIGTERM), Resize, Insist(SIGINT)]
        );
    }
}
