//! What `msb top` shows and what its keys mean: pure, without a terminal, a clock or a service. Snapshots and keys go in, a state
//! that `view` draws and actions that `commands::top` carries out come out.
//!
//! ```text
//!            /                     enter                   l
//!  Filter ◄────► List ────────────────────► Detail ────────────► Logs
//!                  │  k                        │  k              (esc goes back where it came from)
//!                  └────────► Confirm ◄────────┘
//! ```

use std::collections::{BTreeMap, VecDeque};

use msb_protocol::control::{HistoryPoint, MetricsSnapshot, SandboxMetrics};
use msb_protocol::id::{BootId, SandboxId, SandboxName};
use msb_protocol::labels::LabelTerm;

use super::keys::Key;
use crate::commands::metrics::{Sort, memory_used, sort};

/// Moments that are kept of each sandbox for its curves.
pub const CURVE_LEN: usize = 240;
/// Longest filter.
const FILTER_LEN_MAX: usize = 256;
/// Lines of a log that are kept.
const LOG_LINES_MAX: usize = 1_000;

/// Where the screen is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Screen {
    /// All sandboxes.
    List,
    /// One sandbox.
    Detail,
    /// What one sandbox wrote.
    Logs,
}

/// What lies over the screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Over {
    /// Nothing.
    Nothing,
    /// The filter is being typed.
    Filter(String),
    /// A stop waits to be confirmed.
    Confirm(SandboxName),
    /// The keys.
    Help,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    Nothing,
    /// End.
    Quit,
    /// Stop this sandbox.
    Stop(SandboxName),
    /// Read the history of this sandbox.
    History(SandboxName),
    /// Read the log of this sandbox.
    Logs(SandboxName),
}

/// One moment of a sandbox, rates included.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moment {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// vCPU seconds per second.
    pub cpu: f64,
    /// Memory in use in bytes.
    pub memory: u64,
    /// Bytes read and written per second.
    pub disk: (u64, u64),
    /// Bytes received and sent per second.
    pub network: (u64, u64),
}

/// Counters of the moment before.
#[derive(Clone, Copy, Debug)]
struct Counters {
    boot_id: BootId,
    at_ms: u64,
    values: [u64; 4],
}

#[derive(Debug, Default)]
struct Curve {
    moments: VecDeque<Moment>,
    before: Option<Counters>,
}

impl Curve {
    fn push(&mut self, counters: Counters, cpu: f64, memory: u64) {
        let rates = match self.before {
            // Nothing can be said across a boot or without time.
            Some(before) if before.boot_id == counters.boot_id && before.at_ms < counters.at_ms => {
                let elapsed_ms = counters.at_ms - before.at_ms;
                let rate = |at: usize| {
                    let moved = u128::from(counters.values[at].saturating_sub(before.values[at]));
                    u64::try_from(moved * 1_000 / u128::from(elapsed_ms)).unwrap_or(u64::MAX)
                };
                [rate(0), rate(1), rate(2), rate(3)]
            }
            Some(before) if before.boot_id == counters.boot_id => return,
            _ => [0; 4],
        };
        self.before = Some(counters);
        if self.moments.len() == CURVE_LEN {
            self.moments.pop_front();
        }
        let (disk, network) = ((rates[0], rates[1]), (rates[2], rates[3]));
        self.moments.push_back(Moment { at_ms: counters.at_ms, cpu, memory, disk, network });
    }
}

/// The state of the screen.
#[derive(Debug)]
pub struct Model {
    /// The rows that fit the filter, in order.
    pub rows: Vec<SandboxMetrics>,
    /// The host's name.
    pub host: String,
    /// Sandboxes by state, whatever the filter.
    pub states: BTreeMap<String, u64>,
    /// Order of the rows.
    pub sort: Sort,
    /// The filter in force: label terms and a part of the name.
    pub filter: String,
    /// Where the screen is.
    pub screen: Screen,
    /// What lies over it.
    pub over: Over,
    /// The line at the bottom, if there is something to say.
    pub message: Option<String>,
    /// Lines of the log that is shown.
    pub log: Vec<String>,
    /// Lines from the end of the log at which the screen is.
    pub log_back: usize,
    all: Vec<SandboxMetrics>,
    curves: BTreeMap<SandboxId, Curve>,
    /// The row that is chosen, by name: it stays chosen when the order changes.
    selected: Option<SandboxName>,
    log_from: Screen,
}

