//! `msb cp`: files and directories between this machine and sandboxes, or between two sandboxes, as `docker cp` has it.

use std::ffi::{OsStr, OsString};
use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::SandboxName;
use msb_sdk::{Client, CopyControl, CopyOptions, CopyReport};

use crate::context::Context;
use crate::failure::{ExitStatus, Failure, invalid};
use crate::parse;
use crate::printer::Printer;
use crate::signals::Signals;

/// How often the progress is drawn.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// Bytes of one read of stdin.
const READ_LEN: usize = 64 << 10;

/// Options of `cp`.
#[derive(Debug, Args)]
#[command(
    override_usage = "msb cp [OPTIONS] NAME:PATH PATH|-\n       msb cp [OPTIONS] PATH|- NAME:PATH\n       msb cp [OPTIONS] NAME:PATH NAME:PATH",
    after_help = "A directory is copied with all that is in it; SOURCE/. means its entries. A destination that is a directory is copied into, one that is \
                  not there gets the copy under that name. '-' is a tar stream on stdin or stdout. A path with a colon that is no \
                  sandbox's begins with ./ or /."
)]
pub struct CopyArgs {
    /// Keep owners, set-id bits and all extended attributes
    #[arg(short, long)]
    pub archive: bool,
    /// Follow a symbolic link that is the source itself
    #[arg(short = 'L', long)]
    pub follow_link: bool,
    /// From where: PATH, NAME:PATH, or - for a tar stream on stdin
    #[arg(value_name = "SOURCE")]
    pub source: OsString,
    /// To where: PATH, NAME:PATH, or - for a tar stream on stdout
    #[arg(value_name = "DESTINATION")]
    pub destination: OsString,
}

/// One end of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Stream,
    Host(PathBuf),
    Sandbox(SandboxName, String),
}

impl Place {
    fn parse(text: &OsStr) -> Result<Self, Failure> {
        let bytes = text.as_bytes();
        if bytes == b"-" {
            return Ok(Self::Stream);
        }
        let colon = bytes.iter().position(|byte| *byte == b':');
        // As in docker: what begins with a slash or a dot is a path of this machine, colon or not.
        let (Some(colon), false) = (colon, bytes.starts_with(b"/") || bytes.starts_with(b".")) else {
            return if bytes.is_empty() { Err(invalid("a path is empty")) } else { Ok(Self::Host(text.into())) };
        };
        let name = String::from_utf8_lossy(&bytes[..colon]);
        let name = parse::name(&name)?;
        let path = std::str::from_utf8(&bytes[colon + 1..]).map_err(|_| {
            Failure::Api(
                ApiError::new(ErrorCode::InvalidConfig, format!("the path in '{name}' is no UTF-8 text"))
                    .with_hint("copy the directory it is in: names below the path may be any bytes"),
            )
        })?;
        // Relative paths begin at the root.
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        Ok(Self::Sandbox(name, path))
    }
}

/// `cp`.
///
/// # Errors
/// `invalid_config` for places that do not go together; what either side's system says.
pub async fn run(args: CopyArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let source = Place::parse(&args.source)?;
    let destination = Place::parse(&args.destination)?;
    check(&source, &destination)?;
    let options = CopyOptions {
        archive: args.archive,
        follow_link: args.follow_link,
        user: None,
        control: CopyControl::default(),
    };
    let mut signals = Signals::take();
    let work = async {
        let client = context.client().await?;
        copy(&client, &source, &destination, &options, &context.printer).await
    };
    tokio::pin!(work);
    let report = tokio::select! {
        report = &mut work => report?,
        number = signals.ending() => {
            options.control.cancel();
            // It ends by itself when nothing unfinished is left; a second signal does not wait for that.
            tokio::select! {
                _ = &mut work => {}
                _ = signals.ending() => {}
            }
            context.printer.note("the copy was given up");
            return Err(Failure::Silent(ExitStatus::of_signal(number)));
        }
    };
    for warning in &report.warnings {
        context.printer.warning(warning);
    }
    if context.printer.is_json() && destination != Place::Stream {
        context.printer.json(&report)?;
    } else {
        let to = Path::new(&args.destination).display();
        context.printer.terminal_note(&format!("copied {} to {to}", indicatif::HumanBytes(report.bytes)));
    }
    Ok(ExitStatus::SUCCESS)
}

