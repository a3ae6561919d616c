//! `msb shell`: `exec -it NAME /bin/sh`, or without the terminal where there is none.

use clap::Args;

use super::exec::{ExecOptions, execute};
use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::{parse, terminal};

/// Options of `shell`.
#[derive(Debug, Args)]
pub struct ShellArgs {
    /// The sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
    /// The shell
    #[arg(long, value_name = "PATH", default_value = "/bin/sh")]
    pub shell: String,
    /// Run this in the shell instead of what is typed
    #[arg(short, long, value_name = "SCRIPT")]
    pub command: Option<String>,
    /// Working directory
    #[arg(short, long, value_name = "PATH")]
    pub workdir: Option<String>,
    /// User
    #[arg(short, long, value_name = "USER|UID[:GROUP|GID]")]
    pub user: Option<String>,
}

/// Carries it out.
///
/// # Errors
/// Those of `exec`.
pub async fn run(args: ShellArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let name = parse::name(&args.name)?;
    let mut command = vec![args.shell];
    let interactive = args.command.is_none();
    if let Some(script) = args.command {
        command.extend(["-c".to_owned(), script]);
    }
    let options = ExecOptions {
        interactive,
        tty: interactive && terminal::stdin_is_terminal(),
        env: Vec::new(),
        env_file: Vec::new(),
        workdir: args.workdir,
        user: args.user,
        rlimits: Vec::new(),
        timeout: None,
        detach_keys: crate::detach_keys::DetachKeys::parse(crate::detach_keys::DEFAULT)
            .map_err(crate::failure::invalid)?,
    };
    execute(&name, command, &options, context).await
}
