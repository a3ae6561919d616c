//! Collections that wait for a backend: bounded, oldest dropped first and counted. What is being sent stays at the front until the
//! backend has taken it, so that neither a failure nor the end of the process loses it. Pure.

use std::collections::VecDeque;

/// A bounded queue that never refuses the newest.
#[derive(Debug)]
pub(crate) struct Buffer<T> {
    waiting: VecDeque<(u64, T)>,
    max: usize,
    dropped: u64,
    next_id: u64,
}

impl<T: Clone> Buffer<T> {
    /// A buffer of at most `max` entries, at least one.
    pub(crate) fn new(max: usize) -> Self {
        Self { waiting: VecDeque::new(), max: max.max(1), dropped: 0, next_id: 0 }
    }

    /// Takes the newest; drops the oldest if there is no room.
    pub(crate) fn push(&mut self, entry: T) {
        if self.waiting.len() == self.max {
            self.waiting.pop_front();
            self.dropped += 1;
        }
        self.waiting.push_back((self.next_id, entry));
        self.next_id += 1;
    }

    /// The oldest, to be sent, and its number.
    pub(crate) fn front(&self) -> Option<(u64, T)> {
        self.waiting.front().cloned()
    }

    /// It was sent. One that was dropped meanwhile was not lost after all.
    pub(crate) fn done(&mut self, id: u64) {
        if self.waiting.front().is_some_and(|(front, _)| *front == id) {
            self.waiting.pop_front();
        } else {
            self.dropped = self.dropped.saturating_sub(1);
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
        let (id, two) = buffer.front().unwrap();
        assert_eq!((two, buffer.front().unwrap().1), (2, 2), "it stays until it is done");
        buffer.done(id);
        assert_eq!(buffer.front().unwrap().1, 3);
    }

    #[test]
    fn what_was_dropped_while_it_was_being_sent_is_not_lost() {
        let mut buffer = Buffer::new(1);
        buffer.push('a');
        let (id, _) = buffer.front().unwrap();
        buffer.push('b');
        buffer.done(id);
        assert_eq!((buffer.take_dropped(), buffer.front().unwrap().1), (0, 'b'));
    }
}
