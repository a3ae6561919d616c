//! `msb ssh config`: a block for `ssh_config` that makes `ssh msb-NAME` work, with the sandbox's host key in a file beside it.
//!
//! ```text
//!  msb ssh config box >> ~/.ssh/config        ssh msb-box
//! ```

use std::path::PathBuf;

use clap::Args;
use msb_sdk::SshConfig;

use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::parse;

/// Options of `ssh config`.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// The sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Name of the host in the block [default: msb-NAME]
    #[arg(long, value_name = "HOST")]
    pub alias: Option<String>,
    /// Print only the host key, as a line of known_hosts
    #[arg(long)]
    pub known_hosts: bool,
}

/// Carries it out.
///
/// # Errors
/// `sandbox_not_found`, `invalid_config` for an alias that is no host name.
pub(super) async fn run(args: ConfigArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let name = parse::name(&args.name)?;
    let host = context.client().await?.ssh_host(&name).await?;
    let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("msb"));
    let found = SshConfig::new(host, args.alias.as_deref(), &program, &context.locator.surroundings)?;
    if context.printer.is_json() {
        context.printer.json(&found)?;
    } else if args.known_hosts {
        context.printer.text(&format!("{}\n", found.known_hosts))?;
    } else {
        context.printer.text(&found.config)?;
    }
    Ok(ExitStatus::SUCCESS)
}
