//! `xtask-reference`: writes the documents that are generated from the product's own tables and types, or with `--check` says which
//! are out of date. Called by `cargo xtask docs`, and by `cargo xtask install` for man pages and completions.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command line tool for developers; it talks on its streams"
)]

mod errors;
mod tables;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use clap_complete::Shell;

#[derive(Parser)]
#[command(name = "xtask-reference")]
struct Arguments {
    /// Compare only; fails when a file is out of date
    #[arg(long)]
    check: bool,
    /// Write man pages and shell completions under this prefix instead
    #[arg(long, value_name = "PREFIX")]
    manuals: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.manuals {
        Some(prefix) => manuals(prefix),
        None => write_or_compare(arguments.check),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn write_or_compare(check: bool) -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let files = tables::files()?;
    let mut stale = Vec::new();
    for (name, text) in &files {
        let path = folder.join(name);
        if std::fs::read(&path).is_ok_and(|present| present == text.as_bytes()) {
            continue;
        }
        stale.push(name.as_str());
        if !check {
            std::fs::create_dir_all(path.parent().context("a file has a folder")?)?;
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    if check && !stale.is_empty() {
        bail!("out of date, `cargo xtask docs` writes them anew: {}", stale.join(", "));
    }
    let changed = if stale.is_empty() { "all up to date".to_owned() } else { format!("written: {}", stale.join(", ")) };
    println!("docs: {} generated files, {changed}", files.len());
    Ok(())
}

/// Where each shell looks for completions below a prefix.
const COMPLETIONS: &[(Shell, &str, &str)] = &[
    (Shell::Bash, "share/bash-completion/completions", "msb"),
    (Shell::Zsh, "share/zsh/site-functions", "_msb"),
    (Shell::Fish, "share/fish/vendor_completions.d", "msb.fish"),
];

fn manuals(prefix: &Path) -> Result<()> {
    let pages = prefix.join("share/man/man1");
    std::fs::create_dir_all(&pages)?;
    clap_mangen::generate_to(msb_cli::command(), &pages)?;
    for (shell, folder, name) in COMPLETIONS {
        let folder = prefix.join(folder);
        std::fs::create_dir_all(&folder)?;
        let mut script = Vec::new();
        clap_complete::generate(*shell, &mut msb_cli::command(), "msb", &mut script);
        std::fs::write(folder.join(name), script)?;
    }
    Ok(())
}
