//! Any bytes as the tar stream that a guest sends for a copy: whatever it says, nothing outside of the destination changes, nothing
//! unfinished is left, and what was asked for under one name makes no other.
#![no_main]

use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use msb_tree::{Owner, UnpackOptions, unpack};

fuzz_target!(|data: &[u8]| {
    let home = tempfile::tempdir().expect("home");
    let (inside, outside) = (home.path().join("inside"), home.path().join("outside"));
    for directory in [&inside, &outside] {
        std::fs::create_dir(directory).expect("a directory");
    }
    std::fs::write(outside.join("mine"), "mine").expect("a file");
    symlink("../outside", inside.join("way-out")).expect("a link");
    for name in [Some(&b"a"[..]), None, Some(b"way-out")] {
        let directory = std::fs::File::open(&inside).expect("the directory");
        let options = UnpackOptions { name, owner: Owner::Caller };
        let mut warnings = 0;
        let whole = unpack(directory.as_fd(), options, data, &mut |_| warnings += 1).is_ok();
        assert!(warnings <= msb_tree::WARNINGS_MAX + 1);
        assert_eq!(names(&outside), ["mine"]);
        assert_eq!(std::fs::read(outside.join("mine")).expect("the file"), b"mine");
        assert_eq!(names(home.path()), ["inside", "outside"]);
        let left = names(&inside);
        assert!(!left.iter().any(|left| left.starts_with(".msb-copy-")), "{left:?}");
        if name == Some(b"a") {
            assert!(left.iter().all(|left| left == "way-out" || (whole && left == "a")), "{left:?}");
        }
    }
});

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("a directory");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
