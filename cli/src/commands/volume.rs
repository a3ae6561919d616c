//! `msb volume …`: named volumes.

use clap::{Args, Subcommand, ValueEnum};
use msb_protocol::error::ErrorCode;
use msb_protocol::id::SandboxName;
use msb_protocol::mount::{VolumeKind, volume_name};
use msb_protocol::quantity::show_bytes;
use msb_protocol::volume::{CreateVolume, VolumeDetail};

use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::parse;
use crate::printer::plain;
use crate::time;

/// What to do with volumes.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Create a volume: a shared directory, or a disk of its own
    Create(VolumeCreateArgs),
    /// List volumes, who mounts them, and how
    #[command(name = "ls", visible_alias = "list")]
    List,
    /// Show everything about a volume
    Inspect(VolumeInspectArgs),
    /// Remove volumes that no sandbox mounts
    #[command(name = "rm", visible_alias = "remove")]
    Remove(VolumeRemoveArgs),
    /// Remove every volume that no sandbox mounts
    Prune(VolumePruneArgs),
}

/// The kinds of volumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A directory of the host; several sandboxes may mount it at once
    #[default]
    Dir,
    /// A disk image with a file system of its own; one sandbox at a time
    Disk,
}

/// Options of `volume create`.
#[derive(Debug, Args)]
pub struct VolumeCreateArgs {
    /// Its name
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Its kind
    #[arg(long, value_enum, default_value_t)]
    pub kind: Kind,
    /// Size of a disk, as in 10G; it takes host space only as it fills
    #[arg(long, value_name = "SIZE", value_parser = parse::mib)]
    pub size: Option<u32>,
}

/// Options of `volume inspect`.
#[derive(Debug, Args)]
pub struct VolumeInspectArgs {
    /// The volume
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// Options of `volume rm`.
#[derive(Debug, Args)]
pub struct VolumeRemoveArgs {
    /// Volumes
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// Options of `volume prune`.
#[derive(Debug, Args)]
pub struct VolumePruneArgs {
    /// Only say what would be removed
    #[arg(long)]
    pub dry_run: bool,
}

fn named(text: &str) -> Result<SandboxName, Failure> {
    volume_name(text).map_err(Failure::Api)
}

/// Carries it out.
///
/// # Errors
/// The command's own.
pub async fn run(command: VolumeCommand, context: &Context) -> Result<ExitStatus, Failure> {
    match command {
        VolumeCommand::Create(args) => create(args, context).await,
        VolumeCommand::List => list(context).await,
        VolumeCommand::Inspect(args) => inspect(args, context).await,
        VolumeCommand::Remove(args) => remove(args, context).await,
        VolumeCommand::Prune(args) => prune(args, context).await,
    }
}

async fn create(args: VolumeCreateArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let kind = match args.kind {
        Kind::Dir => VolumeKind::Dir,
        Kind::Disk => VolumeKind::Disk,
    };
    let request = CreateVolume { name: named(&args.name)?, kind, size_mib: args.size };
    let detail = context.client().await?.create_volume(&request).await?;
    if context.printer.is_json() {
        context.printer.json(&detail)?;
    } else {
        context.printer.text(detail.name.as_str())?;
    }
    Ok(ExitStatus::SUCCESS)
}

async fn list(context: &Context) -> Result<ExitStatus, Failure> {
    let volumes = context.client().await?.volumes().await?.volumes;
    let zone = context.zone();
    let header = &["VOLUME", "KIND", "SIZE", "ON DISK", "CREATED", "MOUNTED BY"];
    context.printer.list(
        &volumes,
        |volume| &volume.name,
        header,
        |volume| {
            vec![
                volume.name.to_string(),
                volume.kind.as_str().into(),
                volume.size_bytes.map(show_bytes).unwrap_or_default(),
                show_bytes(volume.allocated_bytes),
                time::local(volume.created_at, &zone),
                users(volume).join(", "),
            ]
        },
    )?;
    Ok(ExitStatus::SUCCESS)
}

/// Who mounts it where and how.
fn users(volume: &VolumeDetail) -> Vec<String> {
    volume.users.iter().map(|user| format!("{}:{} ({})", user.sandbox, user.target, user.options)).collect()
}

async fn inspect(args: VolumeInspectArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let detail = context.client().await?.volume(&named(&args.name)?).await?;
    if context.printer.is_json() {
        context.printer.json(&detail)?;
    } else {
        context.printer.text(&render(&detail, &context.zone()))?;
    }
    Ok(ExitStatus::SUCCESS)
}

fn render(detail: &VolumeDetail, zone: &jiff::tz::TimeZone) -> String {
    let rows = [
        ("Name", detail.name.to_string()),
        ("Kind", detail.kind.as_str().to_owned()),
        ("Size", detail.size_bytes.map(show_bytes).unwrap_or_default()),
        ("On disk", show_bytes(detail.allocated_bytes)),
        ("Created", time::local(detail.created_at, zone)),
        ("Path", detail.path.clone()),
        ("Mounted by", users(detail).join(", ")),
    ];
    rows.iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(key, value)| format!("{:16}{}\n", format!("{key}:"), plain(&value.replace('\n', "\\n"))))
        .collect()
}

/// One failure does not keep the others from being removed.
async fn remove(args: VolumeRemoveArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let names = args.names.iter().map(|name| named(name)).collect::<Result<Vec<_>, _>>()?;
    let client = context.client().await?;
    let (mut removed, mut failed) = (Vec::new(), false);
    for name in names {
        match client.remove_volume(&name).await {
            Ok(()) => removed.push(name),
            Err(error) => {
                context.printer.error(error.api());
                failed = true;
            }
        }
    }
    said(&removed, context)?;
    Ok(if failed { ExitStatus::FAILURE } else { ExitStatus::SUCCESS })
}

async fn prune(args: VolumePruneArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let client = context.client().await?;
    let mut removed = Vec::new();
    for volume in client.volumes().await?.volumes {
        if !volume.users.is_empty() {
            continue;
        }
        if !args.dry_run {
            match client.remove_volume(&volume.name).await {
                Ok(()) => {}
                // Mounted or removed by somebody since the list was made.
                Err(error) if matches!(error.api().code, ErrorCode::VolumeInUse | ErrorCode::VolumeNotFound) => {
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
        }
        removed.push(volume.name);
    }
    said(&removed, context)?;
    Ok(ExitStatus::SUCCESS)
}

fn said(names: &[SandboxName], context: &Context) -> Result<(), Failure> {
    if context.printer.is_json() {
        context.printer.json(&names)?;
    } else {
        context.printer.text(&names.iter().map(|name| format!("{name}\n")).collect::<String>())?;
    }
    Ok(())
}
