//! What is packed and unpacked again is the same tree, and GNU tar agrees with both halves.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use msb_tree::{Owner, PackOptions, TreeError, UnpackOptions, pack, unpack};
use proptest::prelude::*;

fn packed(path: &Path, name: &str) -> Result<(Vec<u8>, Vec<String>), TreeError> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let (mut stream, mut warnings) = (Vec::new(), Vec::new());
    let options = PackOptions { path: &path, name: name.as_bytes(), follow: false };
    pack(options, &mut stream, &mut |warning| warnings.push(warning))?;
    Ok((stream, warnings))
}

fn unpacked(directory: &Path, name: Option<&str>, stream: &[u8]) -> Vec<String> {
    let opened = std::fs::File::open(directory).unwrap();
    let mut warnings = Vec::new();
    let options = UnpackOptions { name: name.map(str::as_bytes), owner: Owner::Stream };
    unpack(opened.as_fd(), options, stream, &mut |warning| warnings.push(warning)).unwrap();
    warnings
}

/// Everything that is kept of a tree, by path.
fn described(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut links: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    walk(root, b"", &mut |path, file| {
        let stat = file.symlink_metadata().unwrap();
        let what = if stat.is_symlink() {
            format!("link {:?}", std::fs::read_link(file).unwrap())
        } else if stat.is_dir() {
            "directory".into()
        } else {
            let twin = links.entry(stat.ino()).or_insert_with(|| path.to_vec());
            format!("{} {} {:x}", msb_tree::shown(twin), stat.len(), sum(&std::fs::read(file).unwrap()))
        };
        let mut value = [0; 64];
        let attribute = rustix::fs::lgetxattr(file, "user.msb", &mut value[..]).map(|len| value[..len].to_vec());
        let what = format!("{what} {:?}", attribute.ok());
        let mode = if stat.is_symlink() { 0 } else { stat.mode() };
        let text = format!("{mode:o} {} {} {}.{} {what}", stat.uid(), stat.gid(), stat.mtime(), stat.mtime_nsec());
        found.insert(msb_tree::shown(path), text);
    });
    found
}

/// FNV-1a: a difference of content shows, and a failed comparison can still be read.
fn sum(content: &[u8]) -> u64 {
    content.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn walk(at: &Path, path: &[u8], see: &mut impl FnMut(&[u8], &Path)) {
    see(path, at);
    if at.symlink_metadata().unwrap().is_dir() {
        let mut names: Vec<_> = std::fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        for name in names {
            walk(&at.join(&name), &[path, b"/", name.as_bytes()].concat(), see);
        }
    }
}

/// A tree with one of everything.
fn furnish(root: &Path) {
    std::fs::create_dir_all(root.join("deep/er/est")).unwrap();
    std::fs::create_dir(root.join("empty")).unwrap();
    std::fs::write(root.join("deep/er/file"), vec![b'x'; 100_000]).unwrap();
    std::fs::write(root.join("nothing"), "").unwrap();
    std::fs::write(root.join("new\nline"), "odd").unwrap();
    std::fs::write(root.join(std::ffi::OsString::from_vec(b"bytes\xff\xfe".to_vec())), "raw").unwrap();
    std::fs::write(root.join("n".repeat(255)), "long name").unwrap();
    std::fs::create_dir_all(root.join(format!("{}/{}", "p".repeat(200), "q".repeat(200)))).unwrap();
    symlink("t".repeat(300), root.join("long link")).unwrap();
    symlink("../../etc/passwd", root.join("deep/link")).unwrap();
    symlink("nothing", root.join("dangling not")).unwrap();
    std::fs::hard_link(root.join("deep/er/file"), root.join("twin")).unwrap();
    std::fs::write(root.join("tool"), "#!").unwrap();
    std::fs::set_permissions(root.join("tool"), PermissionsExt::from_mode(0o6751)).unwrap();
    // A file system without them has nothing to keep.
    let _ = rustix::fs::setxattr(root.join("tool"), "user.msb", b"a\nb\0c", rustix::fs::XattrFlags::empty());
    let sparse = std::fs::File::create(root.join("sparse")).unwrap();
    sparse.write_at(b"first", 1 << 20).unwrap();
    sparse.write_at(b"last", 6 << 20).unwrap();
    sparse.set_len(16 << 20).unwrap();
    let hole = std::fs::File::create(root.join("hole")).unwrap();
    hole.set_len(1 << 20).unwrap();
    std::fs::set_permissions(root.join("empty"), PermissionsExt::from_mode(0o1555)).unwrap();
    for (at, name) in ["deep/er/file", "empty", "deep", "tool"].iter().enumerate() {
        let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_600_000_000 + at as u64, 123_456_789);
        std::fs::File::open(root.join(name)).unwrap().set_times(std::fs::FileTimes::new().set_modified(time)).unwrap();
    }
}

