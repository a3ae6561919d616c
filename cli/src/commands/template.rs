//! `msb template …`: sandboxes that were booted and warmed once, and begin others. A template is a snapshot with memory and a label; `run` and
//! `create` take its name in the place of an image's.

use clap::{Args, Subcommand};
use msb_protocol::control::ExecRequest;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::SandboxName;
use msb_protocol::quantity::show_bytes;
use msb_protocol::snapshot::{CreateSnapshot, SnapshotDetail, SnapshotKind, TEMPLATE_LABEL, snapshot_name};
use msb_protocol::spec::Workload;
use msb_sdk::Client;
use msb_sdk::exec::OUTPUT_LEN_MAX_DEFAULT;

use super::create;
use super::snapshot::{self, PoolArgs, SnapshotArgs, SnapshotsArgs};
use crate::context::{Context, host_variable};
use crate::creation::CreationArgs;
use crate::failure::{ExitStatus, Failure, invalid};
use crate::parse;
use crate::time;

/// What of a failed command's last words is shown, in bytes.
const LAST_WORDS_LEN: usize = 2000;

/// What to do with templates.
#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Boot an image, warm it up, and keep it as it is then (engine kvm)
    Create(Box<TemplateCreateArgs>),
    /// List templates
    #[command(name = "ls", visible_alias = "list")]
    List,
    /// Show everything about a template
    Inspect(SnapshotArgs),
    /// Remove templates
    #[command(name = "rm", visible_alias = "remove")]
    Remove(SnapshotsArgs),
}

/// Options of `template create`.
#[derive(Debug, Args)]
pub struct TemplateCreateArgs {
    /// Its name, which `run` and `create` take for an image's
    #[arg(value_name = "NAME")]
    pub template: String,
    /// The image
    #[arg(long, value_name = "IMAGE")]
    pub from: String,
    /// A line for the sandbox's shell that warms it up; several run in turn
    #[arg(long, value_name = "COMMAND")]
    pub warm: Vec<String>,
    /// What is made of it beforehand.
    #[command(flatten)]
    pub pool: PoolArgs,
    /// How its sandbox is made, and so those that begin with it.
    #[command(flatten)]
    pub creation: CreationArgs,
}

/// Carries it out.
///
/// # Errors
/// The command's own.
pub async fn run(command: TemplateCommand, context: &Context) -> Result<ExitStatus, Failure> {
    match command {
        TemplateCommand::Create(args) => create(*args, context).await,
        TemplateCommand::List => list(context).await,
        TemplateCommand::Inspect(args) => snapshot::inspect(args, context).await,
        TemplateCommand::Remove(args) => snapshot::remove(args, context).await,
    }
}

/// The template that a word means which stands where an image's name would; none for anything that can only be an image.
///
/// # Errors
/// The service's, but for `snapshot_not_found`.
pub async fn find(word: &str, client: &Client) -> Result<Option<SnapshotDetail>, Failure> {
    let Ok(name) = snapshot_name(word) else { return Ok(None) };
    match client.snapshot(&name).await {
        Ok(found)
            if found.summary.kind == SnapshotKind::Memory && found.summary.labels.contains_key(TEMPLATE_LABEL) =>
        {
            Ok(Some(found))
        }
        Ok(_) => Ok(None),
        Err(error) if error.code() == ErrorCode::SnapshotNotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn list(context: &Context) -> Result<ExitStatus, Failure> {
    let mut templates = context.client().await?.snapshots().await?.snapshots;
    templates.retain(|snapshot| snapshot.labels.contains_key(TEMPLATE_LABEL));
    let zone = context.zone();
    let header = &["TEMPLATE", "IMAGE", "READY", "ON DISK", "CREATED"];
    context.printer.list(
        &templates,
        |template| &template.name,
        header,
        |template| {
            vec![
                template.name.to_string(),
                template.image.reference.clone(),
                template.ready_forks.map_or_else(String::new, |forks| format!("{}/{}", forks.ready, forks.wanted)),
                show_bytes(template.allocated_bytes),
                time::local(template.created_at, &zone),
            ]
        },
    )?;
    Ok(ExitStatus::SUCCESS)
}

async fn create(args: TemplateCreateArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let name = snapshot_name(&args.template).map_err(Failure::Api)?;
    if args.creation.name.is_some() || args.creation.snapshot.is_some() {
        return Err(invalid(
            "a template is made of an image, and its name is the first word: msb template create NAME --from IMAGE",
        ));
    }
    let client = context.client().await?;
    // Said before anything boots.
    if client.snapshot(&name).await.is_ok() {
        let message = format!("there is a snapshot {name} already");
        return Err(ApiError::new(ErrorCode::SnapshotAlreadyExists, message).into());
    }
    let mut spec = args.creation.spec((&args.from, None), &context.config()?, &host_variable)?;
    spec.name = Some(parse::name(&format!("warming-{name}"))?);
    spec.workload = Workload::None;
    // If we die, it goes.
    (spec.detached, spec.ephemeral) = (false, true);
    let mut labels = spec.labels.clone();
    labels.insert(TEMPLATE_LABEL.to_owned(), "true".to_owned());
    labels.extend(args.pool.label());
    let detail = create::create(spec, false, &args.creation, context).await?;
    let from = detail.summary.name;
    let made = async {
        warm(&client, &from, &args.warm, context).await?;
        let progress = context.printer.spinner("copying memory and disk");
        let request = CreateSnapshot { name, from: from.clone(), labels, memory: true };
        let made = client.create_snapshot(&request).await;
        drop(progress);
        Ok::<_, Failure>(made?)
    }
    .await;
    match client.remove(&from, true).await {
        Err(error) if !error.is_not_found() => context.printer.warning(&format!("{from} stays: {error}")),
        _ => {}
    }
    snapshot::said(&made?, context)
}

/// Runs what warms it up.
async fn warm(client: &Client, name: &SandboxName, lines: &[String], context: &Context) -> Result<(), Failure> {
    for line in lines {
        let progress = context.printer.spinner(&format!("warming up: {line}"));
        let command = ["/bin/sh", "-c", line].map(String::from).to_vec();
        let session = client.exec(name, ExecRequest { command, ..ExecRequest::default() }).await?;
        let output = session.collect(None, OUTPUT_LEN_MAX_DEFAULT).await?;
        drop(progress);
        if !output.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            let start = words.char_indices().rev().take(LAST_WORDS_LEN).last().map_or(0, |(at, _)| at);
            let code = output.end.exit_status();
            let message = format!("{line:?} ended with {code}: {}", words[start..].trim());
            return Err(ApiError::new(ErrorCode::ExecFailed, message).into());
        }
    }
    Ok(())
}
