//! `msb snapshot …`: the disk of a stopped sandbox, kept.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::pin::Pin;

use bytes::Bytes;
use clap::{Args, Subcommand};
use futures_util::{Stream, StreamExt};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::SandboxName;
use msb_protocol::quantity::show_bytes;
use msb_protocol::snapshot::{
    CreateSnapshot, ImportSnapshot, POOL_LABEL, POOL_SIZE_MAX, SnapshotDetail, SnapshotKind, snapshot_name,
};
use tokio_util::io::ReaderStream;

use super::save;
use crate::context::Context;
use crate::failure::{self, ExitStatus, Failure};
use crate::parse;
use crate::printer::plain;
use crate::time;

type Archive = Pin<Box<dyn Stream<Item = std::io::Result<Bytes>> + Send>>;

/// Bytes of an archive that are read and sent at a time.
const CHUNK_LEN: usize = 256 << 10;

/// What to do with snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Keep the disk of a stopped sandbox, or disk and memory of a running one
    Create(SnapshotCreateArgs),
    /// List snapshots
    #[command(name = "ls", visible_alias = "list")]
    List,
    /// Show everything about a snapshot
    Inspect(SnapshotArgs),
    /// Remove snapshots
    #[command(name = "rm", visible_alias = "remove")]
    Remove(SnapshotsArgs),
    /// Compare every byte of snapshots with what was written
    Verify(SnapshotsArgs),
    /// Write a snapshot to a .tar.zst archive, without its image
    Export(SnapshotExportArgs),
    /// Take a snapshot in from an archive
    Import(SnapshotImportArgs),
}

/// Options of `snapshot create`.
#[derive(Debug, Args)]
pub struct SnapshotCreateArgs {
    /// Its name
    #[arg(value_name = "NAME")]
    pub name: String,
    /// The sandbox: stopped, or running with --memory
    #[arg(long, value_name = "SANDBOX")]
    pub from: String,
    /// Set a label
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub label: Vec<String>,
    /// Its memory too, while it runs (engine kvm)
    #[arg(long)]
    pub memory: bool,
    /// With --memory: what is made of it beforehand.
    #[command(flatten)]
    pub pool: PoolArgs,
}

/// Ready forks of a snapshot with memory.
#[derive(Debug, Args)]
pub struct PoolArgs {
    /// Keep this many ready forks of it: copies that are made before they are needed
    #[arg(long, value_name = "COUNT", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=POOL_SIZE_MAX as u64))]
    pub pool: u64,
}

impl PoolArgs {
    /// The label that asks for them.
    pub(super) fn label(&self) -> Option<(String, String)> {
        (self.pool > 0).then(|| (POOL_LABEL.to_owned(), self.pool.to_string()))
    }
}

