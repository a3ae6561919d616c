//! The screen at 80x24 as snapshots, and what keys do.

use std::collections::BTreeMap;

use msb_protocol::control::{HistoryPoint, MetricsSnapshot, SandboxMetrics};
use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::keys::Key;
use super::model::{Action, Model, Over, Screen};
use super::view::{Theme, draw};
use crate::commands::metrics::Sort;
use crate::commands::metrics::tests::sandbox;

fn snapshot(second: u64) -> MetricsSnapshot {
    let wave = |at: u64| 0.05 + 0.9 * (at % 8) as f64 / 8.0;
    let mut ended = sandbox("nightly-build", 0.0, 80, 5);
    ended.last = true;
    ended.status = msb_protocol::state::SandboxState::Stopped;
    of(vec![
        sandbox("agent-7", wave(second), 300, second),
        sandbox("web", 0.02, 41, second),
        sandbox("worker-with-a-rather-long-name", 0.97, 490, second),
        ended,
    ])
}

fn of(sandboxes: Vec<SandboxMetrics>) -> MetricsSnapshot {
    MetricsSnapshot {
        ready_forks: BTreeMap::new(),
        host_id: "id".into(),
        host_name: "lab".into(),
        instance_id: "instance".into(),
        taken_at: jiff::Timestamp::UNIX_EPOCH,
        states: BTreeMap::from([("running".into(), 3), ("stopped".into(), 1)]),
        sandboxes,
    }
}

fn running() -> Model {
    let mut model = Model::new(Sort::Cpu);
    for second in 1..40 {
        model.take(snapshot(second));
    }
    model
}

fn press(model: &mut Model, keys: &[Key]) -> Action {
    keys.iter().map(|key| model.key(*key)).last().unwrap_or(Action::Nothing)
}

fn typed(text: &str) -> Vec<Key> {
    text.chars().map(Key::Char).collect()
}

fn shown(model: &Model, columns: u16, lines: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(columns, lines)).unwrap();
    terminal.draw(|frame| draw(model, Theme { colors: true }, frame)).unwrap();
    terminal.backend().to_string()
}

#[test]
fn the_list_fits_80_columns_and_24_lines() {
    insta::assert_snapshot!(shown(&running(), 80, 24));
}

#[test]
fn a_sandbox_is_looked_into() {
    let mut model = running();
    let action = press(&mut model, &[Key::Char('n'), Key::Home, Key::Enter]);
    assert!(matches!(action, Action::History(name) if name.as_str() == "agent-7"));
    insta::assert_snapshot!(shown(&model, 80, 24));
    assert_eq!(press(&mut model, &[Key::Escape]), Action::Nothing);
    assert_eq!(model.screen, Screen::List);
}

#[test]
fn keys_are_explained() {
    let mut model = running();
    press(&mut model, &[Key::Char('?')]);
    insta::assert_snapshot!(shown(&model, 80, 24));
    press(&mut model, &[Key::Char('q')]);
    assert_eq!(model.over, Over::Nothing, "the key only took the help away");
}

#[test]
fn only_sixteen_colours_are_used_and_none_without_colours() {
    use ratatui::style::Color;
    let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
    for colors in [true, false] {
        terminal.draw(|frame| draw(&running(), Theme { colors }, frame)).unwrap();
        for cell in terminal.backend().buffer().content() {
            assert!(!matches!(cell.fg, Color::Rgb(..) | Color::Indexed(_)), "{:?}", cell.fg);
            assert!(colors || cell.fg == Color::Reset);
        }
    }
}

#[test]
fn every_size_of_terminal_is_drawn() {
    let mut model = running();
    model.take_log(vec!["line".into(); 50]);
    for screen in [Screen::List, Screen::Detail, Screen::Logs] {
        model.screen = screen;
        for over in [Over::Nothing, Over::Help, Over::Filter("x".into())] {
            model.over = over;
            for (columns, lines) in [(1, 1), (5, 3), (20, 6), (80, 24), (200, 60)] {
                shown(&model, columns, lines);
            }
        }
    }
}

