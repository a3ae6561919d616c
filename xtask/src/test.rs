//! `cargo xtask test`: every tier this machine can run, then a table of what ran, what failed, and what was skipped and why.
//!
//! A failing tier does not stop the others: one run tells everything. With `--require-all` (that is `.ci/run`) a skipped tier is a
//! failure, because a proof that did not run is none.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{
    bench, binaries, cache, debian, dependencies, docker, docs, fuzz, generation, house, images, install, lab,
    observers, program, sdk,
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// A skipped tier is a failure
    #[arg(long)]
    require_all: bool,
    /// Run only these tiers (repeatable): fmt, clippy, shape, docs, unit, e2e, sdk, lab, exact, fuzz, licences
    #[arg(long, value_name = "TIER")]
    only: Vec<String>,
    /// Run only the whole-system tests whose name contains this; in the tier sdk: rust, python, typescript, go or mcp
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    #[command(flatten)]
    build: binaries::Arguments,
}

/// What became of a tier that did not fail.
enum Outcome {
    Passed,
    /// Why it could not run here, as a sentence for the person reading the table.
    Skipped(String),
}

struct Tier {
    name: &'static str,
    proves: &'static str,
    run: fn(&Arguments) -> Result<Outcome>,
}

const TIERS: &[Tier] = &[
    Tier { name: "fmt", proves: "the sources are formatted", run: format },
    Tier { name: "clippy", proves: "no lint complains", run: clippy },
    Tier { name: "shape", proves: "crates and sources keep ARCHITECTURE.md and the house rules", run: shape },
    Tier { name: "docs", proves: "the generated references are up to date", run: documents },
    Tier { name: "unit", proves: "each part does what it says, properties and simulations included", run: unit },
    Tier { name: "e2e", proves: "the real programs run real guests, engine qemu", run: whole_system },
    Tier { name: "sdk", proves: "the SDKs behave alike, and their quickstarts run as they stand", run: sdks },
    Tier { name: "lab", proves: "the same with engine kvm, in a throw-away machine that has KVM", run: in_the_lab },
    Tier { name: "exact", proves: "what a start and a command cost, beside what was written down", run: costs },
    Tier {
        name: "fuzz",
        proves: "hostile input breaks no parser and no device, each target for a few seconds",
        run: fuzzing,
    },
    Tier { name: "licences", proves: "dependencies have licences and sources we accept", run: licences },
];

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let known: Vec<&str> = TIERS.iter().map(|tier| tier.name).collect();
    if let Some(unknown) = arguments.only.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("there is no tier {unknown}; there are: {}", known.join(", "));
    }
    let mut rows = Vec::new();
    for tier in
        TIERS.iter().filter(|tier| arguments.only.is_empty() || arguments.only.iter().any(|name| name == tier.name))
    {
        println!("\n=== {}: {}", tier.name, tier.proves);
        let began = Instant::now();
        let result = (tier.run)(arguments);
        if let Err(error) = &result {
            println!("{}: {error:#}", tier.name);
        }
        rows.push((tier, result, began.elapsed()));
    }
    summary(&rows, arguments.require_all)
}

fn summary(rows: &[(&Tier, Result<Outcome>, Duration)], require_all: bool) -> Result<()> {
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    println!("\n{:<10} {:>7}  result", "tier", "seconds");
    for (tier, result, took) in rows {
        let words = match result {
            Ok(Outcome::Passed) => {
                passed += 1;
                "passed".to_owned()
            }
            Ok(Outcome::Skipped(why)) if require_all => {
                failed += 1;
                format!("FAILED: skipped, and nothing may be: {why}")
            }
            Ok(Outcome::Skipped(why)) => {
                skipped += 1;
                format!("skipped: {why}")
            }
            Err(error) => {
                failed += 1;
                format!("FAILED: {}", error.to_string().lines().next().unwrap_or_default())
            }
        };
        println!("{:<10} {:>7.1}  {words}", tier.name, took.as_secs_f64());
    }
    // Plain, on a line of its own: programs that judge a test run look for it.
    println!("\ntiers: {passed} passed, {failed} failed, {skipped} skipped");
    if failed > 0 {
        bail!("{failed} of {} tiers failed", rows.len());
    }
    Ok(())
}

fn format(_: &Arguments) -> Result<Outcome> {
    program::run(binaries::cargo().args(["fmt", "--all", "--check"]))?;
    Ok(Outcome::Passed)
}

