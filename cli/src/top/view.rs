//! Draws a [`Model`]: 80 columns and 24 lines are enough, sixteen colours too, and none with `NO_COLOR`. Text that comes from an image,
//! a guest or a label is made plain before it gets here or in here.

use msb_protocol::control::SandboxMetrics;
use msb_protocol::quantity;
use msb_protocol::state::SandboxState;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Cell, Clear, Paragraph, Row, Sparkline, Table, TableState};

use super::model::{Model, Moment, Over, Screen};
use crate::commands::metrics::{Sort, memory_used};
use crate::printer::plain;
use crate::time;

/// Heights of a curve in one line, lowest first.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Columns of the curve in a row.
const ROW_CURVE: usize = 12;

/// How things look.
#[derive(Clone, Copy, Debug)]
pub struct Theme {
    /// Whether there are colours.
    pub colors: bool,
}

impl Theme {
    fn color(self, color: Color) -> Style {
        if self.colors { Style::new().fg(color) } else { Style::new() }
    }

    fn load(self, share: f64) -> Style {
        match share {
            share if share >= 0.9 => self.color(Color::Red),
            share if share >= 0.6 => self.color(Color::Yellow),
            _ => self.color(Color::Green),
        }
    }

    fn state(self, state: SandboxState) -> Style {
        match state {
            SandboxState::Running => self.color(Color::Green),
            SandboxState::Crashed => self.color(Color::Red),
            SandboxState::Stopped | SandboxState::Asleep => self.color(Color::DarkGray),
            _ => self.color(Color::Yellow),
        }
    }
}

/// Draws.
pub fn draw(model: &Model, theme: Theme, frame: &mut Frame<'_>) {
    let [head, body, foot] =
        Layout::vertical([Constraint::Length(1), Constraint::Min(1), Constraint::Length(1)]).areas(frame.area());
    frame.render_widget(Paragraph::new(header(model, theme)), head);
    match model.screen {
        Screen::List => list(model, theme, frame, body),
        Screen::Detail => detail(model, theme, frame, body),
        Screen::Logs => logs(model, theme, frame, body),
    }
    frame.render_widget(Paragraph::new(footer(model, theme)), foot);
    if model.over == Over::Help {
        help(theme, frame, body);
    }
}

fn header(model: &Model, theme: Theme) -> Line<'static> {
    let mut spans = vec![
        Span::styled("msb top", theme.color(Color::Cyan).add_modifier(Modifier::BOLD)),
        Span::raw(format!("  {}", plain(&model.host))),
    ];
    for (state, count) in model.states.iter().filter(|(_, count)| **count > 0) {
        spans.push(Span::raw(format!("  {count} {state}")));
    }
    if !model.filter.is_empty() {
        spans.push(Span::styled(format!("  filter: {}", plain(&model.filter)), theme.color(Color::Yellow)));
    }
    Line::from(spans)
}

fn footer(model: &Model, theme: Theme) -> Line<'static> {
    match (&model.over, &model.message, &model.screen) {
        (Over::Filter(text), ..) => Line::from(format!("filter (name or KEY=VALUE): {}▏", plain(text))),
        (Over::Confirm(name), ..) => {
            Line::styled(format!("stop {name}? y: yes, any other key: no"), theme.color(Color::Red))
        }
        (_, Some(message), _) => Line::styled(plain(message).replace('\n', " "), theme.color(Color::Yellow)),
        (.., Screen::List) => {
            Line::from("↑↓ choose  enter look in  / filter  c m n sort  k stop  l logs  ? keys  q quit")
        }
        (.., Screen::Detail) => Line::from("esc back  k stop  l logs  ? keys  q quit"),
        (.., Screen::Logs) => Line::from("↑↓ scroll  end newest  esc back  q quit"),
    }
}

