//! Paths of a layer: relative to the image's root, bytes, bounded, and never leading out of it.
//!
//! Pure. Names in a layer must be relative and without `..`; a leading `./` and doubled slashes are what real tools write and are
//! taken away. Targets of hard links may be absolute (some builders write them so): they still mean a place inside the image.

use crate::limits::{NAME_BYTES, PATH_BYTES};

/// Why a path is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PathError {
    #[error("the name is absolute")]
    Absolute,
    #[error("the name climbs out with '..'")]
    Parent,
    #[error("the path is longer than 4096 bytes")]
    TooLong,
    #[error("a name in the path is longer than 255 bytes")]
    NameTooLong,
    #[error("the path holds a zero byte")]
    Zero,
}

/// The components of an entry's name; empty for the root itself.
pub(crate) fn entry_components(path: &[u8]) -> Result<Vec<&[u8]>, PathError> {
    if path.starts_with(b"/") && path.iter().any(|byte| *byte != b'/') {
        return Err(PathError::Absolute);
    }
    components(path)
}

/// The components of a hard link's target.
pub(crate) fn target_components(path: &[u8]) -> Result<Vec<&[u8]>, PathError> {
    components(path)
}

fn components(path: &[u8]) -> Result<Vec<&[u8]>, PathError> {
    if path.len() > PATH_BYTES {
        return Err(PathError::TooLong);
    }
    if path.contains(&0) {
        return Err(PathError::Zero);
    }
    let mut out = Vec::new();
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return Err(PathError::Parent),
            name if name.len() > NAME_BYTES => return Err(PathError::NameTooLong),
            name => out.push(name),
        }
    }
    Ok(out)
}

/// Path bytes as text for messages: lossy and bounded.
pub(crate) fn for_people(path: &[u8]) -> String {
    const SHOWN: usize = 200;
    let mut text: String = String::from_utf8_lossy(&path[..path.len().min(SHOWN)]).escape_debug().collect();
    if path.len() > SHOWN {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_spellings_are_cleaned_and_escapes_refused() {
        assert_eq!(entry_components(b"./a//b/./c/"), Ok(vec![&b"a"[..], b"b", b"c"]));
        for root in [&b""[..], b".", b"./", b"/", b"//"] {
            assert_eq!(entry_components(root), Ok(vec![]), "{root:?}");
        }
        assert_eq!(entry_components(b"/etc/passwd"), Err(PathError::Absolute));
        assert_eq!(entry_components(b"a/../b"), Err(PathError::Parent));
        assert_eq!(entry_components(b".."), Err(PathError::Parent));
        assert_eq!(entry_components(b"a\0b"), Err(PathError::Zero));
        assert_eq!(entry_components(b"..a/b..").map(|names| names.len()), Ok(2));
        assert_eq!(target_components(b"/usr/bin/x"), Ok(vec![&b"usr"[..], b"bin", b"x"]));
        assert_eq!(target_components(b"/../x"), Err(PathError::Parent));
    }

    #[test]
    fn lengths_are_bounded_at_the_limit() {
        assert!(entry_components(&[b'a'; NAME_BYTES]).is_ok());
        assert_eq!(entry_components(&[b'a'; NAME_BYTES + 1]), Err(PathError::NameTooLong));
        assert!(entry_components("a/".repeat(PATH_BYTES / 2).as_bytes()).is_ok());
        assert_eq!(entry_components("a/".repeat(PATH_BYTES / 2 + 1).as_bytes()), Err(PathError::TooLong));
    }
}
