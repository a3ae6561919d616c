//! `msb create`: a detached sandbox that waits for `exec`, or runs a command in the background.

use clap::Args;
use msb_protocol::control::{CreateRequest, SandboxDetail};
use msb_protocol::error::ErrorCode;
use msb_protocol::images::{PullPolicy, PullRequest, neither_here_nor_fetched};
use msb_protocol::snapshot::snapshot_name;
use msb_protocol::spec::{EngineChoice, SandboxSpec, Workload};

use super::template;
use crate::context::{Context, host_variable};
use crate::creation::{CreationArgs, Pull};
use crate::failure::{self, ExitStatus, Failure};
use crate::{parse, root};

/// Options of `create`.
#[derive(Debug, Args)]
#[command(
    override_usage = "msb create [OPTIONS] IMAGE [COMMAND]...\n       msb create [OPTIONS] --snapshot NAME [COMMAND]..."
)]
pub struct CreateArgs {
    /// What it is made of.
    #[command(flatten)]
    pub creation: CreationArgs,
    /// The image (or the path of a directory or raw disk), and what to run of it; without a command it boots and waits
    #[arg(required_unless_present = "snapshot", num_args = 1.., trailing_var_arg = true, value_names = ["IMAGE", "COMMAND"])]
    pub image_and_command: Vec<String>,
}

/// Carries it out: prints the name.
///
/// # Errors
/// Those of the options and of the service.
pub async fn run(args: CreateArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let (mut spec, command) = spec(&args.creation, args.image_and_command, context).await?;
    spec.detached = true;
    if !command.is_empty() {
        spec.command = Some(command);
        spec.workload = Workload::Main;
    }
    let detail = create(spec, false, &args.creation, context).await?;
    if context.printer.is_json() {
        context.printer.json(&detail)?
    } else {
        context.printer.text(detail.summary.name.as_str())?
    }
    Ok(ExitStatus::SUCCESS)
}

/// `IMAGE [--] [COMMAND…]` as its two parts.
#[must_use]
pub fn split(mut words: Vec<String>) -> (String, Vec<String>) {
    // The parser demands at least one word.
    let command = if words.is_empty() { Vec::new() } else { words.split_off(1) };
    (words.pop().unwrap_or_default(), parse::words(command))
}

/// The spec of the options, over an image that is the first of `words` or over a snapshot; and the command, if one is given.
///
/// # Errors
/// Those of the options; `snapshot_not_found`.
pub async fn spec(
    options: &CreationArgs,
    words: Vec<String>,
    context: &Context,
) -> Result<(SandboxSpec, Vec<String>), Failure> {
    let config = context.config()?;
    let Some(name) = &options.snapshot else {
        let (image, command) = split(words);
        let local = root::local(&image)?;
        if local.is_none()
            && options.pull == Pull::IfMissing
            && let Some(template) = template::find(&image, &context.client().await?).await?
        {
            return Ok((options.spec(("", Some(&template)), &config, &host_variable)?, command));
        }
        let mut spec = options.spec((&image, None), &config, &host_variable)?;
        if let Some((kind, path)) = local {
            if options.pull == Pull::Always {
                return Err(failure::invalid(format!("{image} is a path: there is nothing to pull")));
            }
            (spec.root, spec.image) = (kind, path);
        }
        return Ok((spec, command));
    };
    let name = snapshot_name(name).map_err(Failure::Api)?;
    let snapshot = context.client().await?.snapshot(&name).await?;
    Ok((options.spec(("", Some(&snapshot)), &config, &host_variable)?, parse::words(words)))
}

/// Checks a spec, has its image fetched if the options say so, and has the service create the sandbox; a sign turns meanwhile. Software emulation is said once.
///
/// # Errors
/// Those of the spec and of the service.
pub async fn create(
    spec: SandboxSpec,
    hold_main: bool,
    options: &CreationArgs,
    context: &Context,
) -> Result<SandboxDetail, Failure> {
    spec.check()?;
    let client = context.client().await?;
    // Fetched here first, because here somebody watches; should it be pruned before the next line, the service fetches it again.
    let pull = match options.pull {
        Pull::Never => PullPolicy::Never,
        Pull::Always | Pull::IfMissing => PullPolicy::IfMissing,
    };
    // A snapshot's image is there, or the service says what to do about it.
    let is_asked = options.pull == Pull::IfMissing && spec.snapshot.is_none() && !spec.root.is_local();
    let found = if is_asked { client.image(&spec.image).await.map(drop) } else { Ok(()) };
    let absent = found.err().filter(|error| error.code() == ErrorCode::ImageNotFound);
    if absent.is_some() || options.pull == Pull::Always {
        let wanted = PullRequest { reference: spec.image.clone(), ..PullRequest::default() };
        super::pull::fetch(&client, &wanted, context).await.map_err(|failure| match (failure, &absent) {
            (Failure::Api(error), Some(absent)) => Failure::Api(neither_here_nor_fetched(absent.api(), error)),
            (failure, _) => failure,
        })?;
    }
    let request = CreateRequest { spec, hold_main, replace_grace_ms: options.replace_grace_ms(), pull };
    let what = request.spec.snapshot.as_ref().map_or(request.spec.image.as_str(), |name| name.as_str());
    let progress = context.printer.spinner(&format!("booting {what}"));
    let detail = client.create(&request).await?;
    drop(progress);
    if let (Some(EngineChoice::Qemu), Some(reason)) = (detail.summary.engine, &detail.engine_reason) {
        context.printer.terminal_note(reason);
    }
    Ok(detail)
}