fn list(model: &Model, theme: Theme, frame: &mut Frame<'_>, area: Rect) {
    if model.rows.is_empty() {
        let text = if model.filter.is_empty() {
            "no sandbox runs; start one with: msb run IMAGE"
        } else {
            "no sandbox fits the filter; esc takes it away"
        };
        frame.render_widget(Paragraph::new(text), area);
        return;
    }
    let mark = |name: &str, by: Sort| if model.sort == by { format!("{name}▾") } else { name.to_owned() };
    let titles = [
        mark("NAME", Sort::Name),
        "STATE".into(),
        // Over numbers that end at the right.
        format!("{:>6}", mark("CPU", Sort::Cpu)),
        String::new(),
        format!("{:>6}", mark("MEM", Sort::Mem)),
        "  %".into(),
        "DISK/s".into(),
        " NET/s".into(),
    ];
    let chosen = model.place();
    let rows = model.rows.iter().enumerate().map(|(place, row)| {
        // The chosen row is reversed: a colour would become its ground, and a curve look like its opposite.
        let theme = Theme { colors: theme.colors && chosen != Some(place) };
        let newest = model.moments(row.id).next_back().copied().unwrap_or_default();
        let (cpu, memory) = if row.last { (0.0, 0) } else { (row.cpu_utilization, memory_used(row)) };
        let share = share(memory, row.sample.memory_limit_bytes);
        let live = |text: String| if row.last { String::new() } else { text };
        Row::new([
            Cell::new(row.name.to_string()),
            Cell::new(row.status.as_str()).style(theme.state(row.status)),
            Cell::new(live(format!("{:>6.1}", cpu * 100.0))).style(theme.load(cpu)),
            Cell::new(live(curve(model.moments(row.id), ROW_CURVE))).style(theme.load(cpu)),
            Cell::new(live(format!("{:>6}", short(memory)))),
            Cell::new(live(format!("{:>3.0}", share * 100.0))).style(theme.load(share)),
            Cell::new(live(format!("{:>6}", short(newest.disk.0 + newest.disk.1)))),
            Cell::new(live(format!("{:>6}", short(newest.network.0 + newest.network.1)))),
        ])
    });
    let columns = u16::try_from(ROW_CURVE).unwrap_or(u16::MAX);
    let widths = [
        Constraint::Min(12),
        Constraint::Length(10),
        Constraint::Length(6),
        Constraint::Length(columns),
        Constraint::Length(6),
        Constraint::Length(3),
        Constraint::Length(6),
        Constraint::Length(6),
    ];
    let table = Table::new(rows, widths)
        .header(Row::new(titles).style(Style::new().add_modifier(Modifier::BOLD)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    frame.render_stateful_widget(table, area, &mut TableState::new().with_selected(chosen));
}

#[allow(clippy::cast_precision_loss, reason = "a share of memory for a screen")]
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// A size in at most six columns: `12.3M`.
fn short(bytes: u64) -> String {
    let text = quantity::show_bytes(bytes);
    let (number, unit) = text.split_once(' ').unwrap_or((&text, "B"));
    format!("{number}{}", &unit[..1])
}

/// The last moments' load as one line; a whole vCPU is the highest bar.
fn curve<'a>(moments: impl DoubleEndedIterator<Item = &'a Moment> + ExactSizeIterator, columns: usize) -> String {
    let skipped = moments.len().saturating_sub(columns);
    let bars: String = moments
        .skip(skipped)
        .map(|moment| {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 7")]
            let height = (moment.cpu.clamp(0.0, 1.0) * 7.0).round() as usize;
            BARS[height.min(7)]
        })
        .collect();
    format!("{bars:>columns$}")
}

fn detail(model: &Model, theme: Theme, frame: &mut Frame<'_>, area: Rect) {
    let Some(row) = model.chosen() else {
        frame.render_widget(Paragraph::new("this sandbox is gone; esc goes back"), area);
        return;
    };
    let [facts, cpu, memory, disk, network] = Layout::vertical([
        Constraint::Length(5),
        Constraint::Fill(1),
        Constraint::Fill(1),
        Constraint::Fill(1),
        Constraint::Fill(1),
    ])
    .areas(area);
    frame.render_widget(Paragraph::new(describe(row, theme)), facts);
    let moments: Vec<Moment> = model.moments(row.id).copied().collect();
    let newest = moments.last().copied().unwrap_or_default();
    let limit = row.sample.memory_limit_bytes;
    // Thousandths of a vCPU: the widget draws whole numbers.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a load is small and not negative")]
    let cpu_values: Vec<u64> = moments.iter().map(|moment| (moment.cpu * 1_000.0).max(0.0) as u64).collect();
    let top = cpu_values.iter().copied().max().unwrap_or_default().max(1_000);
    let percent = newest.cpu * 100.0;
    panel(frame, cpu, format!("CPU {percent:.1}%"), &cpu_values, Some(top), theme.color(Color::Green));
    let values: Vec<u64> = moments.iter().map(|moment| moment.memory).collect();
    let title = format!("memory {} of {}", quantity::show_bytes(newest.memory), quantity::show_bytes(limit));
    panel(frame, memory, title, &values, Some(limit.max(1)), theme.color(Color::Cyan));
    let values: Vec<u64> = moments.iter().map(|moment| moment.disk.0 + moment.disk.1).collect();
    let title = rates("disk", "read", newest.disk.0, "written", newest.disk.1);
    panel(frame, disk, title, &values, None, theme.color(Color::Yellow));
    let values: Vec<u64> = moments.iter().map(|moment| moment.network.0 + moment.network.1).collect();
    let title = rates("network", "received", newest.network.0, "sent", newest.network.1);
    panel(frame, network, title, &values, None, theme.color(Color::Magenta));
}

fn rates(what: &str, into: &str, first: u64, out: &str, second: u64) -> String {
    format!("{what} {into} {}/s, {out} {}/s", quantity::show_bytes(first), quantity::show_bytes(second))
}

fn describe(row: &SandboxMetrics, theme: Theme) -> Vec<Line<'static>> {
    let labels: Vec<String> = row.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let root = row.guest.map_or_else(
        || "-".to_owned(),
        |guest| {
            format!(
                "{} used, {} free, {} on the host",
                quantity::show_bytes(guest.root_used_bytes),
                quantity::show_bytes(guest.root_free_bytes),
                quantity::show_bytes(row.sample.root_allocated_bytes)
            )
        },
    );
    vec![
        Line::from(vec![
            Span::styled(row.name.to_string(), Style::new().add_modifier(Modifier::BOLD)),
            Span::raw("  "),
            Span::styled(row.status.as_str(), theme.state(row.status)),
            Span::raw(format!(
                "  up {}  restarts {}  processes {}",
                time::duration(row.sample.uptime_ms),
                row.restarts,
                row.guest.map_or_else(|| "-".to_owned(), |guest| guest.processes.to_string()),
            )),
        ]),
        Line::from(format!("labels  {}", plain(&labels.join("  ")).replace(['\n', '\t'], " "))),
        Line::from(format!("root    {root}")),
        Line::from(format!(
            "disks   {} read, {} written since the boot",
            quantity::show_bytes(row.sample.disk_read_bytes),
            quantity::show_bytes(row.sample.disk_written_bytes)
        )),
        Line::default(),
    ]
}

