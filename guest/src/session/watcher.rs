//! What a client may hold back: the rule for output that arrives faster than a client reads. Pure; used by `pump`.
//!
//! A primary client is lossless: when its outbox is full the process waits. A watcher of the main workload has its own buffer of
//! [`WATCHER_BUFFER`] bytes; what does not fit is counted and reported before the next output that does.

/// Bytes a watcher may lag behind.
pub const WATCHER_BUFFER: usize = 1 << 20;

/// What to do with one piece of output for one watcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Queue it; first say how many bytes were lost before it, if any.
    Send {
        /// Bytes lost since the last delivery.
        lost: u64,
    },
    /// Drop it.
    Drop,
}

/// The account of one watcher.
#[derive(Debug, Default)]
pub struct Lag {
    lost: u64,
}

impl Lag {
    /// Decides about `len` bytes when `backlog` bytes wait. After a loss it delivers again only when half the buffer is free, so
    /// that losses come in few large pieces.
    pub fn offer(&mut self, len: usize, backlog: usize) -> Delivery {
        let limit = if self.lost > 0 { WATCHER_BUFFER / 2 } else { WATCHER_BUFFER };
        if backlog + len > limit {
            self.lost = self.lost.saturating_add(len as u64);
            return Delivery::Drop;
        }
        Delivery::Send { lost: std::mem::take(&mut self.lost) }
    }

    /// What was lost and not yet told, for the end.
    pub fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_fast_watcher_loses_nothing() {
        let mut lag = Lag::default();
        assert_eq!(lag.offer(65_536, 0), Delivery::Send { lost: 0 });
        assert_eq!(lag.offer(65_536, WATCHER_BUFFER - 65_536), Delivery::Send { lost: 0 });
        assert_eq!(lag.take_lost(), 0);
    }

    proptest! {
        #[test]
        fn the_buffer_is_bounded_and_every_byte_is_sent_or_told(steps in prop::collection::vec((1usize..65_536, 0usize..200_000), 1..200)) {
            let (mut lag, mut backlog, mut offered, mut sent, mut told) = (Lag::default(), 0usize, 0u64, 0u64, 0u64);
            for (len, read) in steps {
                backlog = backlog.saturating_sub(read);
                offered += len as u64;
                if let Delivery::Send { lost } = lag.offer(len, backlog) {
                    backlog += len;
                    sent += len as u64;
                    told += lost;
                }
                prop_assert!(backlog <= WATCHER_BUFFER);
            }
            prop_assert_eq!(offered, sent + told + lag.take_lost());
        }
    }
}
