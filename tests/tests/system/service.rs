//! The service as a neighbour: one per home, private, and gone when told.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use msb_tests::Home;

#[test]
fn a_second_daemon_for_the_same_home_says_so() {
    let home = Home::new("two_daemons");
    home.succeeds(&["ls"]);
    let first = home.daemon();
    let second = home.program("msbd", [""; 0]).run();
    assert_ne!(second.code(), Some(0), "{}", second.account());
    let said = format!("{}{}", second.text(), second.complaint());
    assert!(said.contains("daemon_running") || said.contains("another msbd"), "{}", second.account());
    assert_eq!(home.daemon().pid, first.pid);
    home.finish();
}

#[test]
fn commands_that_start_the_service_together_get_one() {
    let home = Home::new("race_to_start");
    let started: Vec<_> = (0..6).map(|_| home.msb(["ls"]).start()).collect();
    for running in started {
        let _ = running.finish().succeeds();
    }
    let _ = home.daemon();
    home.finish();
}

#[test]
fn nothing_of_a_home_can_be_read_by_others() {
    let home = Home::with_busybox("private");
    home.succeeds(&["create", "--name", "box", "-e", "TOKEN=secret", "busybox"]);
    let mut open = Vec::new();
    check(&home.path(), &mut open);
    check(&home.runtime().join("msb"), &mut open);
    assert!(open.is_empty(), "others may use: {open:?}");
    home.finish();
}

/// Collects what is not ours alone. Symbolic links have no mode of their own.
fn check(folder: &Path, open: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.path().symlink_metadata() else { continue };
        let kind = metadata.file_type();
        let mode = metadata.permissions().mode() & 0o777;
        if !kind.is_symlink() && (mode & 0o077 != 0 || metadata.uid() != rustix::process::geteuid().as_raw()) {
            open.push(format!(
                "{} {mode:o}{}",
                entry.path().display(),
                if kind.is_socket() { " (socket)" } else { "" }
            ));
        }
        if kind.is_dir() {
            check(&entry.path(), open);
        }
    }
}
