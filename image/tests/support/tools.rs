//! Real peers: skopeo, umoci, buildah, erofs-utils. A missing one is said, and fails where everything must run.

use std::path::Path;
use std::process::{Command, Stdio};

/// Whether a tool is here; prints why a test is skipped, and fails it under `MSB_REQUIRE_ALL=1`.
pub fn have(tool: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(tool).is_file()));
    if !found {
        skip(&format!("{tool} is not installed"));
    }
    found
}

/// Says why a test cannot run here.
pub fn skip(reason: &str) {
    assert!(std::env::var("MSB_REQUIRE_ALL").as_deref() != Ok("1"), "MSB_REQUIRE_ALL=1, but {reason}");
    println!("skipped: {reason}");
}

/// Whether the test runs as root with the rights to make devices and mounts.
pub fn privileged() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip("not root, so owners and devices cannot be made");
    }
    root
}

/// Runs a command that must succeed and returns what it printed.
pub fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {text}");
    text
}

/// A shell script with `$1`, `$2` … that must succeed.
pub fn shell(script: &str, arguments: &[&Path]) -> String {
    run(Command::new("sh").args(["-euc", script, "sh"]).args(arguments))
}

/// A mount that goes away with the value.
pub struct Mount<'p>(pub &'p Path);

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(self.0).status();
        assert!(status.is_ok_and(|status| status.success()), "umount {}", self.0.display());
    }
}
