//! The terminal of this process: its size, and raw mode that is given back on every way out.

use std::io::{BufRead, IsTerminal, Write};

use msb_protocol::control::TerminalSize;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::failure::{Failure, invalid};

/// Whether stdin is a terminal.
#[must_use]
pub fn stdin_is_terminal() -> bool {
    std::io::stdin().is_terminal()
}

/// The size of the terminal, if there is one. Absurd sizes become the usual one, because programs divide by them.
#[must_use]
pub fn size() -> Option<TerminalSize> {
    let size = tcgetwinsize(std::io::stdout()).or_else(|_| tcgetwinsize(std::io::stdin())).ok()?;
    Some(if size.ws_row == 0 || size.ws_col == 0 {
        TerminalSize { rows: 24, columns: 80 }
    } else {
        TerminalSize { rows: size.ws_row, columns: size.ws_col }
    })
}

/// Asks for a line.
///
/// # Errors
/// `invalid_config` if nobody can be asked.
pub fn ask(prompt: &str) -> Result<String, Failure> {
    if !stdin_is_terminal() {
        return Err(invalid("nobody can be asked here; use --username and --password-stdin"));
    }
    // Nobody can be told that stderr is gone.
    let _ = std::io::stderr().write_all(prompt.as_bytes());
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).map_err(Failure::Output)?;
    Ok(line.trim_end_matches(['\n', '\r']).to_owned())
}

/// Asks a question that is answered with yes or no; no is what silence means.
///
/// # Errors
/// As [`ask`].
pub fn agreed(question: &str) -> Result<bool, Failure> {
    Ok(matches!(ask(&format!("{question} [y/N] "))?.trim(), "y" | "Y" | "yes" | "Yes"))
}

/// Asks for a line that is not shown.
///
/// # Errors
/// As [`ask`].
pub fn ask_secret(prompt: &str) -> Result<String, Failure> {
    let refuse = |error: rustix::io::Errno| invalid(format!("the terminal cannot be used: {error}"));
    if !stdin_is_terminal() {
        return ask(prompt);
    }
    let before = tcgetattr(std::io::stdin()).map_err(refuse)?;
    let mut silent = before.clone();
    silent.local_modes.remove(LocalModes::ECHO);
    tcsetattr(std::io::stdin(), OptionalActions::Now, &silent).map_err(refuse)?;
    // Restores on every way out.
    let _terminal = RawTerminal { before };
    let line = ask(prompt);
    let _ = std::io::stderr().write_all(b"\n");
    line
}

/// A terminal in raw mode. Dropping it restores what was before; `msb` ends only by returning, so it is always dropped.
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Puts the terminal on stdin into raw mode.
    ///
    /// # Errors
    /// `invalid_config` if stdin is no terminal.
    pub fn enter() -> Result<Self, Failure> {
        let refuse = |error: rustix::io::Errno| invalid(format!("the terminal cannot be used: {error}"));
        let before = tcgetattr(std::io::stdin()).map_err(refuse)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw).map_err(refuse)?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Drains output first, so that the last lines of the workload are written in the mode they were meant for.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.before);
    }
}
