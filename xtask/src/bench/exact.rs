//! `cargo xtask bench --exact`: the figures of engine kvm in the lab that counts instructions, beside what the peers took in that same lab.
//!
//! A script inside (`exact.sh`) measures whole commands with the shell's own clock and prints lines `FIGURE <key> <microseconds>`; this module reads
//! them and prints the table. Because the lab's clock counts instructions, waiting is free and exits look cheap: so VM exits, page
//! faults and system calls of the whole host are counted beside the times.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::by_hand;
use crate::lab::{self, Machine, System};
use crate::{binaries, debian, images};

/// One line of the table.
struct Figure {
    key: &'static str,
    what: &'static str,
    unit: &'static str,
    /// What the peer took in the same lab.
    peer: &'static str,
    reach: f64,
    better: f64,
}

/// Key of what each word of the kernel's line is worth: lines `OPTION <words> <hello> <kernel>`, and a figure of no meaning when all are there.
const OPTIONS: &str = "options";

const fn figure(
    key: &'static str,
    what: &'static str,
    unit: &'static str,
    peer: &'static str,
    reach: f64,
    better: f64,
) -> Figure {
    Figure { key, what, unit, peer, reach, better }
}

/// The promises, each with the peer's figure (microsandbox 0.7.11, Firecracker 1.17) from the same lab.
const FIGURES: &[Figure] = &[
    figure("bare", "bare kernel and shell: process start to reset", "ms", "Firecracker 167", 150.0, 120.0),
    figure("hello", "msb-vmm with our kernel and agent: start to agent hello", "ms", "–", 90.0, 65.0),
    figure("run", "msb run busybox -- true", "ms", "microsandbox 973", 240.0, 160.0),
    figure("exec", "msb exec box -- true", "ms", "microsandbox 53", 12.0, 7.0),
    figure("ls", "msb ls", "ms", "microsandbox 36", 7.0, 4.0),
    figure("stop_first", "msb stop box, the first one of a service", "ms", "microsandbox 153", 50.0, 25.0),
    figure("stop", "msb stop box", "ms", "microsandbox 153", 50.0, 25.0),
    figure("load", "msb image load of the 2 MB archive", "ms", "microsandbox 2371", 250.0, 80.0),
    figure("block_read", "guest reads 64 MiB from a file on its root disk", "ms", "Firecracker 120", 110.0, 100.0),
    figure("block_write", "guest writes 64 MiB in 64 KiB to its root disk, past its cache", "ms", "–", 150.0, 120.0),
    figure("random_read", "guest reads 4,000 blocks of 4 KiB anywhere, past its cache", "ms", "–", 400.0, 300.0),
    figure("random_write", "guest writes 4,000 blocks of 4 KiB anywhere, past its cache", "ms", "–", 400.0, 300.0),
    figure(
        "vsock_out_1",
        "64 MiB from the guest over bare vsock in 64 KiB writes",
        "ms",
        "Firecracker 100",
        80.0,
        70.0,
    ),
    figure("vsock_out_8", "the same over 8 streams at once", "ms", "–", 100.0, 80.0),
    figure("vsock_in_1", "64 MiB into the guest over bare vsock in 64 KiB writes", "ms", "–", 100.0, 80.0),
    figure("vsock_in_8", "the same over 8 streams at once", "ms", "–", 120.0, 100.0),
    figure("exec_out", "64 MiB from the guest through `msb exec`", "ms", "1.2 of bare vsock", 80.0, 70.0),
    figure("exec_in", "64 MiB into the guest through `msb exec -i`", "ms", "–", 100.0, 80.0),
    figure("net_out", "64 MiB from the guest over TCP", "ms", "–", 200.0, 150.0),
    figure("net_out_byte", "instructions of msb-vmm for each byte of it", "", "–", 3.0, 1.5),
    figure("net_in", "64 MiB into the guest over TCP, published port", "ms", "–", 200.0, 150.0),
    figure("net_in_byte", "instructions of msb-vmm for each byte of it", "", "–", 3.0, 1.5),
    figure("sample", "sampling one VM each second: instructions a second, in thousands", "k", "–", 20.0, 10.0),
    figure("restore", "msb run --snapshot (with memory) -- echo, to its answer", "ms", "0.15 of run", 41.0, 27.0),
    figure("ready", "the same of a template with a ready fork", "ms", "0.15 of run", 41.0, 27.0),
    figure("fork", "msb fork box, msb exec -- true", "ms", "–", 60.0, 41.0),
    figure("stood", "standing still for a snapshot of 128 MiB", "ms", "–", 100.0, 50.0),
    figure("wake", "msb exec of a sandbox that sleeps with its memory", "ms", "0.15 of run", 41.0, 27.0),
    figure(
        "python_cold",
        "msb run of a python that loads its modules: to its first output",
        "ms",
        "–",
        10_000.0,
        1_000.0,
    ),
    figure("python_fork", "the same from a snapshot with that python in memory, 512 MiB", "ms", "–", 100.0, 50.0),
    figure("python_ratio", "that against the cold one", "%", "10", 10.0, 5.0),
    figure("fork_memory", "resident memory of an idle fork that it does not share", "MiB", "–", 8.0, 4.0),
    figure("memory", "private memory of msb-vmm outside the guest", "MiB", "Firecracker < 5", 5.0, 3.0),
];

