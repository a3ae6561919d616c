//! Everything `msb` writes goes through here: data to stdout, everything else to stderr.
//!
//! Text from images, guests and labels is hostile to a terminal, so control characters are shown, not sent, in all but a
//! workload's own output.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressStyle};
use msb_protocol::error::ApiError;
use msb_protocol::id::SandboxName;
use serde::Serialize;

use crate::arguments::Format;
use crate::bars::Bars;
use crate::failure::Failure;
use crate::table::Table;

const ERROR: Style = AnsiColor::Red.on_default().bold();
const WARNING: Style = AnsiColor::Yellow.on_default().bold();
const HINT: Style = AnsiColor::Cyan.on_default();

/// Writes for one command.
#[derive(Clone, Debug)]
pub struct Printer {
    format: Format,
    quiet: bool,
    progress: bool,
}

impl Printer {
    /// A printer of this form; quiet ones write data and errors only.
    #[must_use]
    pub fn new(format: Format, quiet: bool) -> Self {
        Self { format, quiet, progress: !quiet && std::io::stderr().is_terminal() }
    }

    /// Whether data is JSON.
    #[must_use]
    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Whether only data and errors are wanted.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Writes text as data; a final newline is added if there is none.
    ///
    /// # Errors
    /// [`Failure::BrokenPipe`] and [`Failure::Output`].
    pub fn text(&self, text: &str) -> Result<(), Failure> {
        let mut out = anstream::AutoStream::auto(std::io::stdout().lock());
        let end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
        write_failure(
            out.write_all(text.as_bytes()).and_then(|()| out.write_all(end.as_bytes())).and_then(|()| out.flush()),
        )
    }

