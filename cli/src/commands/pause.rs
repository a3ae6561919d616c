//! `msb pause` and `msb resume`: the virtual CPUs are halted where they are, and go on. Memory and network stay as they are meanwhile.

use clap::Args;

use super::bulk::{SelectionArgs, each_selected};
use crate::context::Context;
use crate::failure::{ExitStatus, Failure};

/// Options of both.
#[derive(Debug, Args)]
pub struct PauseArgs {
    /// Which.
    #[command(flatten)]
    pub selection: SelectionArgs,
}

/// Halts them.
///
/// # Errors
/// Those of the selection; an error of one sandbox is told and counted.
pub async fn pause(args: PauseArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let client = context.client().await?;
    each_selected(&args.selection, &client, context, "pausing", async |name| client.pause(name).await.map(Some)).await
}

/// Lets them go on.
///
/// # Errors
/// As [`pause`].
pub async fn resume(args: PauseArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let client = context.client().await?;
    each_selected(&args.selection, &client, context, "resuming", async |name| client.resume(name).await.map(Some)).await
}
