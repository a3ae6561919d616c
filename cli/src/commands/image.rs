//! `msb image …`: the images of the store.

use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use msb_protocol::control::{ImageDetail, ImageSummary, LoadEvent};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::images::{PinRequest, TagRequest};
use msb_protocol::quantity::show_bytes;
use msb_sdk::client::LoadOptions;

use super::prune::{self, PruneArgs};
use super::pull::{self, PullArgs};
use super::save::{self, SaveArgs};
use super::status::quoted;
use crate::context::Context;
use crate::failure::{self, ExitStatus, Failure, invalid};
use crate::printer::plain;
use crate::table::Table;
use crate::time;

/// What to do with images.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Load images from a docker or OCI archive
    Load(LoadArgs),
    /// List images
    #[command(name = "ls", visible_alias = "list")]
    List(ImageListArgs),
    /// Show everything about an image
    Inspect(ImageInspectArgs),
    /// Remove images
    #[command(name = "rm", visible_alias = "remove")]
    Remove(ImageRemoveArgs),
    /// Fetch an image from a registry
    Pull(PullArgs),
    /// Write images to an archive, byte for byte as they came
    Save(SaveArgs),
    /// Give an image another name
    Tag(ImageTagArgs),
    /// Show how an image was built
    History(ImageInspectArgs),
    /// Remove images that nothing uses
    Prune(PruneArgs),
    /// Keep images from being pruned
    Pin(ImagePinArgs),
    /// Let prune take images again
    Unpin(ImagePinArgs),
}

/// Options of `image load`.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// The archive; stdin if there is none
    #[arg(short, long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Name the first image so, in place of what the archive says; OLD=NEW renames the one called OLD
    #[arg(short, long, value_name = "[OLD=]NAME[:TAG]")]
    pub tag: Vec<String>,
    /// Platform to take where the archive has several
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub platform: Option<String>,
}

/// Options of `image tag`.
#[derive(Debug, Args)]
pub struct ImageTagArgs {
    /// The image
    #[arg(value_name = "IMAGE")]
    pub reference: String,
    /// Its new name
    #[arg(value_name = "NAME[:TAG]")]
    pub name: String,
}

/// Options of `image pin` and `image unpin`.
#[derive(Debug, Args)]
pub struct ImagePinArgs {
    /// Images
    #[arg(required = true, value_name = "IMAGE")]
    pub references: Vec<String>,
}

/// Options of `image ls`.
#[derive(Debug, Args)]
pub struct ImageListArgs {
    /// Show whole digests
    #[arg(long)]
    pub digests: bool,
}

/// Options of `image inspect`.
#[derive(Debug, Args)]
pub struct ImageInspectArgs {
    /// The image
    #[arg(value_name = "IMAGE")]
    pub reference: String,
}

/// Options of `image rm`.
#[derive(Debug, Args)]
pub struct ImageRemoveArgs {
    /// Images
    #[arg(required = true, value_name = "IMAGE")]
    pub references: Vec<String>,
    /// Untag even where sandboxes use it
    #[arg(short, long)]
    pub force: bool,
}

/// Carries it out.
///
/// # Errors
/// The command's own.
pub async fn run(command: ImageCommand, context: &Context) -> Result<ExitStatus, Failure> {
    match command {
        ImageCommand::Load(args) => load(args, context).await,
        ImageCommand::List(args) => list(args, context).await,
        ImageCommand::Inspect(args) => inspect(args, context).await,
        ImageCommand::Remove(args) => remove(args, context).await,
        ImageCommand::Pull(args) => pull::run(args, context).await,
        ImageCommand::Save(args) => save::run(args, context).await,
        ImageCommand::Tag(args) => tag(args, context).await,
        ImageCommand::History(args) => history(args, context).await,
        ImageCommand::Prune(args) => prune::run(args, context).await,
        ImageCommand::Pin(args) => pin(args, true, context).await,
        ImageCommand::Unpin(args) => pin(args, false, context).await,
    }
}