/// Machines that are started for one table at most.
const TRIES_MAX: usize = 3;

/// What is counted beside the times: two more turns of the row, in which nothing is timed.
pub(super) struct Count {
    pub(super) key: String,
    /// Ways out of guests.
    pub(super) exits: u64,
    /// System calls of everything on the lab's host.
    pub(super) calls: u64,
    /// Page faults of everything on the lab's host.
    pub(super) faults: u64,
}

impl Count {
    /// Of a line `COUNT <key> <exits> <calls> <faults>`.
    fn of(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["COUNT", key, exits, calls, faults] = words.as_slice() else { return None };
        let (exits, calls, faults) = (exits.parse().ok()?, calls.parse().ok()?, faults.parse().ok()?);
        Some(Self { key: (*key).to_owned(), exits, calls, faults })
    }
}

/// What the script has said so far.
#[derive(Default)]
pub(super) struct Told {
    /// By key, in microseconds (or thousandths of what the row's unit is).
    pub(super) figures: BTreeMap<String, f64>,
    /// Names and milliseconds.
    pub(super) phases: Vec<(String, f64)>,
    pub(super) counts: Vec<Count>,
    /// Words, milliseconds to the hello and in the kernel; the first are no words.
    pub(super) options: Vec<(String, f64, f64)>,
}

impl Told {
    fn hear(&mut self, line: &str) {
        // As they come: a machine that ends early has still said something.
        println!("{line}");
        // Behind what the progress of a command has left on the console's line.
        let begins = ["FIGURE ", "COUNT ", "PHASE ", "OPTION "].iter().find_map(|word| line.find(word));
        let line = &line[begins.unwrap_or(0)..];
        self.counts.extend(Count::of(line));
        let words: Vec<&str> = line.split_whitespace().collect();
        let milliseconds = |value: &str| value.parse::<f64>().map(|value| value / 1000.0);
        match words.as_slice() {
            ["FIGURE", key, value] => {
                if let Ok(value) = value.parse::<f64>() {
                    self.figures.insert((*key).to_owned(), value);
                }
            }
            ["PHASE", name, value] => {
                if let Ok(value) = milliseconds(value) {
                    self.phases.push(((*name).to_owned(), value));
                }
            }
            ["OPTION", words, hello, kernel] => {
                if let (Ok(hello), Ok(kernel)) = (milliseconds(hello), milliseconds(kernel)) {
                    if *words == "none" {
                        self.options.clear();
                    }
                    self.options.push(((*words).replace('+', " "), hello, kernel));
                }
            }
            _ => {}
        }
    }
}

