//! Several progress bars at once, on a terminal only. Made by the printer; gone when dropped.

use std::cell::RefCell;
use std::collections::HashMap;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::printer::plain;

/// Bars shown at a time; what is beyond them counts in the headline only.
const BARS_MAX: usize = 24;

/// A headline and bars under it.
pub struct Bars {
    all: MultiProgress,
    head: ProgressBar,
    bars: RefCell<HashMap<String, ProgressBar>>,
}

impl Bars {
    pub(crate) fn new(text: &str, shown: bool) -> Self {
        let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let all = MultiProgress::with_draw_target(target);
        let head = all.add(ProgressBar::new_spinner());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            head.set_style(style);
        }
        head.set_message(plain(text));
        if shown {
            head.enable_steady_tick(Duration::from_millis(100));
        }
        Self { all, head, bars: RefCell::default() }
    }

    /// A bar for `total` bytes.
    pub fn add(&self, key: &str, label: &str, total: u64) {
        let mut bars = self.bars.borrow_mut();
        if bars.contains_key(key) || bars.len() >= BARS_MAX {
            return;
        }
        let bar = self.all.add(ProgressBar::new(total));
        let template = "  {prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(plain(label));
        bars.insert(key.to_owned(), bar);
    }

    /// Sets how far one is.
    pub fn position(&self, key: &str, bytes: u64) {
        if let Some(bar) = self.bars.borrow().get(key) {
            bar.set_position(bytes);
        }
    }

    /// One is done.
    pub fn done(&self, key: &str, text: &str) {
        if let Some(bar) = self.bars.borrow().get(key) {
            bar.set_position(bar.length().unwrap_or_default());
            bar.abandon_with_message(plain(text));
        }
    }

    /// Changes the headline.
    pub fn say(&self, text: &str) {
        self.head.set_message(plain(text));
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        // Nothing is lost if the terminal is gone.
        let _ = self.all.clear();
    }
}