/// `image load`: prints the names of what was loaded.
///
/// # Errors
/// `path_not_found`, `invalid_archive` and others of the service.
pub async fn load(args: LoadArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let file = match &args.input {
        Some(path) if path.as_os_str() != "-" => {
            let file = std::fs::File::open(path).map_err(|error| failure::file(path, &error))?;
            if file.metadata().map_err(|error| failure::file(path, &error))?.is_dir() {
                return Err(invalid(format!("{} is a directory, not an archive", path.display())));
            }
            file
        }
        _ if std::io::stdin().is_terminal() => {
            let error = ApiError::new(ErrorCode::InvalidConfig, "an archive is required")
                .with_hint("name one with -i FILE, or pipe one in: docker save IMAGE | msb load");
            return Err(error.into());
        }
        _ => {
            let stdin = std::io::stdin().as_fd().try_clone_to_owned();
            stdin.map_err(|error| failure::file("-".as_ref(), &error))?.into()
        }
    };
    let sum = file.metadata().ok().filter(std::fs::Metadata::is_file).map(|data| data.len());
    let client = context.client().await?;
    let progress = context.printer.bytes_bar("loading", sum);
    let how = LoadOptions { tags: args.tag, platform: args.platform };
    let mut events = client.load_file(file, &how).await?;
    let mut warnings = Vec::new();
    let images = loop {
        match events.next().await? {
            Some(LoadEvent::Progress { bytes }) => progress.position(bytes),
            Some(LoadEvent::Layer { diff_id, known }) => {
                let short = short_digest(&diff_id);
                progress.say(&format!("loading: layer {short} {}", if known { "is known" } else { "is ready" }));
            }
            Some(LoadEvent::Warning { message }) => warnings.push(message),
            Some(LoadEvent::Done { images }) => break images,
            Some(LoadEvent::Error { error }) => return Err(error.into()),
            None => return Err(ApiError::new(ErrorCode::DaemonUnavailable, "the load ended without an answer").into()),
        }
    };
    drop(progress);
    for warning in warnings {
        context.printer.warning(&warning);
    }
    show_loaded(&images, context)
}

/// Names, or digests where there are none.
fn show_loaded(images: &[ImageSummary], context: &Context) -> Result<ExitStatus, Failure> {
    if context.printer.is_json() {
        context.printer.json(images)?;
    } else {
        for image in images {
            let names = if image.references.is_empty() { image.digest.clone() } else { image.references.join("\n") };
            context.printer.text(&plain(&names))?;
        }
    }
    Ok(ExitStatus::SUCCESS)
}

/// `image ls`.
///
/// # Errors
/// Those of the service.
pub async fn list(args: ImageListArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let images = context.client().await?.images().await?.images;
    if context.printer.is_json() {
        context.printer.json(&images)?;
    } else if context.printer.is_quiet() {
        let names: String = images.iter().flat_map(names).map(|name| format!("{name}\n")).collect();
        context.printer.text(&plain(&names))?;
    } else {
        let zone = context.zone();
        let mut table = Table::new(&["IMAGE", "DIGEST", "PLATFORM", "SIZE", "LOADED"]);
        for image in &images {
            for name in names(image) {
                table.row(vec![
                    name,
                    if args.digests { image.digest.clone() } else { short_digest(&image.digest) },
                    image.platform.clone(),
                    show_bytes(image.unpacked_bytes),
                    time::local(image.loaded_at, &zone),
                ]);
            }
        }
        context.printer.table(&table)?;
    }
    Ok(ExitStatus::SUCCESS)
}

async fn inspect(args: ImageInspectArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let detail = context.client().await?.image(&args.reference).await?;
    if context.printer.is_json() {
        context.printer.json(&detail)?
    } else {
        context.printer.text(&render(&detail, &context.zone()))?
    }
    Ok(ExitStatus::SUCCESS)
}

/// `image rm`: one failure does not keep the others from being removed.
///
/// # Errors
/// Only those of reaching the service and of writing.
pub async fn remove(args: ImageRemoveArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let client = context.client().await?;
    let mut removed = Vec::new();
    let mut failed = false;
    for reference in args.references {
        match client.remove_image(&reference, args.force).await {
            Ok(removal) => removed.push(removal),
            Err(error) => {
                context.printer.error(error.api());
                failed = true;
            }
        }
    }
    if context.printer.is_json() {
        context.printer.json(&removed)?;
    } else {
        let mut text = String::new();
        for removal in &removed {
            text.extend(removal.untagged.iter().map(|name| format!("Untagged: {name}\n")));
            text.extend(removal.deleted.iter().map(|digest| format!("Deleted: {digest}\n")));
        }
        context.printer.text(&plain(&text))?;
    }
    Ok(if failed { ExitStatus::FAILURE } else { ExitStatus::SUCCESS })
}

async fn tag(args: ImageTagArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let request = TagRequest { reference: args.reference, name: args.name };
    let image = context.client().await?.tag_image(&request).await?;
    if context.printer.is_json() {
        context.printer.json(&image)?;
    }
    Ok(ExitStatus::SUCCESS)
}

