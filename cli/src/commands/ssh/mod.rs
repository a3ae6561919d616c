//! `msb ssh`: the built-in client, and what other SSH clients need: a listener or a pipe, authorized keys, a block for `ssh_config`.

mod client;
mod config;
mod keys;
mod serve;

use clap::{Args, Subcommand};

use crate::context::Context;
use crate::failure::{ExitStatus, Failure, invalid};

/// Options of `ssh`.
#[derive(Debug, Args)]
#[command(
    override_usage = "msb ssh [OPTIONS] NAME [-- COMMAND...]\n       msb ssh serve|authorize|keys|config ...",
    args_conflicts_with_subcommands = true,
    after_help = "The command's words are joined with spaces and run by the user's login shell, as with ssh. The exit code is the command's own; 128+N if signal N \
                  killed it, 125 if msb failed."
)]
pub struct SshArgs {
    /// What other clients need.
    #[command(subcommand)]
    pub command: Option<SshCommand>,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// User to log in as [default: the sandbox's own]
    #[arg(short, long, value_name = "USER")]
    pub login: Option<String>,
    /// The sandbox, and what to run in it instead of the login shell
    #[arg(num_args = 1.., trailing_var_arg = true, value_names = ["NAME", "COMMAND"])]
    pub name_and_command: Vec<String>,
}

/// What other clients need.
#[derive(Debug, Subcommand)]
pub enum SshCommand {
    /// Take SSH connections for a sandbox, on a port or on stdin and stdout
    Serve(serve::ServeArgs),
    /// Let public keys log in to every sandbox
    Authorize(keys::AuthorizeArgs),
    /// List the public keys that may log in
    Keys,
    /// Print a block for ssh_config and the sandbox's host key
    Config(config::ConfigArgs),
}

/// Carries it out.
///
/// # Errors
/// Those of the service and of the connection.
pub async fn run(args: SshArgs, context: &Context) -> Result<ExitStatus, Failure> {
    match args.command {
        Some(SshCommand::Serve(args)) => serve::run(args, context).await,
        Some(SshCommand::Authorize(args)) => keys::authorize(args, context).await,
        Some(SshCommand::Keys) => keys::list(context).await,
        Some(SshCommand::Config(args)) => config::run(args, context).await,
        None if args.name_and_command.is_empty() => Err(invalid("a sandbox is required: msb ssh NAME [-- COMMAND...]")),
        None => {
            let (name, words) = super::create::split(args.name_and_command);
            client::run(&crate::parse::name(&name)?, &words, args.tty, args.login, context).await
        }
    }
}
