//! `msb top`: a full-screen view of what sandboxes use, until somebody quits. What it shows and what keys mean is in `crate::top`; here
//! are the terminal, the keys' thread and the requests.
//!
//! The terminal is given back on every way out, a panic and a signal included. A service that goes away is waited for.

use std::io::{IsTerminal, Read as _};
use std::time::Duration;

use clap::Args;
use msb_protocol::control::{HistoryQuery, LogQuery, MetricsHistory, MetricsQuery, MetricsSnapshot, StopRequest};
use msb_protocol::id::SandboxName;
use msb_sdk::{Client, JsonLines};
use ratatui::Terminal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::bulk::FilterArgs;
use super::metrics::Sort;
use crate::context::{Context, host_variable};
use crate::failure::{ExitStatus, Failure, invalid};
use crate::printer::plain;
use crate::top::keys::{self, Key};
use crate::top::model::{Action, CURVE_LEN, Model, Screen};
use crate::top::screen::FullScreen;
use crate::top::view::{Theme, draw};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// Lines of a log that are read.
const LOG_TAIL: u64 = 500;

/// Options of `top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Only these.
    #[command(flatten)]
    pub filter: FilterArgs,
    /// Order of the rows at first
    #[arg(short, long, value_enum, value_name = "KEY", default_value = "cpu")]
    pub sort: Sort,
}

/// What happens while the screen is shown.
enum Happening {
    Key(Key),
    Snapshot(MetricsSnapshot),
    History(MetricsHistory),
    Log(SandboxName, Vec<String>),
    Said(String),
}

/// Carries it out.
///
/// # Errors
/// `invalid_config` without a terminal, `invalid_label`, `invalid_selector`, and those of the service at the start.
pub async fn run(args: TopArgs, context: &Context) -> Result<ExitStatus, Failure> {
    args.filter.check()?;
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        return Err(invalid("msb top needs a terminal; for programs there is msb metrics --format json"));
    }
    let client = context.client().await?;
    let query = args.filter.metrics_query(Vec::new());
    let snapshots = client.metrics_stream(&query, INTERVAL).await?;
    let refuse = |error: std::io::Error| invalid(format!("the terminal cannot be used: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(refuse)?;
    let mut hang_up = signal(SignalKind::hangup()).map_err(refuse)?;
    let mut resized = signal(SignalKind::window_change()).map_err(refuse)?;

    let (tell, mut happenings) = mpsc::channel(64);
    tokio::spawn(listen(client.clone(), query, snapshots, tell.clone()));
    let mut terminal = Terminal::new(FullScreen::enter()?).map_err(refuse)?;
    read_keys(tell.clone());
    let theme = Theme { colors: host_variable("NO_COLOR").is_none_or(|value| value.is_empty()) };
    let mut model = Model::new(args.sort);
    let outcome = loop {
        if let Err(error) = terminal.draw(|frame| draw(&model, theme, frame)) {
            break Err(refuse(error));
        }
        let happening = tokio::select! {
            happening = happenings.recv() => happening,
            // Drawing asks for the size.
            _ = resized.recv() => continue,
            _ = terminate.recv() => break Ok(ExitStatus::SUCCESS),
            _ = hang_up.recv() => break Ok(ExitStatus::SUCCESS),
        };
        let action = match happening {
            None => break Ok(ExitStatus::SUCCESS),
            Some(Happening::Key(key)) => model.key(key),
            Some(Happening::Snapshot(snapshot)) => {
                model.take(snapshot);
                // A log that is shown goes on.
                match (&model.screen, model.chosen()) {
                    (Screen::Logs, Some(row)) if model.log_back == 0 => Action::Logs(row.name.clone()),
                    _ => Action::Nothing,
                }
            }
            Some(Happening::History(history)) => {
                model.take_history(history.id, &history.points);
                Action::Nothing
            }
            Some(Happening::Log(name, lines)) => {
                if model.screen == Screen::Logs && model.chosen().is_some_and(|row| row.name == name) {
                    model.take_log(lines);
                }
                Action::Nothing
            }
            Some(Happening::Said(message)) => {
                model.message = Some(message);
                Action::Nothing
            }
        };
        match action {
            Action::Nothing => {}
            Action::Quit => break Ok(ExitStatus::SUCCESS),
            action => drop(tokio::spawn(act(client.clone(), action, tell.clone()))),
        }
    };
    // Gives the terminal back before anything is said.
    drop(terminal);
    outcome
}

/// Reads keys on a thread of its own, which ends with the process: reading a terminal cannot be interrupted.
fn read_keys(tell: mpsc::Sender<Happening>) {
    std::thread::spawn(move || {
        let mut bytes = [0u8; 256];
        while let Ok(count @ 1..) = std::io::stdin().lock().read(&mut bytes) {
            for key in keys::parse(&bytes[..count]) {
                if tell.blocking_send(Happening::Key(key)).is_err() {
                    return;
                }
            }
        }
        // The terminal is gone: so is whoever watched it.
        let _ = tell.blocking_send(Happening::Key(Key::Interrupt));
    });
}

/// Passes snapshots on; a service that went away is asked again until it answers.
async fn listen(
    client: Client,
    query: MetricsQuery,
    mut snapshots: JsonLines<MetricsSnapshot>,
    tell: mpsc::Sender<Happening>,
) {
    loop {
        while let Ok(Some(snapshot)) = snapshots.next().await {
            if tell.send(Happening::Snapshot(snapshot)).await.is_err() {
                return;
            }
        }
        loop {
            if tell.send(Happening::Said("the service does not answer; waiting for it".into())).await.is_err() {
                return;
            }
            tokio::time::sleep(INTERVAL).await;
            if let Ok(again) = client.metrics_stream(&query, INTERVAL).await {
                snapshots = again;
                break;
            }
        }
    }
}

/// Does what a key asked for and tells what came of it.
async fn act(client: Client, action: Action, tell: mpsc::Sender<Happening>) {
    let happening = match action {
        Action::Stop(name) => match client.stop(&name, &StopRequest::default()).await {
            Ok(_) => Happening::Said(format!("{name} is stopped")),
            Err(error) => Happening::Said(error.to_string()),
        },
        Action::History(name) => {
            let points_max = u32::try_from(CURVE_LEN).ok();
            let last_ms = u64::try_from(CURVE_LEN).ok().map(|points| points * 1_000);
            match client.metrics_history(&name, &HistoryQuery { last_ms, points_max }).await {
                Ok(history) => Happening::History(history),
                Err(error) => Happening::Said(error.to_string()),
            }
        }
        Action::Logs(name) => match read_log(&client, &name).await {
            Ok(lines) => Happening::Log(name, lines),
            Err(error) => Happening::Said(error.to_string()),
        },
        Action::Nothing | Action::Quit => return,
    };
    // The screen may be gone meanwhile.
    let _ = tell.send(happening).await;
}

/// The last lines of a log, plain: what a guest writes must not reach the terminal as it is.
async fn read_log(client: &Client, name: &SandboxName) -> Result<Vec<String>, msb_sdk::Error> {
    let query = LogQuery { tail: Some(LOG_TAIL), source: Some("all".into()), ..LogQuery::default() };
    let mut records = client.logs(name, &query).await?;
    let mut text = String::new();
    while let Some(record) = records.next().await? {
        text.push_str(&record.data);
    }
    Ok(text.lines().map(|line| plain(line).replace('\t', "    ")).collect())
}
