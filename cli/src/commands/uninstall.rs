//! `msb uninstall`: removes commands that `install` made, and nothing else.

use clap::Args;
use msb_protocol::error::{ApiError, ErrorCode};

use super::install;
use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::parse;

/// Options of `uninstall`.
#[derive(Debug, Args)]
pub struct UninstallArgs {
    /// The commands
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
}

/// Carries it out.
///
/// # Errors
/// `path_not_found` for a name that is not installed; those before it are removed.
pub async fn run(args: UninstallArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let directory = install::directory(context);
    for name in &args.names {
        parse::name(name)?;
        let path = directory.join(name);
        if install::image_of(&path).map_err(|error| install::failed(&path, &error))?.is_none() {
            let message = format!("no command {name} was installed by msb");
            return Err(ApiError::new(ErrorCode::PathNotFound, message)
                .with_hint("`msb install --list` shows them")
                .into());
        }
        std::fs::remove_file(&path).map_err(|error| install::failed(&path, &error))?;
        context.printer.text(name)?;
    }
    Ok(ExitStatus::SUCCESS)
}