/// Options that name one snapshot.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// The snapshot
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// Options that name several.
#[derive(Debug, Args)]
pub struct SnapshotsArgs {
    /// Snapshots
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// Options of `snapshot export`.
#[derive(Debug, Args)]
pub struct SnapshotExportArgs {
    /// The snapshot
    #[arg(value_name = "NAME")]
    pub name: String,
    /// The archive; stdout if there is none
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Options of `snapshot import`.
#[derive(Debug, Args)]
pub struct SnapshotImportArgs {
    /// The archive; stdin if there is none
    #[arg(short, long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Its name here, in place of the one it was taken under
    #[arg(short, long, value_name = "NAME")]
    pub name: Option<String>,
}

fn named(text: &str) -> Result<SandboxName, Failure> {
    snapshot_name(text).map_err(Failure::Api)
}

/// Carries it out.
///
/// # Errors
/// The command's own.
pub async fn run(command: SnapshotCommand, context: &Context) -> Result<ExitStatus, Failure> {
    match command {
        SnapshotCommand::Create(args) => create(args, context).await,
        SnapshotCommand::List => list(context).await,
        SnapshotCommand::Inspect(args) => inspect(args, context).await,
        SnapshotCommand::Remove(args) => remove(args, context).await,
        SnapshotCommand::Verify(args) => verify(args, context).await,
        SnapshotCommand::Export(args) => export(args, context).await,
        SnapshotCommand::Import(args) => import(args, context).await,
    }
}

async fn create(args: SnapshotCreateArgs, context: &Context) -> Result<ExitStatus, Failure> {
    if args.pool.pool > 0 && !args.memory {
        return Err(failure::invalid("ready forks are made of a memory: --pool goes with --memory"));
    }
    let request = CreateSnapshot {
        name: named(&args.name)?,
        from: parse::name(&args.from)?,
        labels: parse::labels(&args.label).into_iter().chain(args.pool.label()).collect(),
        memory: args.memory,
    };
    let client = context.client().await?;
    let what = if request.memory { "memory and disk" } else { "disk" };
    let progress = context.printer.spinner(&format!("copying the {what} of {}", request.from));
    let detail = client.create_snapshot(&request).await?;
    drop(progress);
    said(&detail, context)
}

/// The name of a snapshot that is there now.
pub(super) fn said(detail: &SnapshotDetail, context: &Context) -> Result<ExitStatus, Failure> {
    if context.printer.is_json() {
        context.printer.json(detail)?;
    } else {
        context.printer.text(detail.summary.name.as_str())?;
    }
    Ok(ExitStatus::SUCCESS)
}

async fn list(context: &Context) -> Result<ExitStatus, Failure> {
    let snapshots = context.client().await?.snapshots().await?.snapshots;
    let zone = context.zone();
    let header = &["SNAPSHOT", "KIND", "OF", "IMAGE", "PARENT", "SIZE", "ON DISK", "CREATED"];
    context.printer.list(
        &snapshots,
        |snapshot| &snapshot.name,
        header,
        |snapshot| {
            vec![
                snapshot.name.to_string(),
                match snapshot.kind {
                    SnapshotKind::Disk => "disk".into(),
                    SnapshotKind::Memory => "memory".into(),
                },
                snapshot.source.to_string(),
                snapshot.image.reference.clone(),
                snapshot.parent.as_ref().map(|parent| parent.name.to_string()).unwrap_or_default(),
                show_bytes(snapshot.size_bytes),
                show_bytes(snapshot.allocated_bytes),
                time::local(snapshot.created_at, &zone),
            ]
        },
    )?;
    Ok(ExitStatus::SUCCESS)
}

pub(super) async fn inspect(args: SnapshotArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let detail = context.client().await?.snapshot(&named(&args.name)?).await?;
    if context.printer.is_json() {
        context.printer.json(&detail)?;
    } else {
        context.printer.text(&render(&detail, &context.zone()))?;
    }
    Ok(ExitStatus::SUCCESS)
}

fn render(detail: &SnapshotDetail, zone: &jiff::tz::TimeZone) -> String {
    let (summary, spec) = (&detail.summary, &detail.spec);
    let labels: Vec<String> = summary.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let children: Vec<String> = detail.children.iter().map(ToString::to_string).collect();
    let rows = [
        ("Name", summary.name.to_string()),
        ("Id", summary.id.clone()),
        ("Created", format!("{} by msb {}", time::local(summary.created_at, zone), detail.created_by)),
        ("Of sandbox", summary.source.to_string()),
        ("Image", summary.image.reference.clone()),
        ("Image digest", summary.image.digest.clone()),
        (
            "Parent",
            summary.parent.as_ref().map(|parent| format!("{} ({})", parent.name, parent.id)).unwrap_or_default(),
        ),
        ("Children", children.join(", ")),
        (
            "Disk",
            format!(
                "{}, {} of data, {} on the host",
                show_bytes(summary.size_bytes),
                show_bytes(detail.disk.data_bytes),
                show_bytes(summary.allocated_bytes)
            ),
        ),
        ("Disk digest", detail.disk.digest.clone()),
        (
            "Memory image",
            detail
                .memory
                .as_ref()
                .map(|memory| format!("{} of data", show_bytes(memory.data_bytes)))
                .unwrap_or_default(),
        ),
        ("Memory digest", detail.memory.as_ref().map(|memory| memory.digest.clone()).unwrap_or_default()),
        (
            "Ready forks",
            summary.ready_forks.map(|forks| format!("{} of {}", forks.ready, forks.wanted)).unwrap_or_default(),
        ),
        ("CPUs", spec.cpus.to_string()),
        ("Memory", show_bytes(u64::from(spec.memory_mib) << 20)),
        ("User", spec.user.clone().unwrap_or_default()),
        ("Workdir", spec.workdir.clone().unwrap_or_default()),
        // Values may be secrets and are long; JSON has them.
        ("Variables", spec.env.keys().cloned().collect::<Vec<_>>().join(" ")),
        ("Labels", labels.join(", ")),
        ("Path", detail.path.clone()),
    ];
    rows.iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(key, value)| format!("{:16}{}\n", format!("{key}:"), plain(&value.replace('\n', "\\n"))))
        .collect()
}

/// One failure does not keep the others from being removed. Children go before their parents, however they are named.
pub(super) async fn remove(args: SnapshotsArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let names = args.names.iter().map(|name| named(name)).collect::<Result<Vec<_>, _>>()?;
    let client = context.client().await?;
    let (mut removed, mut left) = (Vec::new(), names);
    let errors = loop {
        let (before, mut errors, mut again) = (left.len(), Vec::new(), Vec::new());
        for name in left {
            match client.remove_snapshot(&name).await {
                Ok(()) => removed.push(name),
                Err(error) => {
                    errors.push(error);
                    again.push(name);
                }
            }
        }
        // A parent can go once its children have.
        if again.is_empty() || again.len() == before {
            break errors;
        }
        left = again;
    };
    for error in &errors {
        context.printer.error(error.api());
    }
    if context.printer.is_json() {
        context.printer.json(&removed)?;
    } else {
        context.printer.text(&removed.iter().map(|name| format!("{name}\n")).collect::<String>())?;
    }
    Ok(if errors.is_empty() { ExitStatus::SUCCESS } else { ExitStatus::FAILURE })
}

/// Damage is an answer on stdout and a failure of the command.
async fn verify(args: SnapshotsArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let names = args.names.iter().map(|name| named(name)).collect::<Result<Vec<_>, _>>()?;
    let client = context.client().await?;
    let (mut checks, mut failed) = (Vec::new(), false);
    for name in names {
        let progress = context.printer.spinner(&format!("reading {name}"));
        let outcome = client.verify_snapshot(&name).await;
        drop(progress);
        match outcome {
            Ok(check) => {
                failed |= !check.problems.is_empty();
                checks.push(check);
            }
            Err(error) => {
                context.printer.error(error.api());
                failed = true;
            }
        }
    }
    if context.printer.is_json() {
        context.printer.json(&checks)?;
    } else {
        let mut text = String::new();
        for check in &checks {
            if check.problems.is_empty() {
                text.push_str(&format!("{}: whole, {} read\n", check.name, show_bytes(check.bytes)));
            }
            for problem in &check.problems {
                text.push_str(&format!("{}: DAMAGED: {}\n", check.name, plain(problem)));
            }
        }
        context.printer.text(&text)?;
    }
    Ok(if failed { ExitStatus::FAILURE } else { ExitStatus::SUCCESS })
}

async fn export(args: SnapshotExportArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let name = named(&args.name)?;
    let path = args.output.filter(|path| path.as_os_str() != "-");
    save::refuse_terminal(path.as_deref(), "msb snapshot export NAME | ssh HOST msb snapshot import")?;
    let archive = context.client().await?.export_snapshot(&name).await?;
    save::write(archive, path.as_deref(), "exporting", context).await?;
    Ok(ExitStatus::SUCCESS)
}

async fn import(args: SnapshotImportArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let how = ImportSnapshot { name: args.name.as_deref().map(named).transpose()?.map(|name| name.to_string()) };
    let archive: Archive = match args.input.filter(|path| path.as_os_str() != "-") {
        Some(path) => {
            let failed = |error: std::io::Error| failure::file(&path, &error);
            let file = std::fs::File::open(&path).map_err(failed)?;
            if file.metadata().map_err(failed)?.is_dir() {
                return Err(failure::invalid(format!("{} is a directory, not an archive", path.display())));
            }
            Box::pin(ReaderStream::with_capacity(tokio::fs::File::from_std(file), CHUNK_LEN))
        }
        None if std::io::stdin().is_terminal() => {
            let error = ApiError::new(ErrorCode::InvalidConfig, "an archive is required")
                .with_hint("name one with -i FILE, or pipe one in");
            return Err(error.into());
        }
        None => Box::pin(ReaderStream::with_capacity(tokio::io::stdin(), CHUNK_LEN)),
    };
    let client = context.client().await?;
    let progress = context.printer.spinner("reading and comparing");
    let detail = client.import_snapshot(archive.fuse(), &how).await?;
    drop(progress);
    said(&detail, context)
}

/// A snapshot with this spec, for tests.
#[cfg(test)]
pub(crate) fn example(spec: msb_protocol::spec::SandboxSpec) -> SnapshotDetail {
    use msb_protocol::snapshot::{SnapshotDisk, SnapshotImage, SnapshotKind, SnapshotSummary};
    let name = |text: &str| SandboxName::parse(text).unwrap();
    SnapshotDetail {
        summary: SnapshotSummary {
            name: name("warm"),
            id: "sha256:00".into(),
            kind: SnapshotKind::Disk,
            created_at: jiff::Timestamp::UNIX_EPOCH,
            source: name("box"),
            image: SnapshotImage { reference: spec.image.clone(), digest: "sha256:01".into() },
            parent: None,
            size_bytes: 0,
            allocated_bytes: 0,
            labels: Default::default(),
            ready_forks: None,
        },
        spec,
        disk: SnapshotDisk { size_bytes: 0, data_bytes: 0, digest: "sha256:02".into() },
        memory: None,
        created_by: "0.1.0".into(),
        children: Vec::new(),
        path: "/snapshots/warm".into(),
    }
}