fn panel(frame: &mut Frame<'_>, area: Rect, title: String, values: &[u64], top: Option<u64>, style: Style) {
    let block = Block::new().borders(Borders::TOP).title(title);
    let columns = usize::from(area.width);
    let shown = &values[values.len().saturating_sub(columns)..];
    let mut widget = Sparkline::default().block(block).data(shown.iter().copied()).style(style);
    if let Some(top) = top {
        widget = widget.max(top);
    }
    frame.render_widget(widget, area);
}

fn logs(model: &Model, theme: Theme, frame: &mut Frame<'_>, area: Rect) {
    let name = model.chosen().map(|row| row.name.to_string()).unwrap_or_default();
    let block = Block::new().borders(Borders::TOP).title(format!("log of {name}")).style(theme.color(Color::Reset));
    let height = usize::from(area.height).saturating_sub(1);
    let end = model.log.len().saturating_sub(model.log_back).max(height.min(model.log.len()));
    let lines: Vec<Line<'_>> =
        model.log[end.saturating_sub(height)..end].iter().map(|line| Line::from(line.as_str())).collect();
    let text = if model.log.is_empty() { vec![Line::from("nothing was written")] } else { lines };
    frame.render_widget(Paragraph::new(text).block(block), area);
}

fn help(theme: Theme, frame: &mut Frame<'_>, area: Rect) {
    const KEYS: [&str; 10] = [
        "↑ ↓ page home end   choose a sandbox",
        "enter               look into it",
        "/                   filter: words of the name, or KEY=VALUE",
        "c  m  n             sort by CPU, memory, name",
        "k                   stop it (asks first)",
        "l                   what it wrote",
        "esc                 back; takes a filter away",
        "q  ctrl-c           quit",
        "",
        "any key goes on",
    ];
    let (width, height) = (66.min(area.width), 12.min(area.height));
    let place = Rect { x: area.x + (area.width - width) / 2, y: area.y + (area.height - height) / 2, width, height };
    frame.render_widget(Clear, place);
    let block = Block::new().borders(Borders::ALL).title("keys").style(theme.color(Color::Reset));
    frame.render_widget(Paragraph::new(KEYS.map(Line::from).to_vec()).block(block), place);
}