/// Refuses what is no copy of ours, before anything is asked of the service.
fn check(source: &Place, destination: &Place) -> Result<(), Failure> {
    match (source, destination) {
        (Place::Sandbox(..), Place::Stream) if std::io::stdout().is_terminal() => {
            let error = ApiError::new(ErrorCode::InvalidConfig, "an archive is not written to a terminal");
            Err(error.with_hint("pipe it on: msb cp NAME:PATH - | tar -tv").into())
        }
        (Place::Stream, Place::Sandbox(..)) if std::io::stdin().is_terminal() => {
            let error = ApiError::new(ErrorCode::InvalidConfig, "an archive is not read from a terminal");
            Err(error.with_hint("pipe it in: tar -c DIRECTORY | msb cp - NAME:PATH").into())
        }
        (Place::Sandbox(..), _) | (_, Place::Sandbox(..)) => Ok(()),
        (Place::Host(_) | Place::Stream, Place::Host(_) | Place::Stream) => {
            let error = ApiError::new(ErrorCode::InvalidConfig, "neither source nor destination is in a sandbox");
            Err(error.with_hint("write a sandbox's path as NAME:PATH").into())
        }
    }
}

async fn copy(
    client: &Client,
    source: &Place,
    destination: &Place,
    options: &CopyOptions,
    printer: &Printer,
) -> Result<CopyReport, Failure> {
    let moving = async {
        match (source, destination) {
            (Place::Host(from), Place::Sandbox(name, to)) => Ok(client.copy_into(from, name, to, options).await?),
            (Place::Sandbox(name, from), Place::Host(to)) => Ok(client.copy_out(name, from, to, options).await?),
            (Place::Sandbox(name, from), Place::Sandbox(other, to)) => {
                Ok(client.copy_between((name, from), (other, to), options).await?)
            }
            (Place::Stream, Place::Sandbox(name, to)) => Ok(client.unpack(name, to, stdin(), options).await?),
            (Place::Sandbox(name, from), _) => send(client, name, from, options, printer).await,
            _ => Err(invalid("neither source nor destination is in a sandbox")),
        }
    };
    // Standard output may be the same terminal's pipe; the bar is on stderr and only there on a terminal.
    let bar = printer.bytes_bar("copying", None);
    let draw = async {
        loop {
            tokio::time::sleep(PROGRESS_INTERVAL).await;
            bar.position(options.control.bytes());
        }
    };
    tokio::select! {
        report = moving => report,
        () = draw => Err(invalid("the progress ended before the copy")),
    }
}

/// Writes a sandbox's tree to stdout.
async fn send(
    client: &Client,
    name: &SandboxName,
    path: &str,
    options: &CopyOptions,
    printer: &Printer,
) -> Result<CopyReport, Failure> {
    let mut stream = client.pack(name, path, options).await?;
    while let Some(piece) = stream.next().await? {
        printer.bytes(&piece)?;
    }
    Ok(CopyReport { bytes: options.control.bytes(), warnings: stream.warnings() })
}

/// Standard input in pieces.
fn stdin() -> impl futures_util::Stream<Item = std::io::Result<bytes::Bytes>> + Send + 'static {
    use tokio::io::AsyncReadExt;
    futures_util::stream::unfold(tokio::io::stdin(), |mut input| async move {
        let mut piece = vec![0; READ_LEN];
        match input.read(&mut piece).await {
            Ok(0) => None,
            Ok(len) => {
                piece.truncate(len);
                Some((Ok(bytes::Bytes::from(piece)), input))
            }
            Err(error) => Some((Err(error), input)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart_as_in_docker() {
        let sandbox = |name: &str, path: &str| Some(Place::Sandbox(parse::name(name).unwrap(), path.into()));
        let host = |path: &str| Some(Place::Host(path.into()));
        for (text, wanted) in [
            ("-", Some(Place::Stream)),
            ("a/b", host("a/b")),
            ("./a:b", host("./a:b")),
            ("/a:b", host("/a:b")),
            ("../a:b", host("../a:b")),
            ("box:/etc/hosts", sandbox("box", "/etc/hosts")),
            ("box:etc/a:b", sandbox("box", "/etc/a:b")),
            ("box:", sandbox("box", "/")),
            ("b x:/etc", None),
            (":/etc", None),
            ("", None),
        ] {
            assert_eq!(Place::parse(OsStr::new(text)).ok(), wanted, "{text:?}");
        }
        assert!(Place::parse(OsStr::from_bytes(b"box:/\xff")).is_err());
        assert_eq!(Place::parse(OsStr::from_bytes(b"\xff")).ok(), Some(Place::Host(OsStr::from_bytes(b"\xff").into())));
    }

    #[test]
    fn one_end_must_be_in_a_sandbox() {
        let host = Place::Host("a".into());
        assert!(check(&host, &host).is_err());
        assert!(check(&Place::Stream, &host).is_err());
        assert!(check(&host, &Place::Stream).is_err());
        assert!(check(&host, &Place::parse(OsStr::new("box:/")).unwrap()).is_ok());
    }
}
