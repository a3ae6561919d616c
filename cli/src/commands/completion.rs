//! `msb completion`: the completion script of a shell, from the same types as everything else.

use clap::Args;
use clap_complete::Shell;

use crate::context::Context;
use crate::failure::{ExitStatus, Failure};

/// Options of `completion`.
#[derive(Debug, Args)]
pub struct CompletionArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: Shell,
}

/// Carries it out.
///
/// # Errors
/// Only those of writing.
pub fn run(args: CompletionArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::command(), "msb", &mut script);
    context.printer.bytes(&script)?;
    Ok(ExitStatus::SUCCESS)
}
