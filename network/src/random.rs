//! Numbers that a peer cannot foresee, made from one seed that the caller takes from the operating system: DNS ids, initial sequence
//! numbers, ephemeral ports. A seed given by a test makes every run the same. Not for keys.

use std::hash::{DefaultHasher, Hasher};

/// A generator: SipHash of the seed and a counter.
#[derive(Clone, Debug)]
pub struct Random {
    seed: [u64; 2],
    counter: u64,
}

impl Random {
    /// A generator of its own for one purpose: generators of one seed and different purposes are unrelated.
    #[must_use]
    pub fn new(seed: u64, purpose: &'static str) -> Self {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(seed);
        hasher.write(purpose.as_bytes());
        Self { seed: [seed, hasher.finish()], counter: 0 }
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.counter += 1;
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.seed[0]);
        hasher.write_u64(self.counter);
        hasher.write_u64(self.seed[1]);
        hasher.finish()
    }

    /// The next number of 16 bits.
    pub fn next_u16(&mut self) -> u16 {
        self.next_u64() as u16
    }
}