#[test]
fn the_filter_takes_labels_and_parts_of_names() {
    let mut model = running();
    press(&mut model, &[Key::Char('/')]);
    press(&mut model, &typed("team=ml"));
    press(&mut model, &[Key::Enter]);
    assert!(model.rows.iter().all(|row| row.labels["team"] == "ml") && !model.rows.is_empty());
    let names = |model: &Model| model.rows.iter().map(|row| row.name.to_string()).collect::<Vec<_>>();
    press(&mut model, &[Key::Escape, Key::Char('/')]);
    press(&mut model, &typed("we"));
    press(&mut model, &[Key::Enter]);
    assert_eq!(names(&model), ["web"]);
    assert_eq!(press(&mut model, &[Key::Escape]), Action::Nothing);
    assert_eq!(model.rows.len(), 4);
    assert_eq!(press(&mut model, &[Key::Escape]), Action::Quit);
}

#[test]
fn a_stop_is_asked_for_and_what_rests_is_not_stopped() {
    let mut model = running();
    press(&mut model, &[Key::Char('n'), Key::Home]);
    assert_eq!(press(&mut model, &[Key::Char('k'), Key::Char('x')]), Action::Nothing);
    let action = press(&mut model, &[Key::Char('k'), Key::Char('y')]);
    assert!(matches!(action, Action::Stop(name) if name.as_str() == "agent-7"));
    press(&mut model, &[Key::Down, Key::Char('k')]);
    assert_eq!(model.over, Over::Nothing);
    assert_eq!(model.message.as_deref(), Some("nightly-build does not run"));
}

#[test]
fn the_chosen_row_stays_chosen_when_the_order_changes() {
    let mut model = running();
    press(&mut model, &[Key::Char('n'), Key::Home, Key::Char('c')]);
    assert_eq!(model.chosen().unwrap().name.as_str(), "agent-7");
    model.take(of(vec![sandbox("web", 0.1, 1, 99)]));
    assert_eq!(model.chosen().unwrap().name.as_str(), "web", "the one that is left");
    model.take(of(Vec::new()));
    assert!(model.chosen().is_none());
    assert!(shown(&model, 80, 24).contains("no sandbox runs"));
}

#[test]
fn logs_are_scrolled_and_left_for_where_they_were_opened() {
    let mut model = running();
    let action = press(&mut model, &[Key::Enter, Key::Char('l')]);
    assert!(matches!(action, Action::Logs(_)));
    model.take_log((0..100).map(|line| format!("line {line}")).collect());
    assert!(shown(&model, 80, 24).contains("line 99"));
    press(&mut model, &[Key::PageUp; 20]);
    assert!(shown(&model, 80, 24).contains("line 0 "));
    press(&mut model, &[Key::End]);
    assert!(shown(&model, 80, 24).contains("line 99"));
    press(&mut model, &[Key::Escape]);
    assert_eq!(model.screen, Screen::Detail);
}

#[test]
fn history_comes_before_what_was_seen() {
    let mut model = running();
    let id = model.rows.iter().find(|row| row.name.as_str() == "web").unwrap().id;
    let seen = model.moments(id).len();
    let points: Vec<HistoryPoint> = (0..5)
        .map(|second| HistoryPoint {
            at: jiff::Timestamp::from_second(second - 10).unwrap(),
            boot_id: model.rows[0].boot_id,
            cpu_utilization: 0.5,
            cpu_time_us: 0,
            memory_resident_bytes: 0,
            memory_limit_bytes: 0,
            disk_read_bytes: 0,
            disk_written_bytes: 0,
            disk_operations: 0,
            network_received_bytes: 0,
            network_sent_bytes: 0,
            network_packets: 0,
            root_allocated_bytes: 0,
            guest: None,
        })
        .map(|mut point| {
            point.at = jiff::Timestamp::from_millisecond(point.at.as_millisecond() + 10_100).unwrap();
            point
        })
        .collect();
    model.take_history(id, &points);
    // One of the five is before the first second that was seen.
    assert_eq!(model.moments(id).len(), seen + 1);
    assert!(model.moments(id).next().unwrap().cpu > 0.4);
}

#[test]
fn control_c_quits_whatever_lies_over_the_screen() {
    let mut model = running();
    press(&mut model, &[Key::Char('/')]);
    assert_eq!(model.key(Key::Interrupt), Action::Quit);
}
