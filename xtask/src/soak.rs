//! `cargo xtask soak`: the simulator's load at full size: 10,000 sandboxes for a turned hour, and the times held against those of 100.
//! CI runs a few hundred for two minutes (`actors/tests/sim/load.rs`).

use anyhow::Result;

use crate::{binaries, program};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Sandboxes in one daemon
    #[arg(long, default_value_t = 10_000)]
    sandboxes: u32,
    /// Seconds of the turned clock
    #[arg(long, default_value_t = 3_600)]
    seconds: u32,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    program::run(
        binaries::cargo()
            .args(["test", "--release", "--package", "msb-actors", "--features", "simulation", "--test", "sim"])
            .args([
                "--",
                "--nocapture",
                "--exact",
                "load::a_fleet_that_beats_idles_and_crashes_at_random_agrees_with_its_journal",
            ])
            .env("MSB_SIM_SANDBOXES", arguments.sandboxes.to_string())
            .env("MSB_SIM_SECONDS", arguments.seconds.to_string())
            .env("MSB_SIM_STRICT", "1"),
    )
}
