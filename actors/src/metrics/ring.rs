//! The last hour of one sandbox's samples in few bytes: pure, bounded in time and in bytes.
//!
//! ```text
//!  chunk: first entry whole │ mask, deltas │ mask, deltas │ …      up to CHUNK_LEN entries of one run
//! ```
//!
//! An entry is a row of numbers, the first of which is its time. What did not change since the entry before costs nothing but a bit
//! of its mask; what did costs a variable-length delta. An idle sandbox needs about 12 bytes a second, a busy one about 30.

use std::collections::VecDeque;

use msb_protocol::id::BootId;

/// Numbers of an entry.
pub const FIELDS: usize = 16;
/// Entries of one chunk: what is dropped at once when the ring is full.
const CHUNK_LEN: u32 = 60;

/// One entry: its time in milliseconds on the daemon's clock, then whatever else is kept.
pub type Entry = [u64; FIELDS];

#[derive(Clone, Debug)]
struct Chunk {
    boot_id: BootId,
    first: Entry,
    deltas: Vec<u8>,
    len: u32,
}

impl Chunk {
    fn bytes(&self) -> usize {
        size_of::<Self>() + self.deltas.len()
    }
}

/// The entries, oldest first.
#[derive(Clone, Debug, Default)]
pub struct Ring {
    chunks: VecDeque<Chunk>,
    last: Option<Entry>,
    /// Of all chunks: they are not looked at again for each entry.
    bytes: usize,
}

impl Ring {
    /// Adds an entry, and drops the oldest while they are older than `span_ms` or take more than `bytes_max`.
    pub fn push(&mut self, boot_id: BootId, entry: Entry, span_ms: u64, bytes_max: usize) {
        match (self.chunks.back_mut(), &self.last) {
            (Some(chunk), Some(last)) if chunk.boot_id == boot_id && chunk.len < CHUNK_LEN => {
                let before = chunk.bytes();
                write_delta(last, &entry, &mut chunk.deltas);
                chunk.len += 1;
                self.bytes += chunk.bytes() - before;
            }
            _ => {
                let chunk = Chunk { boot_id, first: entry, deltas: Vec::new(), len: 1 };
                self.bytes += chunk.bytes();
                self.chunks.push_back(chunk);
            }
        }
        self.last = Some(entry);
        let oldest_ms = entry[0].saturating_sub(span_ms);
        while self.chunks.len() > 1
            && (self.chunks.get(1).is_some_and(|second| second.first[0] < oldest_ms) || self.bytes > bytes_max)
        {
            self.bytes -= self.chunks.pop_front().as_ref().map_or(0, Chunk::bytes);
        }
    }

    /// Bytes that the entries take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The entries from `since_ms` on, oldest first, each with its run.
    #[must_use]
    pub fn since(&self, since_ms: u64) -> Vec<(BootId, Entry)> {
        let mut entries = Vec::new();
        for (place, chunk) in self.chunks.iter().enumerate() {
            // All of it is older when the one after it begins before that time.
            if self.chunks.get(place + 1).is_some_and(|next| next.first[0] < since_ms) {
                continue;
            }
            let (mut entry, mut bytes) = (chunk.first, chunk.deltas.as_slice());
            for at in 0..chunk.len {
                if at > 0 {
                    read_delta(&mut entry, &mut bytes);
                }
                if entry[0] >= since_ms {
                    entries.push((chunk.boot_id, entry));
                }
            }
        }
        entries
    }
}

fn write_delta(before: &Entry, after: &Entry, out: &mut Vec<u8>) {
    let changed = |at: usize| before[at] != after[at];
    let mask = (0..FIELDS).filter(|at| changed(*at)).fold(0u64, |mask, at| mask | 1 << at);
    write_number(mask, out);
    for at in (0..FIELDS).filter(|at| changed(*at)) {
        // Two's complement, then the sign in the lowest bit: small steps in both directions are short.
        let delta = after[at].wrapping_sub(before[at]).cast_signed();
        write_number(((delta << 1) ^ (delta >> 63)).cast_unsigned(), out);
    }
}

fn read_delta(entry: &mut Entry, bytes: &mut &[u8]) {
    let mask = read_number(bytes);
    for (at, field) in entry.iter_mut().enumerate() {
        if mask & 1 << at != 0 {
            let folded = read_number(bytes);
            let delta = (folded >> 1).cast_signed() ^ -(folded & 1).cast_signed();
            *field = field.wrapping_add(delta.cast_unsigned());
        }
    }
}

/// LEB128: seven bits a byte, the highest bit says that more follow.
fn write_number(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn read_number(bytes: &mut &[u8]) -> u64 {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        // Only what `write_number` wrote is read here.
        let Some((byte, rest)) = bytes.split_first() else { return number };
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
    }
    number
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR_MS: u64 = 3_600_000;

    fn run(number: u128) -> BootId {
        BootId(uuid::Uuid::from_u128(number))
    }

    #[test]
    fn an_hour_of_an_idle_sandbox_takes_little_and_nothing_older_stays_for_long() {
        let mut ring = Ring::default();
        let mut entry = [0; FIELDS];
        for second in 0..2 * 3_600 {
            entry[0] = second * 1_000;
            entry[1] += 700;
            entry[2] = (40 << 20) + second % 3 * 4_096;
            ring.push(run(1), entry, HOUR_MS, usize::MAX);
        }
        let entries = ring.since(0);
        assert!((3_600..=3_660).contains(&entries.len()), "{}", entries.len());
        assert!(ring.bytes() < 64 << 10, "{} bytes", ring.bytes());
        assert_eq!(entries.last().unwrap().1, entry);
        assert_eq!(ring.since(entry[0] - 9_000).len(), 10);
    }

    #[test]
    fn bytes_are_bounded_whatever_the_numbers() {
        let mut ring = Ring::default();
        for at in 0..20_000u64 {
            let mut entry = [at.wrapping_mul(0x9e37_79b9_7f4a_7c15); FIELDS];
            entry[0] = at;
            ring.push(run(1), entry, HOUR_MS, 32 << 10);
            assert!(ring.bytes() <= 32 << 10);
            assert_eq!(ring.bytes(), ring.chunks.iter().map(Chunk::bytes).sum::<usize>());
        }
        assert!(ring.since(0).len() >= 100);
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(rows in prop::collection::vec((0u128..3, prop::array::uniform16(any::<u64>())), 1..200)) {
            let mut ring = Ring::default();
            let mut expected = Vec::new();
            for (at, (boot, mut entry)) in rows.into_iter().enumerate() {
                entry[0] = at as u64;
                ring.push(run(boot), entry, HOUR_MS, usize::MAX);
                expected.push((run(boot), entry));
            }
            prop_assert_eq!(&ring.since(0), &expected);
            let half = expected.len() / 2;
            prop_assert_eq!(ring.since(half as u64), expected[half..].to_vec());
        }
    }
}
