//! `cargo xtask soak`: the proofs that take too long for every test run: long fuzzing, full-size loads, whole programs inside a guest.
//!
//! Each proof is a command that anybody can run by itself; this chore runs them one after the other and, with `--keep`, writes what they
//! printed to `docs/soak/<name>.txt`, headed by the commit it speaks of. It asserts nothing of its own.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{cache, program};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Run only these proofs (repeatable)
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Keep what each prints under docs/soak/
    #[arg(long)]
    keep: bool,
    /// List the proofs and end
    #[arg(long)]
    list: bool,
}

/// A long proof: its name, what it shows, the words of the command behind `cargo`, and what its size is told by.
struct Proof {
    name: &'static str,
    proves: &'static str,
    cargo: &'static [&'static str],
    environment: &'static [(&'static str, &'static str)],
}

const PROOFS: &[Proof] = &[
    Proof {
        name: "fuzz",
        proves: "ten minutes of hostile input break no parser and no device",
        cargo: &["xtask", "fuzz", "--seconds", "600"],
        environment: &[],
    },
    Proof {
        name: "fleet",
        proves: "10,000 sandboxes in one daemon for a turned hour: nothing lost, nothing doubled, times as flat as with 100",
        cargo: &[
            "test",
            "--release",
            "--package",
            "msb-actors",
            "--features",
            "simulation",
            "--test",
            "sim",
            "--",
            "--nocapture",
            "--exact",
            "load::a_fleet_that_beats_idles_and_crashes_at_random_agrees_with_its_journal",
        ],
        environment: &[("MSB_SIM_SANDBOXES", "10000"), ("MSB_SIM_SECONDS", "3600"), ("MSB_SIM_STRICT", "1")],
    },
    Proof {
        name: "load",
        proves: "1 GiB written, 64 MiB received and 30 s of a busy vCPU are told within 2 % to everybody who reads metrics",
        cargo: &["xtask", "test", "--only", "e2e", "--fast", "--filter", "a_known_load_is_told_truly"],
        environment: &[("MSB_TEST_LOAD", "full"), ("RUST_TEST_NOCAPTURE", "1")],
    },
    Proof {
        name: "idle",
        proves: "200 idle sandboxes cost the daemon under 0.5 % of a core, and a crash is answered within 150 ms before the back-off",
        cargo: &[
            "test",
            "--release",
            "--package",
            "msb-actors",
            "--features",
            "simulation",
            "--test",
            "sim",
            "--",
            "--nocapture",
            "--exact",
            "load::idle_sandboxes_cost_next_to_nothing_and_a_crash_is_answered_at_once",
        ],
        environment: &[("MSB_SIM_IDLE_SANDBOXES", "200"), ("MSB_SIM_IDLE_SECONDS", "60"), ("MSB_SIM_STRICT", "1")],
    },
    Proof {
        name: "systemd",
        proves: "the service under a real systemd: two users, scopes, restarts, watchdog, logout, reboot, removal",
        cargo: &["xtask", "lab", "--systemd", "--cpus", "1", "--timeout", "3000"],
        environment: &[],
    },
    Proof {
        name: "dist",
        proves: "package and tarball in a Debian root without compilers: hello within a minute, and nothing left after the removal",
        cargo: &["xtask", "dist", "--check"],
        environment: &[],
    },
    Proof {
        name: "execs",
        proves: "a thousand commands at once in one sandbox, each with its own streams, in bounded memory",
        cargo: &["xtask", "test", "--only", "e2e", "--fast", "--filter", "many_execs_at_once"],
        environment: &[("MSB_TEST_EXECS", "1000")],
    },
    Proof {
        name: "channels",
        proves: "a thousand connections at once through one SSH login, each with its own bytes",
        cargo: &["xtask", "test", "--only", "e2e", "--fast", "--filter", "ssh_forwards_from_inside_the_sandbox"],
        environment: &[("MSB_TEST_CHANNELS", "1000"), ("RUST_TEST_NOCAPTURE", "1")],
    },
    Proof {
        name: "network",
        proves: "curl, dig and iperf3 from Debian do in a sandbox what they do anywhere, in both directions and both families",
        cargo: &["xtask", "test", "--only", "e2e", "--fast", "--filter", "whole_programs_talk_over_the_network"],
        environment: &[("MSB_TEST_TOOLS", "1"), ("RUST_TEST_NOCAPTURE", "1")],
    },
    Proof {
        name: "network-kvm",
        proves: "engine kvm: curl, dig and iperf3 from Debian in a sandbox, in both directions and both families, and every other case of the network",
        cargo: &["xtask", "lab", "--fast", "--cpus", "1", "--timeout", "2400", "--", "network::"],
        environment: &[("MSB_TEST_TOOLS", "1")],
    },
    Proof {
        name: "kvm",
        proves: "the whole-system cases with engine kvm, each of them",
        cargo: &["xtask", "lab", "--fast", "--cpus", "1", "--timeout", "10800"],
        environment: &[],
    },
    Proof {
        name: "memory",
        proves: "engine kvm: what ran goes on in each copy of a machine's memory, and nothing is there twice that must not be",
        cargo: &[
            "xtask",
            "lab",
            "--fast",
            "--cpus",
            "1",
            "--timeout",
            "1500",
            "--",
            "memory::",
            "pause::",
            "suspend::",
        ],
        environment: &[],
    },
    Proof {
        name: "forks",
        proves: "engine kvm: a hundred copies of one machine at once, each with what its source had and nothing of another's",
        // Not the fast build: of a hundred unoptimised programs that start at once this machine's one processor has enough for an hour.
        cargo: &["xtask", "lab", "--cpus", "1", "--timeout", "3000", "--task", "xtask/src/lab/forks.sh"],
        environment: &[],
    },
    Proof {
        name: "durability",
        proves: "after each of fifty kills under load the disk recovers and has every synced byte",
        cargo: &["xtask", "test", "--only", "e2e", "--fast", "--filter", "what_was_synced_is_there_after_each_kill"],
        environment: &[("MSB_TEST_KILLS", "50")],
    },
    Proof {
        name: "inside",
        proves: "Docker runs and builds containers inside a sandbox, and keeps them on a volume; sudo works, and not under restricted",
        cargo: &["xtask", "inside"],
        environment: &[],
    },
    Proof {
        name: "sdk",
        proves: "10,000 commands through one client of each SDK leak no descriptor and no memory",
        cargo: &["xtask", "leaks", "--execs", "10000"],
        environment: &[],
    },
];

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if let Some(unknown) = arguments.only.iter().find(|name| !PROOFS.iter().any(|proof| proof.name == name.as_str())) {
        bail!("there is no proof {unknown}; `cargo xtask soak --list` lists them");
    }
    let mut failed = Vec::new();
    for proof in PROOFS {
        if arguments.list {
            println!("{:<12} {}: cargo {}", proof.name, proof.proves, proof.cargo.join(" "));
        } else if (arguments.only.is_empty() || arguments.only.iter().any(|name| name == proof.name))
            && !one(proof, arguments.keep)?
        {
            failed.push(proof.name);
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn one(proof: &Proof, keep: bool) -> Result<bool> {
    println!("\n=== {}: {}\n$ cargo {}", proof.name, proof.proves, proof.cargo.join(" "));
    let began = Instant::now();
    let environment = proof.environment.iter().copied();
    let mut child = program::command("cargo").args(proof.cargo).envs(environment).stdout(Stdio::piped()).spawn()?;
    let mut printed = String::new();
    // As it comes: some of these take an hour.
    for line in BufReader::new(child.stdout.take().context("no output")?).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        println!("{line}");
        writeln!(printed, "{line}")?;
    }
    let status = child.wait()?;
    let took = began.elapsed().as_secs_f64();
    println!("=== {}: {} after {took:.0} s", proof.name, if status.success() { "passed" } else { "FAILED" });
    if keep {
        let commit = program::output(program::command("git").args(["rev-parse", "HEAD"]))?;
        let mut text = String::new();
        writeln!(text, "{}: {}", proof.name, proof.proves)?;
        writeln!(text, "commit {}, {took:.0} s, {status}\n", commit.trim())?;
        writeln!(text, "$ cargo {}\n{printed}", proof.cargo.join(" "))?;
        let folder = cache::repository().join("docs/soak");
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join(format!("{}.txt", proof.name)), text)?;
    }
    Ok(status.success())
}