fn clippy(_: &Arguments) -> Result<Outcome> {
    debian::ensure(&[debian::BUILD])?;
    program::run(binaries::cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--features",
        binaries::COMPANION_FEATURES,
        "--locked",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ]))?;
    Ok(Outcome::Passed)
}

fn shape(_: &Arguments) -> Result<Outcome> {
    dependencies::run()?;
    house::run()?;
    Ok(Outcome::Passed)
}

fn documents(_: &Arguments) -> Result<Outcome> {
    docs::check()?;
    Ok(Outcome::Passed)
}

fn unit(_: &Arguments) -> Result<Outcome> {
    // Some unit tests hold our output against independent programs; without them they would say "skipped".
    debian::ensure(&[debian::BUILD, debian::CHECK, debian::CLIENTS])?;
    let mut tests = binaries::cargo();
    tests.args([
        "test",
        "--workspace",
        "--exclude",
        "msb-tests",
        "--features",
        binaries::COMPANION_FEATURES,
        "--locked",
        "--no-fail-fast",
    ]);
    match docker::fetch() {
        Ok(folder) => drop(tests.env("MSB_TEST_DOCKER", folder)),
        Err(error) => println!("note: no docker, so what it saves is not loaded: {error:#}"),
    }
    program::run(&mut tests)?;
    Ok(Outcome::Passed)
}

fn whole_system(arguments: &Arguments) -> Result<Outcome> {
    if debian::ensure(&[debian::RUN]).is_err() {
        return Ok(Outcome::Skipped("qemu-system-x86_64 is not installed, and this user cannot install it".to_owned()));
    }
    // Its case says that it was skipped where this is missing.
    let _ = debian::ensure(&[debian::SYSTEM]);
    debian::ensure(&[debian::CLIENTS])?;
    let tree = cache::development_tree();
    install::install(&tree, arguments.build)?;
    let small = images::small()?;
    let mut tests = binaries::cargo();
    tests
        .args(["test", "--workspace", "--test", "system", "--features", binaries::COMPANION_FEATURES, "--locked"])
        .env("MSB_TEST_TREE", &tree)
        .env("MSB_TEST_IMAGES", &small)
        .env("MSB_TEST_ENGINE", "qemu")
        .env("MSB_TEST_EVIDENCE", cache::target().join("evidence"));
    if program::can_become_root() {
        tests.env("MSB_TEST_PYTHON", images::python()?.join("python.tar"));
    } else {
        println!(
            "note: this user cannot become root, so the cases with the python image and those with a full disk are skipped"
        );
    }
    // Half a gigabyte and some minutes to make: only `cargo xtask soak` asks for it.
    if std::env::var_os("MSB_TEST_TOOLS").is_some() {
        debian::ensure(&[debian::TRAFFIC])?;
        tests.env("MSB_TEST_TOOLS", images::tools()?.join("tools.tar"));
    }
    match observers::fetch() {
        Ok(folder) => drop(tests.env("MSB_TEST_OBSERVERS", folder)),
        Err(error) => println!("note: no collector, so the case that asks one is skipped: {error:#}"),
    }
    match generation::first_agent() {
        Ok(initramfs) => drop(tests.env("MSB_TEST_FIRST_AGENT", initramfs)),
        Err(error) => println!("note: no agent of generation 1, so the case that asks one is skipped: {error:#}"),
    }
    tests.env("MSB_TEST_EARLIER", std::env::join_paths(generation::earlier()?)?);
    // A booting guest under software emulation keeps a processor busy; more of them at once than processors only makes each slower.
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    tests.args(["--", &format!("--test-threads={threads}")]);
    tests.args(arguments.filter.iter());
    program::run(&mut tests).context("whole-system tests")?;
    if arguments.filter.is_none() && !arguments.build.fast {
        generation::keep(&tree)?;
    }
    Ok(Outcome::Passed)
}

fn sdks(arguments: &Arguments) -> Result<Outcome> {
    sdk::run(arguments.build, arguments.filter.as_deref())?;
    Ok(Outcome::Passed)
}

/// The cases that run in the lab unless a filter names others. A guest inside an emulated machine is some ten times slower than one beside
/// it; these take every road through the engine: boot, streams, ends, stop, start, restart, logs, memory, copies of memory, sleep. `cargo xtask lab` runs all.
const LAB_CASES: [&str; 6] = [
    "session::",
    "exec::exec_tells_ends_truly",
    "machine::each_boot",
    "machine::memory_that",
    "memory::ready_forks",
    "suspend::a_sandbox_sleeps",
];

