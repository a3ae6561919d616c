//! Collections that wait for a backend: bounded, oldest dropped first and counted. Pure.

use std::collections::VecDeque;

/// A bounded queue that never refuses the newest.
#[derive(Debug)]
pub(crate) struct Buffer<T> {
    waiting: VecDeque<T>,
    max: usize,
    dropped: u64,
}

impl<T> Buffer<T> {
    /// A buffer of at most `max` entries, at least one.
    pub(crate) fn new(max: usize) -> Self {
        Self { waiting: VecDeque::new(), max: max.max(1), dropped: 0 }
    }

    /// Takes the newest; drops the oldest if there is no room.
    pub(crate) fn push(&mut self, entry: T) {
        if self.waiting.len() == self.max {
            self.waiting.pop_front();
            self.dropped += 1;
        }
        self.waiting.push_back(entry);
    }

    /// The oldest, to be sent.
    pub(crate) fn pop(&mut self) -> Option<T> {
        self.waiting.pop_front()
    }

    /// Puts back what could not be sent; it is dropped if newer ones have taken its place.
    pub(crate) fn put_back(&mut self, entry: T) {
        if self.waiting.len() == self.max {
            self.dropped += 1;
        } else {
            self.waiting.push_front(entry);
        }
    }

    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// How many were dropped since the last call.
    pub(crate) fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_first_and_is_counted() {
        let mut buffer = Buffer::new(2);
        (1..=3).for_each(|n| buffer.push(n));
        assert_eq!((buffer.len(), buffer.take_dropped(), buffer.take_dropped()), (2, 1, 0));
        assert_eq!(buffer.pop(), Some(2));
        buffer.push(4);
        buffer.put_back(2);
        assert_eq!((buffer.take_dropped(), buffer.pop()), (1, Some(3)));
        buffer.put_back(3);
        assert_eq!((buffer.pop(), buffer.pop(), buffer.pop()), (Some(3), Some(4), None));
    }
}
