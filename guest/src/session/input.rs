//! Standard input on its way from the host to the process: bounded by credit, whoever sends it. Pure but for the bytes it holds.
//!
//! Each client starts with [`STDIN_WINDOW`] bytes of credit and gets more as the process reads. A client that sends beyond its
//! credit breaks the protocol. When nobody will read any more, what arrives is dropped and credited, so that no sender hangs.

use std::collections::VecDeque;

use msb_protocol::guest::STDIN_WINDOW;

/// Credit is given back in pieces of at least this many bytes, or when nothing is left to write.
const CREDIT_MIN: u32 = STDIN_WINDOW / 4;

/// A client sent more than its credit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stdin beyond the credit of {STDIN_WINDOW} bytes")]
pub struct CreditExceeded;

/// One client's account.
#[derive(Debug)]
pub struct Credit {
    allowed: u32,
    consumed: u32,
}

impl Default for Credit {
    fn default() -> Self {
        Self { allowed: STDIN_WINDOW, consumed: 0 }
    }
}

impl Credit {
    /// Bytes arrived.
    ///
    /// # Errors
    /// [`CreditExceeded`].
    pub fn take(&mut self, len: usize) -> Result<(), CreditExceeded> {
        self.allowed = u32::try_from(len).ok().and_then(|len| self.allowed.checked_sub(len)).ok_or(CreditExceeded)?;
        Ok(())
    }

    /// Bytes were read by the process (or dropped).
    pub fn consume(&mut self, len: usize) {
        // What is consumed was taken before, so the sum stays within the window.
        self.consumed = self.consumed.saturating_add(u32::try_from(len).unwrap_or(u32::MAX));
    }

    /// The credit to send now, 0 if it can wait. `idle`: nothing of this client is left to write.
    pub fn grant(&mut self, idle: bool) -> u32 {
        if self.consumed == 0 || (self.consumed < CREDIT_MIN && !idle) {
            return 0;
        }
        let grant = std::mem::take(&mut self.consumed);
        self.allowed = self.allowed.saturating_add(grant);
        grant
    }
}

/// What waits to be written to the process, in the order of arrival, with the client it came from.
#[derive(Debug, Default)]
pub struct InputQueue {
    chunks: VecDeque<(u64, Vec<u8>)>,
    offset: usize,
    ended: bool,
}

impl InputQueue {
    /// Adds bytes of a client; nothing counts after the end.
    pub fn push(&mut self, client: u64, data: Vec<u8>) {
        if !data.is_empty() && !self.ended {
            self.chunks.push_back((client, data));
        }
    }

    /// Input ends after what waits.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Whether the end has been asked for.
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// The next bytes to write.
    pub fn front(&self) -> Option<&[u8]> {
        self.chunks.front().map(|(_, data)| &data[self.offset..])
    }

    /// Bytes of the front were written: whose, and whether more of that client waits.
    pub fn advance(&mut self, len: usize) -> Option<(u64, bool)> {
        let (client, data) = self.chunks.front()?;
        let client = *client;
        self.offset += len;
        if self.offset >= data.len() {
            self.chunks.pop_front();
            self.offset = 0;
        }
        Some((client, self.chunks.iter().any(|(other, _)| *other == client)))
    }

    /// Whether the descriptor can be closed: the end was asked for and nothing waits.
    pub fn is_finished(&self) -> bool {
        self.ended && self.chunks.is_empty()
    }

    /// Drops everything: nobody reads. Gives the clients whose bytes were dropped.
    pub fn abandon(&mut self) -> Vec<(u64, usize)> {
        let offset = std::mem::take(&mut self.offset);
        self.ended = true;
        self.chunks
            .drain(..)
            .enumerate()
            .map(|(at, (client, data))| (client, data.len() - if at == 0 { offset } else { 0 }))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn beyond_the_window_is_refused_and_small_credit_waits() {
        let mut credit = Credit::default();
        assert_eq!(credit.take(STDIN_WINDOW as usize), Ok(()));
        assert_eq!(credit.take(1), Err(CreditExceeded));
        let mut credit = Credit::default();
        credit.take(100).unwrap();
        credit.consume(100);
        assert_eq!(credit.grant(false), 0);
        assert_eq!(credit.grant(true), 100);
        assert_eq!(credit.grant(true), 0);
        assert_eq!(credit.take(usize::MAX), Err(CreditExceeded));
    }

    proptest! {
        #[test]
        fn an_honest_sender_is_never_refused_and_never_stalls(pieces in prop::collection::vec(1usize..100_000, 1..60), reads in prop::collection::vec(1usize..90_000, 1..8)) {
            let (mut credit, mut queue) = (Credit::default(), InputQueue::default());
            let (mut may_send, mut waiting, mut reads) = (STDIN_WINDOW as usize, 0usize, reads.iter().cycle());
            for piece in pieces {
                let mut left = piece;
                while left > 0 {
                    let now = left.min(may_send);
                    if now > 0 {
                        prop_assert_eq!(credit.take(now), Ok(()));
                        queue.push(1, vec![0; now]);
                        (may_send, left, waiting) = (may_send - now, left - now, waiting + now);
                    }
                    prop_assert!(waiting <= STDIN_WINDOW as usize);
                    if let Some(front) = queue.front() {
                        let len = front.len().min(*reads.next().unwrap());
                        let (client, more) = queue.advance(len).unwrap();
                        prop_assert_eq!(client, 1);
                        waiting -= len;
                        credit.consume(len);
                        may_send += credit.grant(!more) as usize;
                    } else {
                        prop_assert!(may_send > 0, "a stall: nothing waits and nothing may be sent");
                    }
                }
            }
            let dropped: usize = queue.abandon().iter().map(|(_, len)| len).sum();
            prop_assert_eq!(dropped, waiting);
        }
    }
}
