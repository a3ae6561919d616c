//! Where tests end the process: every step at which a pull or a load changes the store begins with [`step`]. In the product that is
//! nothing at all.
//!
//! A test runs a pull in a process of its own. `MSB_IMAGE_STEPS=FILE` has the names of the steps appended to the file, one a line;
//! `MSB_IMAGE_KILL=N` ends the process by SIGKILL at its N-th step, as `kill -9` would at that moment.

/// A step at which a process may be ended.
#[cfg(feature = "faults")]
pub(crate) fn step(name: &'static str) {
    use std::io::Write as _;
    use std::sync::atomic::{AtomicU64, Ordering};

    static PASSED: AtomicU64 = AtomicU64::new(0);
    let number = PASSED.fetch_add(1, Ordering::SeqCst) + 1;
    if let Some(path) = std::env::var_os("MSB_IMAGE_STEPS")
        && let Ok(mut file) = std::fs::OpenOptions::new().append(true).create(true).open(path)
    {
        // The test sees what is missing.
        let _ = file.write_all(format!("{name}\n").as_bytes());
    }
    if std::env::var("MSB_IMAGE_KILL").is_ok_and(|wanted| wanted == number.to_string()) {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}

/// A step at which a process may be ended.
#[cfg(not(feature = "faults"))]
#[inline]
pub(crate) fn step(_: &'static str) {}
