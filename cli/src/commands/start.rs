//! `msb start`: sandboxes that rest run again, with their workload.

use clap::Args;
use msb_protocol::control::StartRequest;

use super::bulk::{SelectionArgs, each_selected};
use crate::context::Context;
use crate::failure::{ExitStatus, Failure};

/// Options of `start`.
#[derive(Debug, Args)]
pub struct StartArgs {
    /// Which.
    #[command(flatten)]
    pub selection: SelectionArgs,
}

/// Carries it out.
///
/// # Errors
/// Those of the selection; an error of one sandbox is told and counted.
pub async fn run(args: StartArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let client = context.client().await?;
    each_selected(&args.selection, &client, context, "starting", async |name| {
        client.start(name, &StartRequest::default()).await.map(Some)
    })
    .await
}
