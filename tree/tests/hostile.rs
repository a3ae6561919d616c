//! Streams that nobody vouches for: whatever they say, nothing outside of the destination changes, and nothing half is left in it.

use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use msb_protocol::error::ErrorCode;
use msb_tree::{Owner, UnpackOptions, unpack};
use tar::{EntryType, Header};

/// One entry of a stream, with a path and a link that the tar crate itself would refuse.
fn entry(stream: &mut Vec<u8>, path: &[u8], kind: EntryType, link: &[u8], content: &[u8]) {
    let mut header = Header::new_gnu();
    let gnu = header.as_gnu_mut().unwrap();
    gnu.name[..path.len()].copy_from_slice(path);
    gnu.linkname[..link.len()].copy_from_slice(link);
    header.set_mode(0o4755);
    header.set_uid(4242);
    header.set_gid(4242);
    header.set_mtime(1_000_000_000);
    header.set_entry_type(kind);
    header.set_size(content.len() as u64);
    header.set_cksum();
    stream.extend_from_slice(header.as_bytes());
    stream.extend_from_slice(content);
    stream.resize(stream.len().next_multiple_of(512), 0);
}

/// An extended header with these records.
fn records(stream: &mut Vec<u8>, pairs: &[(&str, &[u8])]) {
    let mut text = Vec::new();
    for (key, value) in pairs {
        let rest = key.len() + value.len() + 3;
        let len = (rest + 1..).find(|len| rest + len.to_string().len() == *len).unwrap();
        text.extend_from_slice(format!("{len} {key}=").as_bytes());
        text.extend_from_slice(value);
        text.push(b'\n');
    }
    entry(stream, b"pax", EntryType::XHeader, b"", &text);
}

type Outcome = Result<Vec<String>, (ErrorCode, String)>;

fn run(directory: &Path, name: Option<&str>, stream: &[u8]) -> Outcome {
    let opened = std::fs::File::open(directory).unwrap();
    let mut warnings = Vec::new();
    let options = UnpackOptions { name: name.map(str::as_bytes), owner: Owner::Caller };
    match unpack(opened.as_fd(), options, stream, &mut |warning| warnings.push(warning)) {
        Ok(_) => Ok(warnings),
        Err(error) => Err((error.code(), error.to_string())),
    }
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn paths_that_lead_out_are_refused_and_leave_nothing() {
    for (path, name) in [
        (&b"../evil"[..], None),
        (b"/evil", None),
        (b"a/../../evil", None),
        (b"a/..", None),
        (b"evil", Some("wanted")),
        (b"wanted/../evil", Some("wanted")),
        (b"./evil", Some("wanted")),
        (b".", Some("wanted")),
    ] {
        let home = tempfile::tempdir().unwrap();
        let inside = home.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        let mut stream = Vec::new();
        if let Some(name) = name {
            entry(&mut stream, name.as_bytes(), EntryType::Directory, b"", b"");
        }
        entry(&mut stream, path, EntryType::Regular, b"", b"evil");
        let (code, text) = run(&inside, name, &stream).unwrap_err();
        assert_eq!(code, ErrorCode::InvalidArchive, "{text}");
        assert_eq!((names(home.path()), names(&inside)), (vec!["inside".to_owned()], vec![]), "{text}");
    }
}

#[test]
fn a_link_is_never_followed_whoever_made_it() {
    let home = tempfile::tempdir().unwrap();
    let (inside, outside) = (home.path().join("inside"), home.path().join("outside"));
    std::fs::create_dir(&inside).unwrap();
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("file"), "mine").unwrap();
    symlink(&outside, inside.join("old")).unwrap();
    symlink(outside.join("file"), inside.join("name")).unwrap();

    // One that was there, one that the stream made, one as a hard link's target.
    let mut stream = Vec::new();
    entry(&mut stream, b"old/evil", EntryType::Regular, b"", b"evil");
    assert_eq!(run(&inside, None, &stream).unwrap_err().0, ErrorCode::PathExists);
    let mut stream = Vec::new();
    entry(&mut stream, b"new", EntryType::Symlink, b"../outside", b"");
    entry(&mut stream, b"new/evil", EntryType::Regular, b"", b"evil");
    assert_eq!(run(&inside, None, &stream).unwrap_err().0, ErrorCode::PathExists);
    assert_eq!(run(&inside, Some("new"), &stream).unwrap_err().0, ErrorCode::PathExists);
    let mut stream = Vec::new();
    entry(&mut stream, b"dir", EntryType::Directory, b"", b"");
    entry(&mut stream, b"dir/up", EntryType::Symlink, b"../../outside", b"");
    entry(&mut stream, b"dir/hard", EntryType::Link, b"dir/up/file", b"");
    assert_eq!(run(&inside, Some("dir"), &stream).unwrap_err().0, ErrorCode::InvalidArchive);
    // A link under the very name is replaced itself.
    let mut stream = Vec::new();
    entry(&mut stream, b"name", EntryType::Regular, b"", b"content");
    run(&inside, Some("name"), &stream).unwrap();

    assert_eq!(names(&outside), ["file"]);
    assert_eq!(std::fs::read_to_string(outside.join("file")).unwrap(), "mine");
    assert_eq!(std::fs::read_to_string(inside.join("name")).unwrap(), "content");
    assert!(!inside.join("name").symlink_metadata().unwrap().is_symlink());
    assert_eq!(names(&inside), ["name", "new", "old"]);
}