impl Model {
    /// An empty screen.
    #[must_use]
    pub fn new(sort: Sort) -> Self {
        Self {
            rows: Vec::new(),
            host: String::new(),
            states: BTreeMap::new(),
            sort,
            filter: String::new(),
            screen: Screen::List,
            over: Over::Nothing,
            message: None,
            log: Vec::new(),
            log_back: 0,
            all: Vec::new(),
            curves: BTreeMap::new(),
            selected: None,
            log_from: Screen::List,
        }
    }

    /// Takes what the service says now.
    pub fn take(&mut self, snapshot: MetricsSnapshot) {
        self.host = snapshot.host_name;
        self.states = snapshot.states;
        self.all = snapshot.sandboxes;
        for sandbox in self.all.iter().filter(|sandbox| !sandbox.last) {
            let sample = &sandbox.sample;
            let counters = Counters {
                boot_id: sandbox.boot_id,
                at_ms: sample.at_ns / 1_000_000,
                values: [
                    sample.disk_read_bytes,
                    sample.disk_written_bytes,
                    sample.network_received_bytes,
                    sample.network_sent_bytes,
                ],
            };
            let curve = self.curves.entry(sandbox.id).or_default();
            curve.push(counters, sandbox.cpu_utilization, memory_used(sandbox));
        }
        let present: std::collections::BTreeSet<_> = self.all.iter().map(|sandbox| sandbox.id).collect();
        self.curves.retain(|id, _| present.contains(id));
        self.arrange();
    }

    /// Takes the history of a sandbox, which lies before what was seen here.
    pub fn take_history(&mut self, id: SandboxId, points: &[HistoryPoint]) {
        let Some(curve) = self.curves.get_mut(&id) else { return };
        let mut whole = Curve::default();
        for point in points {
            let counters = Counters {
                boot_id: point.boot_id,
                at_ms: u64::try_from(point.at.as_millisecond()).unwrap_or_default(),
                values: [
                    point.disk_read_bytes,
                    point.disk_written_bytes,
                    point.network_received_bytes,
                    point.network_sent_bytes,
                ],
            };
            let memory = point.guest.map_or(point.memory_resident_bytes, |guest| guest.memory_used_bytes);
            whole.push(counters, point.cpu_utilization, memory);
        }
        let first_ms = curve.moments.front().map_or(u64::MAX, |moment| moment.at_ms);
        whole.moments.retain(|moment| moment.at_ms < first_ms);
        whole.moments.extend(&curve.moments);
        while whole.moments.len() > CURVE_LEN {
            whole.moments.pop_front();
        }
        curve.moments = whole.moments;
    }

    /// Takes the lines of a log.
    pub fn take_log(&mut self, mut lines: Vec<String>) {
        lines.drain(..lines.len().saturating_sub(LOG_LINES_MAX));
        self.log = lines;
    }

    /// The moments of a sandbox, oldest first.
    pub fn moments(&self, id: SandboxId) -> impl DoubleEndedIterator<Item = &Moment> + ExactSizeIterator {
        static NONE: VecDeque<Moment> = VecDeque::new();
        self.curves.get(&id).map_or(&NONE, |curve| &curve.moments).iter()
    }

    /// The place of the chosen row.
    #[must_use]
    pub fn place(&self) -> Option<usize> {
        self.rows.iter().position(|row| Some(&row.name) == self.selected.as_ref())
    }

    /// The chosen sandbox, also one that the filter hides by now.
    #[must_use]
    pub fn chosen(&self) -> Option<&SandboxMetrics> {
        self.all.iter().find(|row| Some(&row.name) == self.selected.as_ref())
    }

    fn arrange(&mut self) {
        let filter = Filter::parse(&self.filter);
        self.rows = self.all.iter().filter(|row| filter.takes(row)).cloned().collect();
        sort(&mut self.rows, self.sort);
        if self.screen == Screen::List && self.place().is_none() {
            self.selected = self.rows.first().map(|row| row.name.clone());
        }
    }

    fn step(&mut self, by: isize) {
        let last = self.rows.len().saturating_sub(1);
        let place = self.place().unwrap_or_default().saturating_add_signed(by).min(last);
        self.selected = self.rows.get(place).map(|row| row.name.clone());
    }

