//! The keys that leave a terminal session: read from `--detach-keys`, found in what is typed. Pure.

/// Keys when nobody says.
pub const DEFAULT: &str = "ctrl-]";
/// Longest sequence.
const KEYS_MAX: usize = 8;

/// A sequence of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DetachKeys {
    keys: Vec<u8>,
}

impl DetachKeys {
    /// Reads docker's form: single characters or `ctrl-X` with X one of `a-z @ [ \ ] ^ _`, separated by commas. Empty: none.
    ///
    /// # Errors
    /// What is wrong, as clap shows it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut keys = Vec::new();
        for key in text.split(',').filter(|_| !text.is_empty()) {
            keys.push(match (key.strip_prefix("ctrl-"), key.as_bytes()) {
                (Some(name), _) => match name.as_bytes() {
                    [letter @ (b'a'..=b'z' | b'A'..=b'Z' | b'@' | b'['..=b'_')] => letter.to_ascii_uppercase() & 0x1f,
                    _ => return Err(format!("{key:?} is no key: after ctrl- comes a letter or one of @ [ \\ ] ^ _")),
                },
                (None, [single]) if single.is_ascii_graphic() => *single,
                _ => return Err(format!("{key:?} is no key: write a character or ctrl-X, several with commas")),
            });
        }
        if keys.len() > KEYS_MAX { Err(format!("at most {KEYS_MAX} keys")) } else { Ok(Self { keys }) }
    }
}

/// Finds the sequence in a stream of typed bytes.
#[derive(Debug)]
pub struct DetachFilter {
    keys: Vec<u8>,
    matched: usize,
}

impl DetachFilter {
    /// A filter for these keys.
    #[must_use]
    pub fn new(keys: &DetachKeys) -> Self {
        Self { keys: keys.keys.clone(), matched: 0 }
    }

    /// Takes what was typed; gives what goes on to the workload, and whether the sequence is complete (what follows it is dropped).
    /// A beginning of the sequence is held back until it is clear what it is.
    pub fn take(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(typed.len() + self.matched);
        if self.keys.is_empty() {
            out.extend_from_slice(typed);
            return (out, false);
        }
        for byte in typed {
            // Falls back along the sequence's own repetitions, so that `a,a,b` is found in `aaab`.
            while self.matched > 0 && self.keys[self.matched] != *byte {
                let shorter = (0..self.matched)
                    .rev()
                    .find(|len| self.keys[..*len] == self.keys[self.matched - len..self.matched])
                    .unwrap_or(0);
                out.extend_from_slice(&self.keys[..self.matched - shorter]);
                self.matched = shorter;
            }
            if self.keys[self.matched] == *byte {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    self.matched = 0;
                    return (out, true);
                }
            } else {
                out.push(*byte);
            }
        }
        (out, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(text: &str) -> DetachKeys {
        DetachKeys::parse(text).unwrap()
    }

    #[test]
    fn keys_are_read_in_dockers_form() {
        assert_eq!(keys(DEFAULT).keys, [0x1d]);
        assert_eq!(keys("ctrl-p,ctrl-q").keys, [0x10, 0x11]);
        assert_eq!(keys("a,ctrl-@,~").keys, [b'a', 0, b'~']);
        assert!(keys("").keys.is_empty());
        for bad in ["ctrl-", "ctrl-1", "ab", ",", "ü", "a,,b", "a,b,c,d,e,f,g,h,i"] {
            assert!(DetachKeys::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_sequence_is_found_across_reads_and_a_false_start_goes_on() {
        let mut filter = DetachFilter::new(&keys("ctrl-p,ctrl-q"));
        assert_eq!(filter.take(b"ab\x10"), (b"ab".to_vec(), false));
        assert_eq!(filter.take(b"c"), (b"\x10c".to_vec(), false));
        assert_eq!(filter.take(b"\x10\x10"), (b"\x10".to_vec(), false));
        assert_eq!(filter.take(b"\x11rest"), (b"".to_vec(), true));
        let mut filter = DetachFilter::new(&keys("a,a,b"));
        assert_eq!(filter.take(b"aaab"), (b"a".to_vec(), true));
    }

    proptest::proptest! {
        #[test]
        fn nothing_typed_is_lost_or_reordered(typed in proptest::collection::vec(0u8..4, 0..64), cut in 0usize..64) {
            let keys = DetachKeys { keys: vec![1, 1, 2] };
            let found = typed.windows(3).position(|window| window == [1, 1, 2]);
            let mut filter = DetachFilter::new(&keys);
            let (first, second) = typed.split_at(cut.min(typed.len()));
            let (mut out, mut done) = filter.take(first);
            if !done {
                let (more, now) = filter.take(second);
                out.extend(more);
                done = now;
            }
            proptest::prop_assert_eq!(done, found.is_some());
            let end = found.unwrap_or(typed.len());
            let held = if done { 0 } else { filter.matched };
            proptest::prop_assert_eq!(&out[..], &typed[..end - held]);
        }
    }
}
