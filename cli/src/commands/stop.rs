//! `msb stop`: the workload is asked to end, what it wrote is flushed, the virtual machine is turned off.

use clap::Args;
use msb_protocol::control::StopRequest;

use super::bulk::{SelectionArgs, each_selected};
use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::parse;

/// Options of `stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Which.
    #[command(flatten)]
    pub selection: SelectionArgs,
    /// How it stops.
    #[command(flatten)]
    pub how: StopOptions,
}

/// How a sandbox stops.
#[derive(Debug, Args)]
pub struct StopOptions {
    /// Kill it at once, without a flush: what was written last may be lost
    #[arg(short, long, conflicts_with = "time")]
    pub force: bool,
    /// Time between the stop signal and the kill, as in 10s; a bare number counts seconds
    #[arg(short, long, visible_alias = "timeout", value_name = "TIME", value_parser = parse::duration_ms)]
    pub time: Option<u64>,
}

impl StopOptions {
    /// The request.
    #[must_use]
    pub fn request(&self) -> StopRequest {
        StopRequest { grace_ms: self.time, force: self.force }
    }
}

/// Carries it out.
///
/// # Errors
/// Those of the selection; an error of one sandbox is told and counted.
pub async fn run(args: StopArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let client = context.client().await?;
    let request = args.how.request();
    each_selected(&args.selection, &client, context, "stopping", async |name| {
        client.stop(name, &request).await.map(Some)
    })
    .await
}