#[test]
fn a_tree_comes_out_as_it_went_in_and_gnu_tar_reads_it_too() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("root");
    std::fs::create_dir(&root).unwrap();
    furnish(&root);
    let wanted = described(&root);
    let (stream, warnings) = packed(&root, "root").unwrap();
    assert_eq!(warnings, Vec::<String>::new());
    // 16 MiB of holes are not sent.
    assert!(stream.len() < 1 << 20, "{}", stream.len());

    for (place, name) in [("free", Some("root")), ("any", None)] {
        let to = home.path().join(place);
        std::fs::create_dir(&to).unwrap();
        assert_eq!(unpacked(&to, name, &stream), Vec::<String>::new());
        assert_eq!(described(&to.join("root")), wanted);
        assert!(to.join("root/sparse").metadata().unwrap().blocks() < 2048, "the holes are there");
        // Over itself, file by file: the same again.
        unpacked(&to, name, &stream);
        assert_eq!(described(&to.join("root")), wanted);
    }
    let to = home.path().join("tar");
    std::fs::create_dir(&to).unwrap();
    let mut tar = Command::new("tar").arg("-xpC").arg(&to).stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(tar.stdin.as_mut().unwrap(), &stream).unwrap();
    assert!(tar.wait().unwrap().success());
    // GNU tar keeps attributes only when told, and not in every build.
    for (path, text) in described(&to.join("root")) {
        if path == "/tool" {
            continue;
        }
        assert_eq!(Some(&text), wanted.get(&path), "{path}");
    }
}

#[test]
fn streams_of_gnu_tar_are_read_in_all_its_forms() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("root");
    std::fs::create_dir(&root).unwrap();
    furnish(&root);
    let wanted = described(&root);
    let cut = |tree: &BTreeMap<String, String>| {
        // GNU's own form and old ones know seconds only.
        let text = format!("{tree:?}");
        let mut short = String::new();
        let mut rest = text.as_str();
        while let Some(at) = rest.find('.') {
            let digits = rest[at + 1..].bytes().take_while(u8::is_ascii_digit).count();
            short.push_str(&rest[..at]);
            rest = &rest[at + 1 + digits..];
        }
        short + rest
    };
    for options in [&["--format=pax", "-S"][..], &["--format=gnu", "-S"], &["--format=gnu"], &["--format=pax"]] {
        let tar = Command::new("tar").args(options).arg("-cC").arg(home.path()).arg("root").output().unwrap();
        assert!(tar.status.success());
        let to = home.path().join(options.join(""));
        std::fs::create_dir(&to).unwrap();
        unpacked(&to, Some("root"), &tar.stdout);
        let got = described(&to.join("root"));
        if options[0] == "--format=pax" {
            assert_eq!(got.len(), wanted.len(), "{options:?}");
            for (path, text) in got.iter().filter(|(path, _)| *path != "/tool") {
                assert_eq!(Some(text), wanted.get(path), "{options:?} {path}");
            }
        } else {
            assert_eq!(
                cut(&got).replace("Some([97, 10, 98, 0, 99])", "None"),
                cut(&wanted).replace("Some([97, 10, 98, 0, 99])", "None"),
                "{options:?}"
            );
        }
    }
}

#[test]
fn what_is_no_file_is_left_out_by_name_and_refused_as_the_root() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("root");
    std::fs::create_dir(&root).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, root.join("pi\npe"), rustix::fs::Mode::RUSR).unwrap();
    std::fs::write(root.join("file"), "kept").unwrap();
    let (stream, mut warnings) = packed(&root, "root").unwrap();
    warnings.sort();
    assert_eq!(warnings, ["left out 'root/pi\\npe': it is a pipe", "left out 'root/socket': it is a socket"]);
    let to = home.path().join("to");
    std::fs::create_dir(&to).unwrap();
    unpacked(&to, Some("root"), &stream);
    assert_eq!(described(&to.join("root")).len(), 2);
    for special in [root.join("socket"), root.join("pi\npe"), "/dev/null".into()] {
        assert!(matches!(packed(&special, "x").unwrap_err(), TreeError::Special { .. }), "{special:?}");
    }
    assert!(matches!(packed(&root.join("file"), ".").unwrap_err(), TreeError::File { .. }));
    assert!(packed(&root.join("none"), "x").unwrap_err().to_string().contains("No such file"));
}

#[test]
fn deep_trees_have_an_end() {
    let home = tempfile::tempdir().unwrap();
    let deep = "d/".repeat(msb_tree::DEPTH_MAX + 2);
    std::fs::create_dir_all(home.path().join(&deep)).unwrap();
    assert!(matches!(packed(home.path(), "x").unwrap_err(), TreeError::Limit { .. }));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_an_archive_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..2048), at in 0usize..4096, value in any::<u8>()) {
        let home = tempfile::tempdir().unwrap();
        let root = home.path().join("root");
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(root.join("a/b/c"), &bytes).unwrap();
        let (mut stream, _) = packed(&root, "root").unwrap();
        let to = home.path().join("to");
        std::fs::create_dir(&to).unwrap();
        unpacked(&to, Some("root"), &stream);
        prop_assert_eq!(described(&to.join("root")), described(&root));
        // One wrong byte anywhere, and bytes of no kind.
        let at = at % stream.len();
        stream[at] = value;
        for stream in [&stream[..], &bytes] {
            let opened = std::fs::File::open(&to).unwrap();
            let options = UnpackOptions { name: Some(b"again"), owner: Owner::Caller };
            let _ = unpack(opened.as_fd(), options, stream, &mut |_| {});
            prop_assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 2);
        }
    }
}
