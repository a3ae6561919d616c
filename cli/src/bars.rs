//! Several progress bars at once, on a terminal only. Made by the printer; gone when dropped.
//!
//! No more bars than the terminal has lines for: where there are more, one that is done makes room for the next. No line is wider than
//! the terminal, or what is drawn over would stay.

use std::cell::RefCell;
use std::collections::HashMap;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use rustix::termios::tcgetwinsize;

use crate::printer::plain;

/// Bars where nobody tells how many lines there are.
const BARS_DEFAULT: usize = 22;
/// A bar that runs; what is left of the line is the bar's.
const RUNNING: &str = "  {prefix} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec}";
/// A bar that has ended.
const ENDED: &str = "  {prefix} [{wide_bar}] {total_bytes} {msg}";

/// A headline and bars under it.
pub struct Bars {
    all: MultiProgress,
    head: ProgressBar,
    text: String,
    /// Bars that fit.
    room: usize,
    parts: RefCell<Parts>,
}

/// What there are bars for.
#[derive(Default)]
struct Parts {
    shown: HashMap<String, ProgressBar>,
    /// Those without a bar so far, by key: label and size.
    waiting: HashMap<String, (String, u64)>,
    count: usize,
    done: usize,
    /// Something else than the text stands in the headline.
    is_said: bool,
}

impl Bars {
    pub(crate) fn new(text: &str, shown: bool) -> Self {
        let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let all = MultiProgress::with_draw_target(target);
        let head = all.add(ProgressBar::new_spinner());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}") {
            head.set_style(style);
        }
        let text = plain(text);
        head.set_message(text.clone());
        if shown {
            head.enable_steady_tick(Duration::from_millis(100));
        }
        // The headline, and the line where the cursor rests.
        let lines = tcgetwinsize(std::io::stderr()).map(|size| usize::from(size.ws_row)).unwrap_or_default();
        let room = lines.checked_sub(2).filter(|room| *room > 0).unwrap_or(BARS_DEFAULT);
        Self { all, head, text, room, parts: RefCell::default() }
    }

    /// A bar for `total` bytes, as soon as there is room for it.
    pub fn add(&self, key: &str, label: &str, total: u64) {
        let parts = &mut *self.parts.borrow_mut();
        if parts.shown.contains_key(key) || parts.waiting.contains_key(key) {
            return;
        }
        parts.count += 1;
        parts.waiting.insert(key.to_owned(), (plain(label), total));
        if parts.shown.len() < self.room {
            self.show(parts, key);
        }
        self.headline(parts);
    }

    /// Sets how far one is.
    pub fn position(&self, key: &str, bytes: u64) {
        let parts = &mut *self.parts.borrow_mut();
        if parts.waiting.contains_key(key) {
            self.make_room(parts);
            self.show(parts, key);
        }
        if let Some(bar) = parts.shown.get(key) {
            if bar.position() == 0 {
                // The time for which it waited for its turn is none of its rate.
                bar.reset_eta();
            }
            bar.set_position(bytes);
        }
        if parts.is_said {
            self.headline(parts);
        }
    }

    /// One is done.
    pub fn done(&self, key: &str, text: &str) {
        let parts = &mut *self.parts.borrow_mut();
        parts.done += usize::from(parts.waiting.remove(key).is_some());
        if let Some(bar) = parts.shown.get(key).filter(|bar| !bar.is_finished()) {
            parts.done += 1;
            if let Ok(style) = ProgressStyle::with_template(ENDED) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_position(bar.length().unwrap_or_default());
            bar.abandon_with_message(plain(text));
        }
        self.headline(parts);
    }

    /// Changes the headline until something goes on.
    pub fn say(&self, text: &str) {
        self.parts.borrow_mut().is_said = true;
        self.head.set_message(plain(text));
    }

    fn headline(&self, parts: &mut Parts) {
        parts.is_said = false;
        let text = if parts.count > 1 {
            format!("{}  {} of {}", self.text, parts.done, parts.count)
        } else {
            self.text.clone()
        };
        self.head.set_message(text);
    }

    /// Gives one of those that wait its bar.
    fn show(&self, parts: &mut Parts, key: &str) {
        let Some((label, total)) = parts.waiting.remove(key) else { return };
        let bar = self.all.add(ProgressBar::new(total));
        if let Ok(style) = ProgressStyle::with_template(RUNNING) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(label);
        // A bar that is not drawn before its first byte would come and push the others down.
        bar.tick();
        parts.shown.insert(key.to_owned(), bar);
    }

    /// Takes the bar of one that is done away, else of one that has not begun.
    fn make_room(&self, parts: &mut Parts) {
        if parts.shown.len() < self.room {
            return;
        }
        let by = |is: fn(&ProgressBar) -> bool| parts.shown.iter().find(|(_, bar)| is(bar)).map(|(key, _)| key.clone());
        let Some(key) = by(ProgressBar::is_finished).or_else(|| by(|bar| bar.position() == 0)) else { return };
        let Some(bar) = parts.shown.remove(&key) else { return };
        if !bar.is_finished() {
            parts.waiting.insert(key, (bar.prefix(), bar.length().unwrap_or_default()));
        }
        bar.finish_and_clear();
        self.all.remove(&bar);
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        // Nothing is lost if the terminal is gone.
        let _ = self.all.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_no_more_bars_than_lines_and_those_that_run_are_shown() {
        let mut bars = Bars::new("pulling", false);
        bars.room = 3;
        let keys: Vec<String> = (0..10).map(|number| number.to_string()).collect();
        for key in &keys {
            bars.add(key, "layer", 100);
        }
        for key in &keys {
            bars.position(key, 50);
            let parts = bars.parts.borrow();
            assert!(parts.shown.len() <= 3 && parts.shown.contains_key(key), "{key}");
            drop(parts);
            bars.done(key, "done");
        }
        let parts = bars.parts.borrow();
        assert_eq!((parts.done, parts.count, parts.waiting.len()), (10, 10, 0));
        assert_eq!(bars.head.message(), "pulling  10 of 10");
    }

    #[test]
    fn a_headline_that_tells_of_a_failure_goes_when_something_goes_on() {
        let bars = Bars::new("pulling", false);
        bars.add("a", "a", 10);
        bars.say("cut");
        assert_eq!(bars.head.message(), "cut");
        bars.position("a", 1);
        assert_eq!(bars.head.message(), "pulling");
    }
}
