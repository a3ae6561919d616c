//! An archive that is a file of this machine: named to the service, which reads it in its place, so that nothing is sent and what the store
//! has is not even read. Called by the client; whether the service sees the same file is the service's to say.

use std::fs::File;
use std::io::Seek;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

/// How to name an open file to the service; none for a pipe, a file that is read from its middle, or one that has no name any more.
pub(crate) fn place(mut file: &File) -> Option<[(&'static str, String); 3]> {
    let data = file.metadata().ok()?;
    if !data.is_file() || file.stream_position().ok()? != 0 {
        return None;
    }
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    // What was removed or replaced is not under its name; the service would take another file.
    let named = path.metadata().ok()?;
    ((named.dev(), named.ino()) == (data.dev(), data.ino())).then_some(())?;
    let path = path.into_os_string().into_string().ok()?;
    Some([("path", path), ("device", data.dev().to_string()), ("inode", data.ino().to_string())])
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_whole_file_with_a_name_has_a_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("archive.tar");
        File::create(&path).unwrap().write_all(b"archive").unwrap();
        let mut file = File::open(&path).unwrap();
        let [(_, named), ..] = place(&file).unwrap();
        assert_eq!(named, path.canonicalize().unwrap().to_str().unwrap());
        file.read_exact(&mut [0; 3]).unwrap();
        assert_eq!(place(&file), None, "the rest of a file is not the file");
    }

    #[test]
    fn pipes_and_files_without_a_name_have_none() {
        let (pipe, _writer) = std::io::pipe().unwrap();
        assert_eq!(place(&File::from(std::os::fd::OwnedFd::from(pipe))), None);
        assert_eq!(place(&tempfile::tempfile().unwrap()), None);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("archive.tar");
        let file = File::create_new(&path).unwrap();
        std::fs::rename(&path, folder.path().join("away.tar")).unwrap();
        std::fs::write(&path, "another").unwrap();
        let [(_, named), ..] = place(&file).unwrap();
        assert!(named.ends_with("away.tar"), "{named}: it is known by where it is now");
    }
}
