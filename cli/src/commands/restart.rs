//! `msb restart`: stop where needed, then start.

use clap::Args;

use super::bulk::{SelectionArgs, each_selected};
use super::stop::StopOptions;
use crate::context::Context;
use crate::failure::{ExitStatus, Failure};

/// Options of `restart`.
#[derive(Debug, Args)]
pub struct RestartArgs {
    /// Which.
    #[command(flatten)]
    pub selection: SelectionArgs,
    /// How it stops.
    #[command(flatten)]
    pub how: StopOptions,
}

/// Carries it out.
///
/// # Errors
/// Those of the selection; an error of one sandbox is told and counted.
pub async fn run(args: RestartArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let client = context.client().await?;
    let request = args.how.request();
    each_selected(&args.selection, &client, context, "restarting", async |name| {
        client.restart(name, &request).await.map(Some)
    })
    .await
}
