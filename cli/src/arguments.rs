//! The command tree. Each command's own options are beside the code that reads them, in `commands/`.

use clap::{Args, Parser, Subcommand, ValueEnum};
use msb_protocol::images::ArchiveFormat;

use crate::commands::{
    bulk, completion, config, copy, create, debug, doctor, events, exec, image, inspect, install, itself, label, list,
    logs, mcp, net, remove, restart, run, ssh, start, status, stop, uninstall, volume, wait,
};

/// Commands whose exit codes below 125 belong to a workload.
pub const WORKLOAD_COMMANDS: [&str; 4] = ["run", "exec", "attach", "shell"];

/// The form of data and errors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people: tables, local time
    #[default]
    Text,
    /// For programs: JSON, RFC 3339 times; errors as one line of JSON on stderr
    Json,
    /// Of `save` only: as `docker save` writes
    #[value(hide = true)]
    Docker,
    /// Of `save` only: an OCI layout
    #[value(hide = true)]
    Oci,
}

impl Format {
    /// The layout of an archive, if it names one.
    #[must_use]
    pub fn layout(self) -> Option<ArchiveFormat> {
        match self {
            Self::Docker => Some(ArchiveFormat::Docker),
            Self::Oci => Some(ArchiveFormat::Oci),
            Self::Text | Self::Json => None,
        }
    }
}

/// Sandboxes in microVMs, from OCI images
#[derive(Debug, Parser)]
#[command(name = "msb", version, subcommand_required = false, arg_required_else_help = false)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: GlobalArgs,
    /// Print the whole tree of commands and options
    #[arg(long)]
    pub tree: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Options of every command.
#[derive(Clone, Copy, Debug, Args)]
pub struct GlobalArgs {
    /// Write data and errors only; lists are names alone
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub quiet: bool,
    /// Form of data and errors
    #[arg(
        long,
        global = true,
        value_enum,
        value_name = "FORM",
        default_value_t,
        hide_possible_values = true,
        help_heading = "Global options",
        help = "Form of data and errors: text or json"
    )]
    pub format: Format,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a sandbox from an image, run its command and stream its output
    Run(Box<run::RunArgs>),
    /// Create and boot a sandbox that waits for `exec`, or runs a command in the background
    Create(Box<create::CreateArgs>),
    /// Start resting sandboxes
    Start(start::StartArgs),
    /// Stop running sandboxes
    Stop(stop::StopArgs),
    /// Stop sandboxes if they run, and start them
    Restart(restart::RestartArgs),
    /// Remove sandboxes
    #[command(name = "rm", visible_alias = "remove")]
    Remove(remove::RemoveArgs),
    /// List sandboxes, resting ones too
    #[command(name = "ls", visible_alias = "list")]
    List(list::ListArgs),
    /// Show what runs: command, state, restarts, last exit
    #[command(name = "ps", visible_alias = "status")]
    Status(status::StatusArgs),
    /// Show everything about a sandbox
    Inspect(inspect::InspectArgs),
    /// Run a command in a running sandbox
    Exec(Box<exec::ExecArgs>),
    /// Join the main workload of a running sandbox
    Attach(crate::commands::attach::AttachArgs),
    /// Open a shell in a running sandbox
    Shell(crate::commands::shell::ShellArgs),
    /// Wait until sandboxes rest and print their exit codes
    Wait(wait::WaitArgs),
    /// Let an attached sandbox outlive its creator
    Detach(bulk::NamesArgs),
    /// Count as activity, so that the idle time begins anew
    Touch(bulk::NamesArgs),
    /// Copy files between host and sandboxes
    #[command(name = "cp", visible_alias = "copy")]
    Copy(copy::CopyArgs),
    /// Log in to a sandbox with SSH, or let other clients do so
    Ssh(ssh::SshArgs),
    /// Show or change the labels of a sandbox
    Label(label::LabelArgs),
    /// Copy a running sandbox, memory included
    Fork(crate::commands::fork::ForkArgs),
    /// Halt running sandboxes where they are
    Pause(crate::commands::pause::PauseArgs),
    /// Let halted sandboxes go on
    Resume(crate::commands::pause::PauseArgs),

    /// Pull, load, save, list, inspect and remove images
    Image {
        /// What to do with images.
        #[command(subcommand)]
        command: image::ImageCommand,
    },
    /// List images
    #[command(hide = true)]
    Images(image::ImageListArgs),
    /// Remove images
    #[command(hide = true)]
    Rmi(image::ImageRemoveArgs),
    /// Load images from an archive (as `image load`)
    Load(image::LoadArgs),
    /// Fetch an image from a registry (as `image pull`)
    Pull(crate::commands::pull::PullArgs),
    /// Write images to an archive (as `image save`)
    Save(crate::commands::save::SaveArgs),
    /// Log in to and out of registries
    Registry {
        /// What to do with registries.
        #[command(subcommand)]
        command: crate::commands::registry::RegistryCommand,
    },

    /// Create, list and remove volumes
    #[command(visible_alias = "vol")]
    Volume {
        /// What to do with volumes.
        #[command(subcommand)]
        command: volume::VolumeCommand,
    },
    /// Keep disks of stopped sandboxes, and begin others with them
    #[command(visible_alias = "snap")]
    Snapshot {
        /// What to do with snapshots.
        #[command(subcommand)]
        command: crate::commands::snapshot::SnapshotCommand,
    },
    /// Boot and warm sandboxes once, and begin others with them
    Template {
        /// What to do with templates.
        #[command(subcommand)]
        command: crate::commands::template::TemplateCommand,
    },
    /// Show what takes disk space, and what could go
    Df,

    /// Show what a sandbox wrote
    Logs(logs::LogsArgs),
    /// Show what happened to sandboxes
    Events(events::EventsArgs),
    /// Show what sandboxes use
    Metrics(crate::commands::metrics::MetricsArgs),
    /// Watch what sandboxes use, full-screen
    Top(crate::commands::top::TopArgs),
    /// Explain and log what the network allows
    Net {
        /// What to ask.
        #[command(subcommand)]
        command: net::NetCommand,
    },

    /// Say what this host can do, and what to install
    Doctor(doctor::DoctorArgs),
    /// Show the settings in force
    Config {
        /// What to do with settings.
        #[command(subcommand)]
        command: config::ConfigCommand,
    },
    /// Make a command of the host that runs an image
    Install(install::InstallArgs),
    /// Remove such a command
    Uninstall(uninstall::UninstallArgs),
    /// Stop the service, or remove msb itself
    #[command(name = "self")]
    Itself {
        /// What to do with the installation.
        #[command(subcommand)]
        command: itself::SelfCommand,
    },

    /// Print the completion script of a shell
    Completion(completion::CompletionArgs),
    /// Give agents sandboxes as tools: an MCP server on stdin and stdout
    Mcp(mcp::McpArgs),
    /// Look inside the service
    Debug {
        /// What to look at.
        #[command(subcommand)]
        command: debug::DebugCommand,
    },
    /// Show the versions of msb and of its service
    Version,
}

impl Command {
    /// Whether the exit codes below 125 belong to a workload.
    #[must_use]
    pub fn is_workload(&self) -> bool {
        matches!(self, Self::Run(_) | Self::Exec(_) | Self::Attach(_) | Self::Shell(_))
            || matches!(self, Self::Ssh(args) if args.command.is_none())
    }
}