fn in_the_lab(arguments: &Arguments) -> Result<Outcome> {
    if debian::ensure(lab::PACKAGES).is_err() {
        return Ok(Outcome::Skipped(
            "the lab's packages are not installed, and this user cannot install them".to_owned(),
        ));
    }
    // One processor: with two, each a thread of QEMU, the emulated KVM sometimes ends in a loop that no interrupt gets through (seen on
    // idle machines after some 40 s, both processors in kvm-amd.ko, the kernel telling of an RCU stall).
    let machine = lab::Machine { exact: false, cpus: 1, memory_mib: 4096, timeout_s: 1800, system: lab::System::Bare };
    let cases = match arguments.filter.as_deref() {
        Some("systemd") => Vec::new(),
        Some(text) => vec![text.to_owned()],
        None => LAB_CASES.map(str::to_owned).to_vec(),
    };
    if !cases.is_empty() {
        in_the_machine("the cases", || lab::cases(&machine, arguments.build, &cases))?;
    }
    if arguments.filter.as_deref() == Some("systemd") {
        in_the_machine("the service's cases", || lab::service_cases(&machine, arguments.build, &SERVICE_CASES))?;
    }
    Ok(Outcome::Passed)
}

/// Fails only where it cannot measure: figures are for whoever reads them.
fn costs(_: &Arguments) -> Result<Outcome> {
    if debian::ensure(lab::PACKAGES).is_err() {
        return Ok(Outcome::Skipped(
            "the lab's packages are not installed, and this user cannot install them".to_owned(),
        ));
    }
    match bench::written::compare() {
        // The emulation's fault, and it was tried more than once: nothing is known of the costs, and nothing is wrong with them.
        Err(error) if error.is::<lab::Hung>() => println!("not measured: {error:#}"),
        outcome => outcome?,
    }
    Ok(Outcome::Passed)
}

/// The service's cases of `--only lab --filter systemd`: package, two users, scopes, the slice's stop. `cargo xtask soak --only systemd` runs
/// all of them. Not in every test run: a second boot of the machine and three guests in it take minutes.
const SERVICE_CASES: [&str; 2] = ["host", "slice"];

/// Machines that may hang before a tier gives up.
const HANGS_MAX: usize = 3;

/// Runs cases in the lab; again if the machine hung.
fn in_the_machine(what: &str, run: impl Fn() -> Result<i32>) -> Result<()> {
    let mut code = run();
    // The emulation's fault, see above; also seen: halted for good, interrupts on, with the timer's interrupt waiting in the local APIC. A case
    // that fails is never repeated.
    for _ in 0..HANGS_MAX {
        let Err(error) = &code else { break };
        if !error.is::<lab::Hung>() {
            break;
        }
        println!("{error}; again");
        code = run();
    }
    match code? {
        0 => Ok(()),
        code => bail!("{what} ended with status {code}"),
    }
}

/// Seconds of each fuzz target in a test run; `cargo xtask soak` takes minutes.
const FUZZ_SECONDS: u32 = 6;

fn fuzzing(_: &Arguments) -> Result<Outcome> {
    if debian::ensure(fuzz::PACKAGES).is_err() {
        return Ok(Outcome::Skipped("g++ is not installed, and this user cannot install it".to_owned()));
    }
    fuzz::for_seconds(FUZZ_SECONDS, &[])?;
    Ok(Outcome::Passed)
}

/// The release of cargo-deny that reads `deny.toml`.
const CARGO_DENY_VERSION: &str = "0.20.2";

fn licences(_: &Arguments) -> Result<Outcome> {
    // Compiled once, without optimisation: it runs for a second.
    let compiler = program::output(program::command("rustc").arg("--version"))?;
    let tool = cache::entry("tools", &cache::key([CARGO_DENY_VERSION, &compiler].map(str::as_bytes)), |place| {
        let mut install = binaries::cargo();
        install
            .args(["install", "cargo-deny", "--locked", "--debug", "--version", CARGO_DENY_VERSION, "--root"])
            .arg(place)
            .env("CARGO_TARGET_DIR", place.join("target"))
            .env("CARGO_PROFILE_DEV_DEBUG", "0");
        program::run_logged("compiling cargo-deny", &mut install, &cache::root()?.join("log/cargo-deny.log"))?;
        Ok(std::fs::remove_dir_all(place.join("target"))?)
    })?;
    let mut deny = program::command(tool.join("bin/cargo-deny"));
    program::run(deny.current_dir(cache::repository()).args(["check", "bans", "licenses", "sources"]))?;
    Ok(Outcome::Passed)
}
