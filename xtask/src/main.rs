//! `cargo xtask …`: every chore of this repository, from a fresh machine to a finished test run.
//!
//! Called by people and by `.ci/run`. One module per subcommand; each says in its header what it makes and where it keeps it.
//! It never links the product: what needs the product's own types is in programs of their own, `xtask-reference` (generated documents) and
//! `xtask-machine` (a fake VM process for benches), so that the first `cargo xtask` on a new machine compiles in seconds.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "this is a command line tool for developers; it talks on its streams"
)]

mod bench;
mod binaries;
mod cache;
mod debian;
mod demo;
mod dependencies;
mod dist;
mod docker;
mod docs;
mod fuzz;
mod generation;
mod home;
mod house;
mod images;
mod initramfs;
mod inside;
mod install;
mod kernel;
mod lab;
mod newcomer;
mod observers;
mod program;
mod sdk;
mod soak;
mod test;
mod units;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Chores of the msb repository.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// From nothing to a running microVM: installs, builds, and runs the main commands one by one, explaining each
    Demo(demo::Arguments),
    /// Run every tier of tests this machine can run, and say what was skipped and why
    Test(test::Arguments),
    /// Build the guest kernel, or find it in the cache, and print its folder
    Kernel(kernel::Arguments),
    /// Make the OCI archives that the demo and the tests use, and print their folder
    Images(images::Arguments),
    /// Compile the programs (release by default)
    Build(binaries::Arguments),
    /// Lay out programs, kernel and guest files under a prefix
    Install(install::Arguments),
    /// Make what is shipped: a tarball and a Debian package, with checksums
    Dist(dist::Arguments),
    /// Generate the references under docs/, or check that they are up to date
    Docs(docs::Arguments),
    /// Compare the crates' dependencies with the table in ARCHITECTURE.md, and the sources with the house rules
    CheckDeps,
    /// Run the whole-system cases with engine kvm, in a throw-away machine that has KVM
    Lab(lab::Arguments),
    /// Feed hostile input to every parser a guest, a client or an image reaches, for a bounded time
    Fuzz(fuzz::Arguments),
    /// The proofs that take too long for every test run
    Soak(soak::Arguments),
    /// Run whole programs inside a guest: Docker with a container of its own, sudo under two security profiles
    Inside(inside::Arguments),
    /// Thousands of commands through one client of each SDK, and what it holds afterwards
    Leaks(sdk::measure::Arguments),
    /// Measure: paired runs on this machine, ratios reported
    Bench(bench::Arguments),
    /// Install the Debian packages that building and testing need
    Setup,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().chore {
        Chore::Demo(arguments) => demo::run(&arguments),
        Chore::Test(arguments) => test::run(&arguments),
        Chore::Kernel(arguments) => kernel::run(&arguments),
        Chore::Images(arguments) => images::run(&arguments),
        Chore::Build(arguments) => binaries::run(&arguments),
        Chore::Install(arguments) => install::run(&arguments),
        Chore::Dist(arguments) => dist::run(&arguments),
        Chore::Docs(arguments) => docs::run(&arguments),
        Chore::CheckDeps => dependencies::run().and_then(|()| house::run()),
        Chore::Lab(arguments) => lab::run(&arguments),
        Chore::Fuzz(arguments) => fuzz::run(&arguments),
        Chore::Soak(arguments) => soak::run(&arguments),
        Chore::Inside(arguments) => inside::run(&arguments),
        Chore::Leaks(arguments) => sdk::measure::leaks(&arguments),
        Chore::Bench(arguments) => bench::run(&arguments),
        Chore::Setup => debian::ensure(debian::EVERYTHING),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