/// Measures the rows of these keys, all if there is none; gives what was told and the script's status.
pub(super) fn measure(build: binaries::Arguments, rows: &[String]) -> Result<(Told, i32)> {
    let known: Vec<&str> = FIGURES.iter().map(|figure| figure.key).chain([OPTIONS]).collect();
    if let Some(unknown) = rows.iter().find(|row| !known.contains(&row.as_str())) {
        bail!("there is no row {unknown}; there are: {}", known.join(", "));
    }
    debian::ensure(lab::PACKAGES)?;
    let machine = Machine { exact: true, cpus: 1, memory_mib: 4096, timeout_s: 1800, system: System::Bare };
    let mut more = vec![(by_hand::load_program()?, "load")];
    if rows.is_empty() || rows.iter().any(|row| row.starts_with("python")) {
        more.push((images::python()?, "python"));
    }
    let mut told = Told::default();
    let mut left: Vec<&str> = rows.iter().map(String::as_str).collect();
    let mut tries = 0;
    let code = loop {
        tries += 1;
        let wanted: String = left.iter().map(|row| format!(",{row}")).collect();
        let script = format!("ROWS={wanted},\n{SCRIPT}");
        match lab::measure(&machine, build, &script, &more, &mut |line| told.hear(line)) {
            Ok(code) => break code,
            // This machine hangs now and then (docs/performance.md): the rows that are left get another.
            Err(error) if error.is::<lab::Hung>() && tries < TRIES_MAX => {
                println!("again, for the rows that are left: {error:#}");
                left = if left.is_empty() { known.clone() } else { left };
                left.retain(|key| !told.figures.contains_key(*key));
                if left.is_empty() {
                    break 0;
                }
            }
            Err(error) => return Err(error),
        }
    };
    Ok((told, code))
}

/// Measures and prints; fails only when something cannot be measured at all.
///
/// `rows` are the keys of those that are wanted, none for all.
pub(super) fn run(build: binaries::Arguments, rows: &[String]) -> Result<()> {
    let (Told { figures, phases, counts, options }, code) = measure(build, rows)?;
    println!(
        "\n{:<58} {:>10}  {:<18} {:>8} {:>8}",
        "engine kvm, lab that counts instructions", "measured", "peer", "reach", "better"
    );
    for figure in FIGURES.iter().filter(|figure| rows.is_empty() || figures.contains_key(figure.key)) {
        let measured = figures.get(figure.key).map(|value| value / 1000.0);
        let shown = measured.map_or_else(|| "–".to_owned(), |value| format!("{value:.1} {}", figure.unit));
        let verdict = match measured {
            Some(value) if value <= figure.better => "better",
            Some(value) if value <= figure.reach => "reached",
            Some(_) => "MISSED",
            None => "not measured",
        };
        println!(
            "{:<58} {shown:>10}  {:<18} {:>8} {:>8}  {verdict}",
            figure.what, figure.peer, figure.reach, figure.better
        );
    }
    println!("\n{:<58} {:>10} {:>10} {:>10}", "counted, a turn each", "VM exits", "calls", "faults");
    for Count { key, exits, calls, faults } in &counts {
        let what = FIGURES.iter().find(|figure| figure.key == key).map_or(key.as_str(), |figure| figure.what);
        println!("{what:<58} {exits:>10} {calls:>10} {faults:>10}");
    }
    println!("\nwhere a boot's time goes (msb inspect)");
    for (name, value) in &phases {
        println!("  {name:<24} {value:>8.1} ms");
    }
    if let Some((_, hello, kernel)) = options.first().cloned() {
        println!(
            "\nwhat words of the kernel's line change, in ms to the hello and in the kernel ({hello:.1} and {kernel:.1} without)"
        );
        for (words, own, own_kernel) in &options[1..] {
            println!("  {words:<48} {:>+8.1} {:>+8.1}", own - hello, own_kernel - kernel);
        }
    }
    if code != 0 {
        bail!("the measuring script ended with status {code}");
    }
    Ok(())
}

/// Runs inside.
const SCRIPT: &str = include_str!("exact.sh");
