//! `msb pull`, `msb image pull`: fetches an image from its registry, with one bar for each layer.

use std::path::PathBuf;

use clap::Args;
use msb_protocol::control::ImageSummary;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::images::{Credentials, PullEvent, PullRequest};
use msb_sdk::Client;

use super::image::short_digest;
use crate::context::Context;
use crate::failure::{self, ExitStatus, Failure, invalid};
use crate::printer::plain;
use crate::terminal;

/// Options that reach a registry.
#[derive(Debug, Args)]
pub struct RegistryAccess {
    /// Name of the user at the registry
    #[arg(short, long, value_name = "USER")]
    pub username: Option<String>,
    /// Take the password from stdin
    #[arg(long)]
    pub password_stdin: bool,
    /// Allow plain HTTP, and certificates that nobody vouches for
    #[arg(long)]
    pub insecure: bool,
    /// Trust the certificates of this file (PEM) beside the system's
    #[arg(long, value_name = "FILE")]
    pub ca_certs: Option<PathBuf>,
}

impl RegistryAccess {
    /// The text of the certificates.
    ///
    /// # Errors
    /// What the file system says.
    pub fn certificates(&self) -> Result<Option<String>, Failure> {
        let read = |path: &PathBuf| std::fs::read_to_string(path).map_err(|error| failure::file(path, &error));
        self.ca_certs.as_ref().map(read).transpose()
    }

    /// The name and password, asked for where one is missing and somebody can be asked.
    ///
    /// # Errors
    /// `invalid_config` where nobody can be asked.
    pub fn credentials(&self, required: bool) -> Result<Option<Credentials>, Failure> {
        if !required && self.username.is_none() && !self.password_stdin {
            return Ok(None);
        }
        let username = match &self.username {
            Some(username) => username.clone(),
            None if self.password_stdin => return Err(invalid("--password-stdin needs --username")),
            None => terminal::ask("Username: ")?,
        };
        let password = if self.password_stdin {
            let text = std::io::read_to_string(std::io::stdin()).map_err(Failure::Output)?;
            // One newline is the shell's, not the password's.
            text.strip_suffix('\n').map_or(text.as_str(), |text| text.strip_suffix('\r').unwrap_or(text)).to_owned()
        } else {
            terminal::ask_secret("Password: ")?
        };
        if username.is_empty() || password.is_empty() {
            return Err(invalid("a name and a password are needed"));
        }
        Ok(Some(Credentials { username, password }))
    }
}

/// Options of `pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// The image
    #[arg(value_name = "[REGISTRY/]NAME[:TAG|@DIGEST]")]
    pub reference: String,
    /// Platform to fetch, in place of this host's
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub platform: Option<String>,
    /// How the registry is reached.
    #[command(flatten)]
    pub access: RegistryAccess,
}

/// `pull`: prints the image's name.
///
/// # Errors
/// Those of the registry and the service.
pub async fn run(args: PullArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let request = PullRequest {
        reference: args.reference,
        platform: args.platform,
        credentials: args.access.credentials(false)?,
        insecure: args.access.insecure,
        ca_certs: args.access.certificates()?,
    };
    let client = context.client().await?;
    let image = fetch(&client, &request, context).await?;
    if context.printer.is_json() {
        context.printer.json(&image)?;
    } else {
        let name = image.references.first().unwrap_or(&image.digest);
        context.printer.text(&plain(name))?;
    }
    Ok(ExitStatus::SUCCESS)
}

/// Fetches an image and shows how far it is.
///
/// # Errors
/// As [`run`].
pub async fn fetch(client: &Client, request: &PullRequest, context: &Context) -> Result<ImageSummary, Failure> {
    let bars = context.printer.bars(&format!("pulling {}", request.reference));
    let mut events = client.pull_image(request).await?;
    let mut warnings = Vec::new();
    let image = loop {
        match events.next().await? {
            Some(PullEvent::Resolved { layers, .. }) => {
                for layer in layers {
                    bars.add(&layer.digest, &short_digest(&layer.digest), layer.bytes);
                }
            }
            Some(PullEvent::Layer { digest, bytes }) => bars.position(&digest, bytes),
            Some(PullEvent::LayerDone { digest, known }) => {
                bars.done(&digest, if known { "already here" } else { "done" });
            }
            Some(PullEvent::Retry { what, reason, wait_ms }) => {
                bars.say(&format!("{what}: {reason}; trying again in {wait_ms} ms"));
            }
            Some(PullEvent::Warning { message }) => warnings.push(message),
            Some(PullEvent::Done { image, .. }) => break *image,
            Some(PullEvent::Error { error }) => return Err(error.into()),
            None => return Err(ApiError::new(ErrorCode::DaemonUnavailable, "the pull ended without an answer").into()),
        }
    };
    drop(bars);
    for warning in warnings {
        context.printer.warning(&warning);
    }
    Ok(image)
}
