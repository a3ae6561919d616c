//! One module for each command: its options, and the function that carries it out.

pub mod attach;
pub mod bulk;
pub mod completion;
pub mod config;
pub mod copy;
pub mod create;
pub mod debug;
pub mod detach;
pub mod df;
pub mod doctor;
pub mod events;
pub mod exec;
pub mod fork;
pub mod image;
pub mod inspect;
pub mod install;
pub mod itself;
pub mod label;
pub mod list;
pub mod logs;
pub mod mcp;
pub mod metrics;
pub mod net;
pub mod pause;
pub mod prune;
pub mod pull;
pub mod registry;
pub mod remove;
pub mod restart;
pub mod run;
pub mod save;
pub mod shell;
pub mod snapshot;
pub mod ssh;
pub mod start;
pub mod status;
pub mod stop;
pub mod template;
pub mod top;
pub mod uninstall;
pub mod version;
pub mod volume;
pub mod wait;

use crate::arguments::Command;
use crate::context::Context;
use crate::failure::{ExitStatus, Failure};

/// Carries out a command.
///
/// # Errors
/// The command's own.
pub async fn run(command: Command, context: &Context) -> Result<ExitStatus, Failure> {
    match command {
        Command::Run(args) => run::run(*args, context).await,
        Command::Create(args) => create::run(*args, context).await,
        Command::Start(args) => start::run(args, context).await,
        Command::Stop(args) => stop::run(args, context).await,
        Command::Restart(args) => restart::run(args, context).await,
        Command::Remove(args) => remove::run(args, context).await,
        Command::List(args) => list::run(args, context).await,
        Command::Status(args) => status::run(args, context).await,
        Command::Inspect(args) => inspect::run(args, context).await,
        Command::Exec(args) => exec::run(*args, context).await,
        Command::Attach(args) => attach::run(args, context).await,
        Command::Shell(args) => shell::run(args, context).await,
        Command::Ssh(args) => ssh::run(args, context).await,
        Command::Wait(args) => wait::run(args, context).await,
        Command::Label(args) => label::run(args, context).await,
        Command::Detach(args) => detach::run(args, context).await,
        Command::Touch(args) => detach::touch(args, context).await,
        Command::Image { command } => image::run(command, context).await,
        Command::Images(args) => image::list(args, context).await,
        Command::Rmi(args) => image::remove(args, context).await,
        Command::Load(args) => image::load(args, context).await,
        Command::Logs(args) => logs::run(args, context).await,
        Command::Net { command } => net::run(command, context).await,
        Command::Events(args) => events::run(args, context).await,
        Command::Volume { command } => volume::run(command, context).await,
        Command::Doctor(args) => doctor::run(args, context).await,
        Command::Config { command } => config::run(command, context),
        Command::Itself { command } => itself::run(command, context).await,
        Command::Completion(args) => completion::run(args, context),
        Command::Debug { command } => debug::run(command, context).await,
        Command::Version => version::run(context).await,
        Command::Copy(args) => copy::run(args, context).await,
        Command::Fork(args) => fork::run(args, context).await,
        Command::Pause(args) => pause::pause(args, context).await,
        Command::Resume(args) => pause::resume(args, context).await,
        Command::Pull(args) => pull::run(args, context).await,
        Command::Save(args) => save::run(args, context).await,
        Command::Registry { command } => registry::run(command, context).await,
        Command::Snapshot { command } => snapshot::run(command, context).await,
        Command::Template { command } => template::run(command, context).await,
        Command::Df => df::run(context).await,
        Command::Install(args) => install::run(args, context).await,
        Command::Uninstall(args) => uninstall::run(args, context).await,
        Command::Metrics(args) => metrics::run(args, context).await,
        Command::Top(args) => top::run(args, context).await,
        Command::Mcp(args) => mcp::run(args, context).await,
    }
}
