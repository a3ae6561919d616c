//! `msb`, the command line: arguments in, calls of the SDK, text and exit codes out.
//!
//! | module | holds |
//! |---|---|
//! | [`arguments`] | the command tree as clap types: the source of help, completions, man pages and the reference |
//! | [`groups`] | which command is in which group of `msb --help` |
//! | [`commands`] | one module for each command |
//! | [`creation`], [`care`] | the options that `run` and `create` share |
//! | [`mounts`] | the options among them for mounts and patches of the root |
//! | [`root`] | IMAGE where it is a directory or disk of the host |
//! | [`mcp`] | the tools that agents get |
//! | [`env_file`], [`parse`] | docker's environment files; small values |
//! | [`attached`], [`detach_keys`], [`terminal`] | a running command joined to this process's streams, signals and terminal |
//! | [`printer`], [`table`], [`bars`], [`time`] | everything that is written |
//! | [`failure`] | errors and exit codes |
//!
//! Its only way to sandboxes and images is `msb_sdk`. It links no code of the daemon, writes data to stdout and everything else to
//! stderr, and never exits but by returning from [`main`], so that a terminal is always restored.

#![forbid(unsafe_code)]

pub mod arguments;
pub mod attached;
pub mod bars;
pub mod care;
pub mod commands;
pub mod context;
pub mod creation;
pub mod detach_keys;
pub mod env_file;
pub mod failure;
pub mod groups;
pub mod mcp;
pub mod mounts;
pub mod network_options;
pub mod parse;
pub mod printer;
pub mod root;
mod shortcut;
pub mod signals;
pub mod table;
pub mod terminal;
pub mod time;
pub mod top;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};
use msb_protocol::error::{ApiError, ErrorCode};

use crate::arguments::{Cli, Command, Format};
use crate::commands::image::ImageCommand;
use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::printer::Printer;

/// The whole command tree, with the grouped help. The documentation is written from it.
#[must_use]
pub fn command() -> clap::Command {
    groups::apply(Cli::command())
}

/// What the program does; its exit code is its caller's only to return.
#[must_use]
pub fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let short = shortcut::command(&words).and_then(|command| command.try_get_matches_from(&words).ok());
    let matches = short.map_or_else(|| command().try_get_matches_from(&words), Ok);
    let status = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => run(cli),
        Err(error) => usage(&words, &error),
    };
    ExitCode::from(status.0)
}

fn run(cli: Cli) -> ExitStatus {
    let printer = Printer::new(cli.global.format, cli.global.quiet);
    let Some(mut command) = cli.command else {
        let result = if cli.tree {
            printer.text(&groups::tree(&self::command()))
        } else {
            printer.text(&self::command().render_help().ansi().to_string())
        };
        return result.map_or_else(|failure| failure.report(&printer, false), |()| ExitStatus::SUCCESS);
    };
    let workload = command.is_workload();
    if let Some(layout) = cli.global.format.layout() {
        let (Command::Save(save) | Command::Image { command: ImageCommand::Save(save) }) = &mut command else {
            let error = ApiError::new(ErrorCode::InvalidRequest, "this command's --format is text or json");
            printer.error(&error.with_hint("docker and oci are layouts of `msb save`"));
            return if workload { ExitStatus::OURS } else { ExitStatus::USAGE };
        };
        save.layout = layout;
    }
    // One thread is enough: what blocks (stdin, stdout, files) has threads of its own.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let error = ApiError::internal(format!("cannot start the runtime: {error}"));
            return Failure::Api(error).report(&printer, workload);
        }
    };
    let context = Context::new(printer);
    let result = runtime.block_on(commands::run(command, &context));
    // Does not wait for a thread that may sit in a read of a terminal for ever.
    runtime.shutdown_background();
    result.unwrap_or_else(|failure| failure.report(&context.printer, workload))
}

/// Help and version go to stdout with success. A wrong usage is 2, and 125 where the other codes belong to the workload.
fn usage(words: &[OsString], error: &clap::Error) -> ExitStatus {
    let json = words.windows(2).any(|pair| pair[0] == "--format" && pair[1] == "json")
        || words.iter().any(|word| word == "--format=json");
    let printer = Printer::new(if json { Format::Json } else { Format::Text }, false);
    if !error.use_stderr() {
        return match printer.text(&error.render().ansi().to_string()) {
            Ok(()) => ExitStatus::SUCCESS,
            Err(failure) => failure.report(&printer, false),
        };
    }
    if json {
        let text = error.render().to_string();
        let message = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        printer.error(&ApiError::new(ErrorCode::InvalidRequest, message).with_hint("`msb help` shows what is allowed"));
    } else {
        printer.raw_error(&error.render().ansi().to_string());
    }
    let first = words.iter().skip(1).find(|word| !word.as_encoded_bytes().starts_with(b"-"));
    if first.is_some_and(|word| arguments::WORKLOAD_COMMANDS.iter().any(|name| word == *name)) {
        ExitStatus::OURS
    } else {
        ExitStatus::USAGE
    }
}
