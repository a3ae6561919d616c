//! `msb rm`: sandboxes are gone, with everything they wrote.

use clap::Args;

use super::bulk::{SelectionArgs, each_selected};
use crate::context::Context;
use crate::failure::{ExitStatus, Failure};

/// Options of `rm`.
#[derive(Debug, Args)]
pub struct RemoveArgs {
    /// Which.
    #[command(flatten)]
    pub selection: SelectionArgs,
    /// Kill what runs first
    #[arg(short, long)]
    pub force: bool,
}

/// Carries it out.
///
/// # Errors
/// Those of the selection; an error of one sandbox is told and counted.
pub async fn run(args: RemoveArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let client = context.client().await?;
    each_selected(&args.selection, &client, context, "removing", async |name| {
        client.remove(name, args.force).await.map(|()| None)
    })
    .await
}
