//! Where a copy goes: the rules of `docker cp` about slashes, dots and what is at the destination already. Pure; used by `copy`.
//!
//! | source | destination | result |
//! |---|---|---|
//! | file | is not there | the file under this name |
//! | file | is not there, ends with `/` | error |
//! | file | a file | replaces it |
//! | anything | a directory | into it, under the source's own name |
//! | directory | is not there | a directory of this name |
//! | directory | a file | error |
//! | `directory/.` | a directory | its entries into it |

use msb_protocol::error::{ApiError, ErrorCode};

use crate::error::Error;

/// What is at a path, links followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    File,
    Directory,
}

/// Where the tree is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// In which directory.
    pub(super) directory: Vec<u8>,
    /// Under which name; none: the directory itself is filled.
    pub(super) name: Option<Vec<u8>>,
}

impl Place {
    /// The root's name in the stream.
    pub(super) fn stream_name(&self) -> &[u8] {
        self.name.as_deref().unwrap_or(b".")
    }
}

/// Decides.
///
/// # Errors
/// `path_not_found`, `path_exists`, naming the destination.
pub(super) fn place(source: &[u8], is_directory: bool, destination: &[u8], found: Found) -> Result<Place, Error> {
    let refuse = |code, why: &str| {
        let shown = msb_tree::shown(destination);
        Err(Error::Client(ApiError::new(code, format!("cannot copy to '{shown}': {why}"))))
    };
    let own = base_name(source);
    match found {
        Found::Directory => Ok(Place { directory: destination.to_vec(), name: own.map(<[u8]>::to_vec) }),
        Found::File if is_directory => refuse(ErrorCode::PathExists, "a file is there, and the source is a directory"),
        Found::Nothing if !is_directory && destination.ends_with(b"/") => {
            refuse(ErrorCode::PathNotFound, "the directory does not exist")
        }
        Found::File | Found::Nothing => match split(destination) {
            Some((directory, name)) => Ok(Place { directory, name: Some(name) }),
            None => refuse(ErrorCode::PathNotFound, "it does not exist"),
        },
    }
}

/// The last component without trailing slashes; none for `/`, `.`, `..` and what ends so: there it is the entries that are meant.
fn base_name(path: &[u8]) -> Option<&[u8]> {
    let trimmed = trim(path);
    let name = trimmed.rsplit(|byte| *byte == b'/').next().unwrap_or(trimmed);
    (!name.is_empty() && name != b"." && name != b"..").then_some(name)
}

/// Directory and name of a path.
pub(super) fn split(path: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let name = base_name(path)?;
    let trimmed = trim(path);
    let directory = &trimmed[..trimmed.len() - name.len()];
    let directory = if directory.is_empty() { b".".to_vec() } else { directory.to_vec() };
    Some((directory, name.to_vec()))
}

fn trim(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
    &path[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_those_of_docker() {
        use Found::*;
        for (source, is_directory, destination, found, wanted) in [
            ("a/f", false, "new", Nothing, Ok((".", Some("new")))),
            ("a/f", false, "/x/new", Nothing, Ok(("/x/", Some("new")))),
            ("a/f", false, "/x/new/", Nothing, Err(ErrorCode::PathNotFound)),
            ("a/f", false, "/x/old", File, Ok(("/x/", Some("old")))),
            ("a/f", false, "/x", Directory, Ok(("/x", Some("f")))),
            ("a/f", false, "/", Directory, Ok(("/", Some("f")))),
            ("a/d", true, "/x/new", Nothing, Ok(("/x/", Some("new")))),
            ("a/d/", true, "/x/new/", Nothing, Ok(("/x/", Some("new")))),
            ("a/d/.", true, "/x/new", Nothing, Ok(("/x/", Some("new")))),
            ("a/d", true, "/x/old", File, Err(ErrorCode::PathExists)),
            ("a/d", true, "/x", Directory, Ok(("/x", Some("d")))),
            ("a/d//", true, "/x/", Directory, Ok(("/x/", Some("d")))),
            ("a/d/.", true, "/x", Directory, Ok(("/x", None))),
            (".", true, "/x", Directory, Ok(("/x", None))),
            ("..", true, "/x", Directory, Ok(("/x", None))),
            ("/", true, "/x", Directory, Ok(("/x", None))),
            ("a/f", false, "..", Nothing, Err(ErrorCode::PathNotFound)),
            ("a/f", false, "", Nothing, Err(ErrorCode::PathNotFound)),
        ] {
            let got = place(source.as_bytes(), is_directory, destination.as_bytes(), found);
            let got = got.map_err(|error| error.code());
            let wanted = wanted.map(|(directory, name): (&str, Option<&str>)| Place {
                directory: directory.into(),
                name: name.map(|name| name.as_bytes().to_vec()),
            });
            assert_eq!(got, wanted, "{source} → {destination} ({found:?})");
        }
    }
}
