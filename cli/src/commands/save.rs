//! `msb image save`, `msb save`: images as one archive, to a file or a pipe.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::images::{ArchiveFormat, SaveRequest};

use crate::context::Context;
use crate::failure::{self, ExitStatus, Failure};

/// Options of `image save`.
#[derive(Debug, Args)]
#[command(after_help = "--format docker (the default) or --format oci chooses the layout of the archive.")]
pub struct SaveArgs {
    /// Images
    #[arg(required = true, value_name = "IMAGE")]
    pub references: Vec<String>,
    /// The archive; stdout if there is none
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Layout of the archive, from `--format`.
    #[arg(skip)]
    pub layout: ArchiveFormat,
}

/// `image save`. A file appears under its name only when it is whole.
///
/// # Errors
/// `invalid_config` for a terminal as output, `image_not_found`, and what the file system says.
pub async fn run(args: SaveArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let request = SaveRequest { references: args.references, format: args.layout };
    let path = args.output.filter(|path| path.as_os_str() != "-");
    refuse_terminal(path.as_deref(), "msb save IMAGE | docker load")?;
    let archive = context.client().await?.save_images(&request).await?;
    write(archive, path.as_deref(), "saving", context).await?;
    Ok(ExitStatus::SUCCESS)
}

/// An archive on stdout must not meet a terminal.
pub(super) fn refuse_terminal(path: Option<&Path>, example: &str) -> Result<(), Failure> {
    if path.is_none() && std::io::stdout().is_terminal() {
        let error = ApiError::new(ErrorCode::InvalidConfig, "an archive is not written to a terminal")
            .with_hint(format!("name a file with -o FILE, or pipe it on: {example}"));
        return Err(error.into());
    }
    Ok(())
}

/// Writes an archive to a file, or to stdout.
pub(super) async fn write(
    mut archive: msb_sdk::client::Archive,
    path: Option<&Path>,
    doing: &'static str,
    context: &Context,
) -> Result<(), Failure> {
    let progress = context.printer.bytes_bar(doing, None);
    let mut written = 0;
    let mut file = path.map(Target::create).transpose()?;
    while let Some(piece) = archive.next().await? {
        match &mut file {
            Some(file) => file.write(&piece)?,
            None => context.printer.bytes(&piece)?,
        }
        written += piece.len() as u64;
        progress.position(written);
    }
    file.map_or(Ok(()), Target::finish)
}

/// A file that is there whole or not at all. What is no regular file (a pipe, `/dev/null`) is written to directly.
struct Target {
    path: PathBuf,
    temporary: Option<PathBuf>,
    file: std::fs::File,
}

impl Target {
    fn create(path: &Path) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| failure::file(path, &error);
        let special = std::fs::metadata(path).is_ok_and(|file| !file.is_file());
        if special {
            let file = std::fs::OpenOptions::new().write(true).open(path).map_err(failed)?;
            return Ok(Self { path: path.to_owned(), temporary: None, file });
        }
        let name = path.file_name().ok_or_else(|| failed(std::io::ErrorKind::IsADirectory.into()))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}", std::process::id()));
        let temporary = path.with_file_name(hidden);
        let file = std::fs::OpenOptions::new().write(true).create_new(true).open(&temporary).map_err(failed)?;
        Ok(Self { path: path.to_owned(), temporary: Some(temporary), file })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.file.write_all(bytes).map_err(|error| failure::file(&self.path, &error))
    }

    fn finish(mut self) -> Result<(), Failure> {
        let Some(temporary) = self.temporary.take() else { return Ok(()) };
        std::fs::rename(&temporary, &self.path).map_err(|error| {
            // The name is still there to be removed.
            self.temporary = Some(temporary);
            failure::file(&self.path, &error)
        })
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // What is left of a save that failed; there is nobody to tell if it cannot be removed.
            let _ = std::fs::remove_file(temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_there_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        let mut target = Target::create(&path).unwrap();
        target.write(b"half").unwrap();
        drop(target);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let mut target = Target::create(&path).unwrap();
        target.write(b"whole").unwrap();
        target.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        Target::create(Path::new("/dev/null")).unwrap().finish().unwrap();
        assert!(Target::create(&dir.path().join("no/a.tar")).is_err());
    }
}