    /// Takes a key.
    pub fn key(&mut self, key: Key) -> Action {
        self.message = None;
        if key == Key::Interrupt {
            return Action::Quit;
        }
        match std::mem::replace(&mut self.over, Over::Nothing) {
            Over::Filter(text) => return self.filter_key(text, key),
            Over::Confirm(name) => {
                return match key {
                    Key::Char('y') | Key::Enter => {
                        self.message = Some(format!("stopping {name}"));
                        Action::Stop(name)
                    }
                    _ => Action::Nothing,
                };
            }
            // Any key takes it away.
            Over::Help => return Action::Nothing,
            Over::Nothing => {}
        }
        let page = 10;
        let screen = self.screen.clone();
        match (key, &screen) {
            (Key::Char('q'), _) => return Action::Quit,
            (Key::Char('?' | 'h'), _) => self.over = Over::Help,
            (Key::Escape, Screen::List) if self.filter.is_empty() => return Action::Quit,
            (Key::Escape, Screen::List) => {
                self.filter.clear();
                self.arrange();
            }
            (Key::Escape | Key::Backspace | Key::Left, Screen::Detail) => self.show(Screen::List),
            (Key::Escape | Key::Backspace | Key::Left, Screen::Logs) => self.show(self.log_from.clone()),
            (Key::Up, Screen::Logs) => self.log_back = (self.log_back + 1).min(self.log.len()),
            (Key::PageUp, Screen::Logs) => self.log_back = (self.log_back + page).min(self.log.len()),
            (Key::Down, Screen::Logs) => self.log_back = self.log_back.saturating_sub(1),
            (Key::PageDown, Screen::Logs) => self.log_back = self.log_back.saturating_sub(page),
            (Key::End, Screen::Logs) => self.log_back = 0,
            (Key::Up, Screen::List) => self.step(-1),
            (Key::Down, Screen::List) => self.step(1),
            (Key::PageUp, Screen::List) => self.step(-10),
            (Key::PageDown, Screen::List) => self.step(10),
            (Key::Home, Screen::List) => self.step(isize::MIN),
            (Key::End, Screen::List) => self.step(isize::MAX),
            (Key::Char('c'), Screen::List) => self.sort_by(Sort::Cpu),
            (Key::Char('m'), Screen::List) => self.sort_by(Sort::Mem),
            (Key::Char('n'), Screen::List) => self.sort_by(Sort::Name),
            (Key::Char('/'), Screen::List) => self.over = Over::Filter(self.filter.clone()),
            (Key::Enter | Key::Right, Screen::List) => {
                if let Some(name) = self.chosen().map(|row| row.name.clone()) {
                    self.show(Screen::Detail);
                    return Action::History(name);
                }
            }
            (Key::Char('k' | 's'), Screen::List | Screen::Detail) => {
                let chosen = self.chosen().map(|row| (row.name.clone(), row.last));
                match chosen {
                    Some((name, false)) => self.over = Over::Confirm(name),
                    Some((name, true)) => self.message = Some(format!("{name} does not run")),
                    None => {}
                }
            }
            (Key::Char('l'), Screen::List | Screen::Detail) => {
                if let Some(name) = self.chosen().map(|row| row.name.clone()) {
                    self.log_from = self.screen.clone();
                    (self.log, self.log_back) = (Vec::new(), 0);
                    self.show(Screen::Logs);
                    return Action::Logs(name);
                }
            }
            _ => {}
        }
        Action::Nothing
    }

    fn show(&mut self, screen: Screen) {
        self.screen = screen;
        self.arrange();
    }

    fn sort_by(&mut self, by: Sort) {
        self.sort = by;
        self.arrange();
    }

    fn filter_key(&mut self, mut text: String, key: Key) -> Action {
        match key {
            Key::Enter => {
                self.filter = text;
                self.arrange();
                return Action::Nothing;
            }
            Key::Escape => return Action::Nothing,
            Key::Backspace => drop(text.pop()),
            Key::Char(c) if text.len() < FILTER_LEN_MAX && !c.is_control() => text.push(c),
            _ => {}
        }
        self.over = Over::Filter(text);
        Action::Nothing
    }
}

/// Words of a filter: `KEY=VALUE` fits a label exactly, any other word is a part of the name or the key of a label.
struct Filter<'a>(Vec<(&'a str, Option<LabelTerm>)>);

impl<'a> Filter<'a> {
    fn parse(text: &'a str) -> Self {
        let terms = text.split_whitespace().map(|word| (word, LabelTerm::parse(word).ok()));
        Self(terms.collect())
    }

    fn takes(&self, row: &SandboxMetrics) -> bool {
        self.0.iter().all(|(word, term)| {
            row.name.as_str().contains(word) || term.as_ref().is_some_and(|term| term.matches(&row.labels))
        })
    }
}