async fn pin(args: ImagePinArgs, pinned: bool, context: &Context) -> Result<ExitStatus, Failure> {
    let client = context.client().await?;
    let mut done = Vec::new();
    let mut failed = false;
    for reference in args.references {
        match client.pin_image(&PinRequest { reference: reference.clone(), pinned }).await {
            Ok(_) => done.push(reference),
            Err(error) => {
                context.printer.error(error.api());
                failed = true;
            }
        }
    }
    if context.printer.is_json() {
        context.printer.json(&done)?;
    } else {
        context.printer.text(&plain(&done.iter().map(|name| format!("{name}\n")).collect::<String>()))?;
    }
    Ok(if failed { ExitStatus::FAILURE } else { ExitStatus::SUCCESS })
}

async fn history(args: ImageInspectArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let detail = context.client().await?.image(&args.reference).await?;
    if context.printer.is_json() {
        context.printer.json(&detail.history)?;
        return Ok(ExitStatus::SUCCESS);
    }
    let zone = context.zone();
    let mut table = Table::new(&["CREATED", "LAYER", "SIZE", "CREATED BY", "COMMENT"]);
    // Newest first, as docker shows it.
    for step in detail.history.iter().rev() {
        table.row(vec![
            step.created_at.map(|at| time::local(at, &zone)).unwrap_or_default(),
            step.diff_id.as_deref().map(short_digest).unwrap_or_default(),
            show_bytes(step.bytes),
            step.created_by.clone(),
            step.comment.clone(),
        ]);
    }
    context.printer.table(&table)?;
    Ok(ExitStatus::SUCCESS)
}

/// The names of an image, or its digest if it has none.
fn names(image: &ImageSummary) -> Vec<String> {
    if image.references.is_empty() { vec![image.digest.clone()] } else { image.references.clone() }
}

/// Twelve digits of a digest, as docker shows them.
pub(super) fn short_digest(digest: &str) -> String {
    digest.split_once(':').map_or(digest, |(_, digits)| digits).chars().take(12).collect()
}

/// The detail for people.
fn render(detail: &ImageDetail, zone: &jiff::tz::TimeZone) -> String {
    let (summary, config) = (&detail.summary, &detail.config);
    let words = |words: &[String]| words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
    let mut rows: Vec<(&str, String)> = vec![
        ("Names", summary.references.join(", ")),
        ("Digest", summary.digest.clone()),
        ("Platform", summary.platform.clone()),
        ("Size", format!("{} ({} packed)", show_bytes(summary.unpacked_bytes), show_bytes(summary.compressed_bytes))),
        ("Made", summary.created_at.map(|at| time::local(at, zone)).unwrap_or_default()),
        ("Loaded", time::local(summary.loaded_at, zone)),
        ("Pinned", if summary.pinned { "yes".into() } else { String::new() }),
        ("Entrypoint", words(&config.entrypoint)),
        ("Command", words(&config.cmd)),
        ("User", config.user.clone()),
        ("Workdir", config.working_dir.clone()),
        ("Stop signal", config.stop_signal.clone().unwrap_or_default()),
        ("Exposed ports", config.exposed_ports.join(", ")),
        ("Volumes", config.volumes.join(", ")),
    ];
    rows.extend(
        config
            .env
            .iter()
            .enumerate()
            .map(|(index, variable)| (if index == 0 { "Variables" } else { "" }, variable.clone())),
    );
    rows.extend(
        config
            .labels
            .iter()
            .enumerate()
            .map(|(index, (key, value))| (if index == 0 { "Labels" } else { "" }, format!("{key}={value}"))),
    );
    rows.extend(detail.layer_details.iter().enumerate().map(|(index, layer)| {
        let shared =
            if layer.shared_by > 1 { format!(", shared by {} images", layer.shared_by) } else { String::new() };
        (
            if index == 0 { "Layers" } else { "" },
            format!(
                "{} {} ({} packed){shared}",
                short_digest(&layer.diff_id),
                show_bytes(layer.unpacked_bytes),
                show_bytes(layer.compressed_bytes)
            ),
        )
    }));
    let snapshots = detail.used_by_snapshots.iter().map(|name| format!("snapshot {name}"));
    let users: Vec<String> = detail.used_by.iter().map(ToString::to_string).chain(snapshots).collect();
    rows.push(("Used by", users.join(", ")));
    rows.iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(key, value)| {
            let key = if key.is_empty() { String::new() } else { format!("{key}:") };
            format!("{key:16}{}\n", plain(&value.replace('\n', "\\n")))
        })
        .collect()
}