    /// Writes bytes as data, untouched.
    ///
    /// # Errors
    /// As [`Printer::text`].
    pub fn bytes(&self, bytes: &[u8]) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        write_failure(out.write_all(bytes).and_then(|()| out.flush()))
    }

    /// Writes bytes of somebody's standard error to ours.
    ///
    /// # Errors
    /// As [`Printer::text`].
    pub fn error_bytes(&self, bytes: &[u8]) -> Result<(), Failure> {
        write_failure(std::io::stderr().lock().write_all(bytes))
    }

    /// Writes a value as JSON: indented for one document, one line where a stream of them follows.
    ///
    /// # Errors
    /// As [`Printer::text`].
    pub fn json<T: Serialize + ?Sized>(&self, value: &T) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(value).map_err(|error| Failure::Api(ApiError::internal(error)))?;
        self.bytes(format!("{text}\n").as_bytes())
    }

    /// Writes a value as one line of JSON.
    ///
    /// # Errors
    /// As [`Printer::text`].
    pub fn json_line<T: Serialize + ?Sized>(&self, value: &T) -> Result<(), Failure> {
        let text = serde_json::to_string(value).map_err(|error| Failure::Api(ApiError::internal(error)))?;
        self.bytes(format!("{text}\n").as_bytes())
    }

    /// Writes a table.
    ///
    /// # Errors
    /// As [`Printer::text`].
    pub fn table(&self, table: &Table) -> Result<(), Failure> {
        self.text(&table.render())
    }

    /// Writes a list in the form that was asked for: JSON, names alone, or a table with a row for each.
    ///
    /// # Errors
    /// As [`Printer::text`].
    pub fn list<T: Serialize>(
        &self,
        items: &[T],
        name: impl Fn(&T) -> &SandboxName,
        header: &[&'static str],
        row: impl Fn(&T) -> Vec<String>,
    ) -> Result<(), Failure> {
        if self.is_json() {
            return self.json(items);
        }
        if self.is_quiet() {
            return self.text(&items.iter().map(|item| format!("{}\n", name(item))).collect::<String>());
        }
        let mut table = Table::new(header);
        for item in items {
            table.row(row(item));
        }
        self.table(&table)
    }

    /// Writes a table in place of the one before: on a terminal from its top, elsewhere after an empty line.
    ///
    /// # Errors
    /// As [`Printer::text`].
    pub fn redraw(&self, table: &Table) -> Result<(), Failure> {
        // Home, then each line with the rest of it erased, then the rest of the screen.
        let text = if std::io::stdout().is_terminal() {
            format!("\x1b[H{}\x1b[J", table.render().replace('\n', "\x1b[K\n"))
        } else {
            format!("{}\n", table.render())
        };
        self.bytes(text.as_bytes())
    }

    /// Says something that is no data; silent when quiet and where programs read.
    pub fn note(&self, text: &str) {
        if !self.quiet && !self.is_json() {
            self.stderr(&format!("{}\n", plain(text)));
        }
    }

    /// Says something that only a person at a terminal wants to know.
    pub fn terminal_note(&self, text: &str) {
        if self.progress {
            self.note(text);
        }
    }

    /// Warns; silent when quiet, and in JSON a line `{"warning": …}`.
    pub fn warning(&self, text: &str) {
        if self.quiet {
            return;
        }
        if self.is_json() {
            self.stderr(&format!("{}\n", serde_json::json!({ "warning": text })));
        } else {
            self.stderr(&format!("{WARNING}warning:{WARNING:#} {}\n", plain(text)));
        }
    }

    /// Tells an error: message, details, hint; one line of JSON if that is the form.
    pub fn error(&self, error: &ApiError) {
        if self.is_json() {
            let line = serde_json::to_string(error).unwrap_or_else(|_| format!("{{\"code\":\"{}\"}}", error.code));
            self.stderr(&format!("{line}\n"));
            return;
        }
        let mut text = format!("{ERROR}error:{ERROR:#} {}\n", plain(&error.message));
        for detail in &error.details {
            for line in detail.lines() {
                text.push_str(&format!("  {}\n", plain(line)));
            }
        }
        if !error.hint.is_empty() {
            text.push_str(&format!("{HINT}hint:{HINT:#} {}\n", plain(&error.hint)));
        }
        self.stderr(&text);
    }

    /// Writes prepared text to stderr.
    pub fn raw_error(&self, text: &str) {
        self.stderr(text);
    }

    /// A turning sign for a wait, on a terminal only. It is gone when dropped.
    #[must_use]
    pub fn spinner(&self, text: &str) -> Progress {
        let bar = if self.progress { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.set_message(plain(text));
        if self.progress {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Progress(bar)
    }

    /// A bar for bytes of which the sum may be known, on a terminal only. It is gone when dropped.
    #[must_use]
    pub fn bytes_bar(&self, text: &str, sum: Option<u64>) -> Progress {
        let bar = match (self.progress, sum) {
            (false, _) => ProgressBar::hidden(),
            (true, Some(sum)) => ProgressBar::new(sum),
            (true, None) => ProgressBar::new_spinner(),
        };
        let template = if sum.is_some() {
            "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}"
        } else {
            "{spinner} {msg} {bytes} {bytes_per_sec}"
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(plain(text));
        Progress(bar)
    }

    /// A headline with a bar for each of several things, on a terminal only. They are gone when dropped.
    #[must_use]
    pub fn bars(&self, text: &str) -> Bars {
        Bars::new(text, self.progress)
    }

    fn stderr(&self, text: &str) {
        // Nobody can be told that stderr is gone.
        let _ = anstream::AutoStream::auto(std::io::stderr().lock()).write_all(text.as_bytes());
    }
}

/// Something on the terminal that shows a wait; clears itself when dropped.
pub struct Progress(ProgressBar);

impl Progress {
    /// Changes the text.
    pub fn say(&self, text: &str) {
        self.0.set_message(plain(text));
    }

    /// Sets how much is done.
    pub fn position(&self, done: u64) {
        self.0.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// What a failed write to stdout means.
///
/// # Errors
/// [`Failure::BrokenPipe`] and [`Failure::Output`].
pub fn write_failure(result: std::io::Result<()>) -> Result<(), Failure> {
    result.map_err(|error| match error.kind() {
        std::io::ErrorKind::BrokenPipe => Failure::BrokenPipe,
        _ => Failure::Output(error),
    })
}

/// Text that a terminal shows and does not obey: control characters but newline and tab are written as escapes.
#[must_use]
pub fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // The bidirectional controls reorder what a person reads ("Trojan source", CVE-2021-42574).
        let reorders = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if (c.is_control() && c != '\n' && c != '\t') || reorders {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_not_sent() {
        assert_eq!(plain("a\u{1b}[2Jb\u{7}"), "a\\u{1b}[2Jb\\u{7}");
        assert_eq!(plain("ä 日本\n\tok"), "ä 日本\n\tok");
        assert_eq!(plain("x\u{202e}y\u{9b}z\r"), "x\\u{202e}y\\u{9b}z\\r");
    }

    proptest::proptest! {
        #[test]
        fn nothing_a_terminal_obeys_gets_through(text in proptest::prelude::any::<String>()) {
            proptest::prop_assert!(!plain(&text).chars().any(|c| c.is_control() && c != '\n' && c != '\t'));
        }
    }

    #[test]
    fn a_closed_pipe_is_told_apart_from_a_full_disk() {
        let failure = |kind: std::io::ErrorKind| write_failure(Err(kind.into())).unwrap_err();
        assert!(matches!(failure(std::io::ErrorKind::BrokenPipe), Failure::BrokenPipe));
        assert!(matches!(failure(std::io::ErrorKind::StorageFull), Failure::Output(_)));
    }
}
