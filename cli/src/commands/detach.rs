//! `msb detach` and `msb touch`: two words to a sandbox, with the state it then has.

use super::bulk::{NamesArgs, each};
use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::parse;

/// Lets attached sandboxes outlive their creator.
///
/// # Errors
/// `invalid_name`; an error of one sandbox is told and counted.
pub async fn run(args: NamesArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let names = args.names.iter().map(|name| parse::name(name)).collect::<Result<Vec<_>, _>>()?;
    let client = context.client().await?;
    each(names, context, "detaching", async |name| client.detach(name).await.map(Some)).await
}

/// Counts as activity of sandboxes.
///
/// # Errors
/// `invalid_name`; an error of one sandbox is told and counted.
pub async fn touch(args: NamesArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let names = args.names.iter().map(|name| parse::name(name)).collect::<Result<Vec<_>, _>>()?;
    let client = context.client().await?;
    each(names, context, "touching", async |name| client.touch(name).await.map(Some)).await
}
