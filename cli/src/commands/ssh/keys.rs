//! `msb ssh authorize` and `msb ssh keys`: who may log in to the sandboxes of this home.

use std::io::Read;
use std::path::PathBuf;

use clap::Args;
use msb_protocol::control::AuthorizedKey;

use crate::context::Context;
use crate::failure::{self, ExitStatus, Failure, invalid};
use crate::table::Table;
use crate::terminal;

/// Most bytes of keys that are read.
const KEYS_LEN_MAX: u64 = 1 << 20;

/// Options of `ssh authorize`.
#[derive(Debug, Args)]
pub struct AuthorizeArgs {
    /// Read the public keys from a file, as ssh-keygen writes them (.pub)
    #[arg(short, long, value_name = "FILE", conflicts_with = "key")]
    pub file: Option<PathBuf>,
    /// A public key; without --file and --key they are read from stdin
    #[arg(short, long, value_name = "KEY")]
    pub key: Option<String>,
}

/// Carries `ssh authorize` out.
///
/// # Errors
/// `path_not_found`, `invalid_config` naming the line.
pub(super) async fn authorize(args: AuthorizeArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let text = match (args.file, args.key) {
        (Some(path), _) => {
            let file = std::fs::File::open(&path).map_err(|error| failure::file(&path, &error))?;
            read(file).map_err(|error| failure::file(&path, &error))?
        }
        (None, Some(key)) => key,
        (None, None) if terminal::stdin_is_terminal() => {
            return Err(invalid("give a key: --file FILE, --key KEY, or one on stdin"));
        }
        (None, None) => read(std::io::stdin()).map_err(|error| invalid(format!("stdin cannot be read: {error}")))?,
    };
    if text.len() as u64 > KEYS_LEN_MAX {
        return Err(invalid(format!("more than {KEYS_LEN_MAX} bytes of keys")));
    }
    if text.contains("PRIVATE KEY") {
        return Err(invalid("this is a private key; give its public half, the file that ends in .pub"));
    }
    let authorized = context.client().await?.authorize(&text).await?;
    if context.printer.is_json() {
        context.printer.json(&authorized)?;
        return Ok(ExitStatus::SUCCESS);
    }
    for key in &authorized.added {
        context.printer.text(&format!("{}\n", key.fingerprint))?;
    }
    if authorized.added.is_empty() {
        context.printer.note("already authorized");
    }
    Ok(ExitStatus::SUCCESS)
}

fn read(from: impl Read) -> std::io::Result<String> {
    let mut text = String::new();
    from.take(KEYS_LEN_MAX + 1).read_to_string(&mut text)?;
    Ok(text)
}

/// Carries `ssh keys` out.
///
/// # Errors
/// `invalid_config` naming the line of the file.
pub(super) async fn list(context: &Context) -> Result<ExitStatus, Failure> {
    let keys: Vec<AuthorizedKey> = context.client().await?.authorized_keys().await?.keys;
    if context.printer.is_json() {
        context.printer.json(&keys)?;
        return Ok(ExitStatus::SUCCESS);
    }
    if keys.is_empty() {
        context.printer.note("no key may log in; add one with `msb ssh authorize`");
        return Ok(ExitStatus::SUCCESS);
    }
    let mut table = Table::new(&["FINGERPRINT", "ALGORITHM", "COMMENT"]);
    for key in keys {
        table.row(vec![key.fingerprint, key.algorithm, key.comment]);
    }
    context.printer.table(&table)?;
    Ok(ExitStatus::SUCCESS)
}