#[test]
fn hard_links_lead_only_to_what_was_copied() {
    for target in [&b"/etc/passwd"[..], b"../secret", b"secret", b"wanted/nothing", b"wanted/../../secret", b"wanted"] {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("secret"), "mine").unwrap();
        let mut stream = Vec::new();
        entry(&mut stream, b"wanted", EntryType::Directory, b"", b"");
        entry(&mut stream, b"wanted/hard", EntryType::Link, target, b"");
        assert_eq!(run(home.path(), Some("wanted"), &stream).unwrap_err().0, ErrorCode::InvalidArchive);
        assert_eq!(names(home.path()), ["secret"]);
    }
    // And they never lend what is written later: a file is replaced, not written through.
    let home = tempfile::tempdir().unwrap();
    std::fs::create_dir(home.path().join("wanted")).unwrap();
    std::fs::write(home.path().join("wanted/old"), "old").unwrap();
    let mut stream = Vec::new();
    entry(&mut stream, b"wanted/hard", EntryType::Link, b"wanted/old", b"");
    entry(&mut stream, b"wanted/hard", EntryType::Link, b"wanted/old", b"");
    entry(&mut stream, b"wanted/hard", EntryType::Regular, b"", b"new");
    run(home.path(), Some("wanted"), &stream).unwrap();
    assert_eq!(std::fs::read_to_string(home.path().join("wanted/old")).unwrap(), "old");
    assert_eq!(std::fs::read_to_string(home.path().join("wanted/hard")).unwrap(), "new");
    assert_eq!(names(&home.path().join("wanted")), ["hard", "old"]);
}

#[test]
fn devices_are_left_out_by_name_and_nothing_lends_its_owner() {
    let home = tempfile::tempdir().unwrap();
    let mut stream = Vec::new();
    entry(&mut stream, b"d", EntryType::Directory, b"", b"");
    entry(&mut stream, b"d/null", EntryType::Char, b"", b"");
    entry(&mut stream, b"d/disk\n", EntryType::Block, b"", b"");
    entry(&mut stream, b"d/pipe", EntryType::Fifo, b"", b"");
    entry(&mut stream, b"d/odd", EntryType::new(b'Q'), b"", b"whatever");
    records(&mut stream, &[("SCHILY.xattr.security.capability", b"\x01"), ("SCHILY.xattr.user.kept", b"a\nb\0c")]);
    entry(&mut stream, b"d/tool", EntryType::Regular, b"", b"run me");
    let warnings = run(home.path(), Some("d"), &stream).unwrap();
    assert_eq!(names(&home.path().join("d")), ["tool"]);
    let text = warnings.join("; ");
    for named in ["'d/null': it is a device", "'d/disk\\n': it is a device", "'d/pipe': it is a pipe", "'d/odd'"] {
        assert!(text.contains(named), "{named}: {text}");
    }
    let found = home.path().join("d/tool").metadata().unwrap();
    assert_eq!((found.mode() & 0o7777, found.mtime()), (0o755, 1_000_000_000));
    assert_eq!(found.uid(), home.path().metadata().unwrap().uid());
}

