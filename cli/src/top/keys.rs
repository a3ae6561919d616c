//! Keys of a terminal in raw mode, from the bytes it sends: pure. Called by the loop of `commands::top`.
//!
//! Arrows and their like come as escape sequences (ECMA-48, xterm's and the VT220's); a sequence that is none of these is nothing.
//! An escape with nothing behind it in what was read at once is the key itself.

/// A key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// A character.
    Char(char),
    /// Return.
    Enter,
    /// Escape.
    Escape,
    /// The one that takes back.
    Backspace,
    /// Arrow up.
    Up,
    /// Arrow down.
    Down,
    /// Arrow left.
    Left,
    /// Arrow right.
    Right,
    /// Page up.
    PageUp,
    /// Page down.
    PageDown,
    /// Home.
    Home,
    /// End.
    End,
    /// Control and C.
    Interrupt,
}

/// The keys in what was read at once.
#[must_use]
pub fn parse(bytes: &[u8]) -> Vec<Key> {
    let (mut keys, mut rest) = (Vec::new(), bytes);
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        match *first {
            0x1b => match after {
                [b'[' | b'O', sequence @ ..] => {
                    // Parameters, then one final byte.
                    let end = sequence.iter().position(|byte| (0x40..=0x7e).contains(byte));
                    let Some(end) = end else { return keys };
                    keys.extend(of_sequence(&sequence[..end], sequence[end]));
                    rest = &sequence[end + 1..];
                }
                _ => keys.push(Key::Escape),
            },
            b'\r' | b'\n' => keys.push(Key::Enter),
            0x7f | 0x08 => keys.push(Key::Backspace),
            0x03 => keys.push(Key::Interrupt),
            byte if byte < 0x20 => {}
            _ => {
                let whole = std::str::from_utf8(rest_from(bytes, after)).unwrap_or_else(|error| {
                    let from = rest_from(bytes, after);
                    std::str::from_utf8(&from[..error.valid_up_to()]).unwrap_or_default()
                });
                if let Some(c) = whole.chars().next() {
                    keys.push(Key::Char(c));
                    rest = &after[c.len_utf8() - 1..];
                }
            }
        }
    }
    keys
}

/// What is left of `bytes` with the byte before `after` still there.
fn rest_from<'a>(bytes: &'a [u8], after: &[u8]) -> &'a [u8] {
    &bytes[bytes.len() - after.len() - 1..]
}

fn of_sequence(parameters: &[u8], last: u8) -> Option<Key> {
    Some(match (parameters, last) {
        (_, b'A') => Key::Up,
        (_, b'B') => Key::Down,
        (_, b'C') => Key::Right,
        (_, b'D') => Key::Left,
        (_, b'H') | (b"1" | b"7", b'~') => Key::Home,
        (_, b'F') | (b"4" | b"8", b'~') => Key::End,
        (b"5", b'~') => Key::PageUp,
        (b"6", b'~') => Key::PageDown,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_are_told_apart() {
        assert_eq!(
            parse(b"q\x1b[A\x1bOB\x1b[5~\r\x7f\x03"),
            [Key::Char('q'), Key::Up, Key::Down, Key::PageUp, Key::Enter, Key::Backspace, Key::Interrupt]
        );
        assert_eq!(parse(b"\x1b"), [Key::Escape]);
        assert_eq!(parse(b"\x1bx"), [Key::Escape, Key::Char('x')]);
        assert_eq!(parse("é日".as_bytes()), [Key::Char('é'), Key::Char('日')]);
        assert_eq!(parse(b"\x1b[99~\x1b[1;5C\x1b[7~\x1b[F"), [Key::Right, Key::Home, Key::End]);
        assert_eq!(parse(b"\x1b[12"), []);
        assert_eq!(parse(b"\xffa"), [Key::Char('a')]);
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_keys(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(parse(&bytes).len() <= bytes.len());
        }
    }
}
