//! The service under a real systemd: cases that run one after the other inside the lab's machine, as root, with the Debian package
//! installed. `cargo xtask lab --systemd` and `cargo xtask test` call it; nowhere else does it do anything.
//!
//! `systemd CASE…` runs these in their order; a case may boot the machine and goes on afterwards, because what has been done is kept in a
//! file. Users: ann and bob are in group msb and use the service of the host, carl is not and has a service of his own.
#![expect(clippy::print_stdout, reason = "a test's account goes to the lab's console")]

mod alone;
mod host;
mod machine;

use std::process::ExitCode;
use std::time::Instant;

/// What is to be done after a case's part.
pub(crate) enum Next {
    /// The next case.
    Go,
    /// A boot, and then the part of this number of the same case.
    Boot(u32),
}

/// A case: its name, and what it does, part by part.
type Case = (&'static str, fn(u32) -> Next);

const CASES: &[Case] = &[
    ("host", host::two_users_share_a_host),
    ("scopes", host::machines_have_scopes_and_outlive_the_service),
    ("slice", host::the_slice_is_stopped_with_a_flush),
    ("watchdog", host::a_service_that_hangs_is_replaced),
    ("own", alone::a_service_of_ones_own_is_started_by_its_socket),
    ("fork", alone::a_ready_fork_has_a_scope_once_it_is_taken),
    ("logout", alone::logging_out_ends_what_does_not_linger),
    ("reboot", host::a_boot_brings_back_what_was_asked_for),
    ("uninstall", host::removal_leaves_nothing),
];

/// What has been done: one line for each finished case, and the part of the one under way.
const DONE: &str = "/root/done";
/// The cases that failed; the others run all the same.
const FAILED: &str = "/root/failed";

fn main() -> ExitCode {
    if std::env::var_os("MSB_TEST_LAB").is_none() {
        println!("skipped: these cases take a machine to pieces; `cargo xtask lab --systemd` gives them one");
        return ExitCode::SUCCESS;
    }
    let asked: Vec<String> = std::env::args().skip(1).collect();
    let done = std::fs::read_to_string(DONE).unwrap_or_default();
    if done.is_empty() {
        machine::furnish();
    }
    for (name, case) in CASES {
        if !(asked.is_empty() || asked.iter().any(|word| word == name)) || done.lines().any(|line| line == *name) {
            continue;
        }
        let part = done.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok()).max();
        let began = Instant::now();
        println!("case {name}{}", part.map_or(String::new(), |part| format!(", part {part}")));
        let Ok(next) = std::panic::catch_unwind(|| case(part.unwrap_or(0))) else {
            machine::account();
            println!("case {name}: FAILED after {:.1} s", began.elapsed().as_secs_f64());
            machine::note(FAILED, name);
            machine::note(DONE, name);
            continue;
        };
        println!("case {name}: ok, {:.1} s", began.elapsed().as_secs_f64());
        match next {
            Next::Go => machine::note(DONE, name),
            Next::Boot(part) => {
                machine::note(DONE, &format!("{name} {part}"));
                machine::boot();
            }
        }
    }
    if let Ok(failed) = std::fs::read_to_string(FAILED) {
        println!("systemd: failed: {}", failed.lines().collect::<Vec<_>>().join(", "));
        return ExitCode::FAILURE;
    }
    println!("systemd: all cases passed");
    ExitCode::SUCCESS
}