#[test]
fn what_is_in_the_way_stays() {
    let home = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(home.path().join("d/sub")).unwrap();
    std::fs::write(home.path().join("d/sub/mine"), "mine").unwrap();
    std::fs::write(home.path().join("d/file"), "mine").unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, home.path().join("d/pipe"), rustix::fs::Mode::RUSR).unwrap();
    for (path, kind) in [
        (&b"d/sub"[..], EntryType::Regular),
        (b"d/sub", EntryType::Symlink),
        (b"d/file", EntryType::Directory),
        (b"d/file/below", EntryType::Regular),
        (b"d/pipe", EntryType::Regular),
    ] {
        let mut stream = Vec::new();
        entry(&mut stream, path, kind, if kind == EntryType::Symlink { b"x" } else { b"" }, b"");
        let (code, text) = run(home.path(), Some("d"), &stream).unwrap_err();
        assert_eq!(code, ErrorCode::PathExists, "{text}");
    }
    assert_eq!(names(&home.path().join("d")), ["file", "pipe", "sub"]);
    assert_eq!(std::fs::read_to_string(home.path().join("d/sub/mine")).unwrap(), "mine");
}

#[test]
fn a_stream_that_breaks_off_leaves_nothing_under_a_final_name() {
    let mut whole = Vec::new();
    entry(&mut whole, b"d", EntryType::Directory, b"", b"");
    entry(&mut whole, b"d/locked", EntryType::Directory, b"", b"");
    entry(&mut whole, b"d/locked/a", EntryType::Regular, b"", &[7; 2000]);
    entry(&mut whole, b"d/b", EntryType::Regular, b"", &[8; 2000]);
    for cut in [700, 1600, 2000, 4500, 5000, whole.len() - 1] {
        let home = tempfile::tempdir().unwrap();
        let (code, text) = run(home.path(), Some("d"), &whole[..cut]).unwrap_err();
        assert_eq!((code, names(home.path())), (ErrorCode::ExecLost, vec![]), "{cut}: {text}");
        // In a directory that was there, only whole files are.
        std::fs::create_dir(home.path().join("d")).unwrap();
        run(home.path(), Some("d"), &whole[..cut]).unwrap_err();
        for (path, byte) in [("d/b", 8), ("d/locked/a", 7)] {
            if let Ok(found) = std::fs::read(home.path().join(path)) {
                assert_eq!(found, [byte; 2000], "{cut}");
            }
        }
        assert!(names(&home.path().join("d")).iter().all(|name| ["b", "locked"].contains(&name.as_str())), "{cut}");
    }
}

/// A reader that gives bytes and then fails as a connection does.
struct Broken<'a>(&'a [u8]);

impl std::io::Read for Broken<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.0.is_empty() {
            return Err(std::io::ErrorKind::ConnectionReset.into());
        }
        self.0.read(buffer)
    }
}

#[test]
fn an_archive_without_the_end_of_its_stream_is_not_whole() {
    let home = tempfile::tempdir().unwrap();
    let mut stream = Vec::new();
    entry(&mut stream, b"f", EntryType::Regular, b"", b"content");
    stream.resize(stream.len() + 1024, 0);
    let opened = std::fs::File::open(home.path()).unwrap();
    let options = UnpackOptions { name: Some(b"f"), owner: Owner::Caller };
    assert!(unpack(opened.as_fd(), options, Broken(&stream), &mut |_| {}).is_err());
    assert_eq!(names(home.path()), Vec::<String>::new());
}

#[test]
fn headers_that_are_none_are_told_and_bounded() {
    let home = tempfile::tempdir().unwrap();
    let malformed = |stream: &[u8]| {
        let (code, text) = run(home.path(), Some("f"), stream).unwrap_err();
        assert_eq!(code, ErrorCode::InvalidArchive, "{text}");
        assert_eq!(names(home.path()), Vec::<String>::new(), "{text}");
    };
    malformed(&[1; 512]);
    // A promise of a long extended header is refused before it is read.
    for kind in [EntryType::XHeader, EntryType::GNULongName, EntryType::GNULongLink, EntryType::XGlobalHeader] {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(1 << 40);
        header.set_cksum();
        malformed(header.as_bytes());
    }
    for text in [&b"3 a"[..], b"99 path=f\n", b"x path=f\n", b"9 path=f\n\n", b"10 path=f\nrest", b"0 \n"] {
        let mut stream = Vec::new();
        entry(&mut stream, b"pax", EntryType::XHeader, b"", text);
        entry(&mut stream, b"f", EntryType::Regular, b"", b"");
        malformed(&stream);
    }
    let mut stream = Vec::new();
    for _ in 0..1000 {
        records(&mut stream, &[("comment", b"again")]);
    }
    malformed(&stream);
    // Maps of holes that are no maps.
    for map in [
        "",
        "x\n",
        "99999999999999999999\n",
        "1\n0\n",
        "1\n0\n9\n",
        "2\n5\n1\n0\n1\n",
        "70000\n",
        "1\n18446744073709551615\n2\n",
    ] {
        let mut stream = Vec::new();
        records(
            &mut stream,
            &[
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.name", b"f"),
                ("GNU.sparse.realsize", b"8"),
            ],
        );
        let mut content = map.as_bytes().to_vec();
        content.resize(512, 0);
        entry(&mut stream, b"other", EntryType::Regular, b"", &content);
        malformed(&stream);
    }
}

#[test]
fn warnings_are_bounded() {
    let home = tempfile::tempdir().unwrap();
    let mut stream = Vec::new();
    for _ in 0..5000 {
        entry(&mut stream, b"null", EntryType::Char, b"", b"");
    }
    let warnings = run(home.path(), None, &stream).unwrap();
    assert_eq!(warnings.len() as u64, msb_tree::WARNINGS_MAX + 1);
    std::io::stdout().flush().unwrap();
}

#[test]
fn a_full_disk_is_told_and_leaves_nothing() {
    // A file size limit of the process answers EFBIG where a disk answers ENOSPC: /dev/full cannot hold a directory, a small tmpfs
    // needs root. So this one runs only where a tmpfs can be mounted; the whole-system case fills a real disk.
    let home = tempfile::tempdir().unwrap();
    let small = home.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let mounted = rustix::process::geteuid().is_root()
        && rustix::mount::mount("none", &small, "tmpfs", rustix::mount::MountFlags::empty(), Some(c"size=256k"))
            .is_ok();
    if !mounted {
        return;
    }
    let mut stream = Vec::new();
    entry(&mut stream, b"d", EntryType::Directory, b"", b"");
    entry(&mut stream, b"d/fits", EntryType::Regular, b"", &[1; 1000]);
    entry(&mut stream, b"d/not", EntryType::Regular, b"", &[2; 1 << 20]);
    let outcome = run(&small, Some("d"), &stream);
    std::fs::create_dir(small.join("d")).unwrap();
    let merged = run(&small, Some("d"), &stream);
    let left = names(&small.join("d"));
    rustix::mount::unmount(&small, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert_eq!(outcome.unwrap_err().0, ErrorCode::DiskFull);
    assert_eq!(merged.unwrap_err().0, ErrorCode::DiskFull);
    assert_eq!(left, ["fits"]);
}
