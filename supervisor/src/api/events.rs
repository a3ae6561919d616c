//! Events: what the journal has, then what happens, without a gap and without a repetition.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Response;
use msb_protocol::control::{EventQuery, EventRecord};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;

use super::ApiState;
use super::failure::{Failure, query};
use super::images::json_lines;

/// Events read from the journal at once.
const PAGE_LEN: usize = 512;

#[utoipa::path(get, path = "/v1/events", params(EventQuery), responses((status = 200, body = EventRecord, content_type = "application/x-ndjson", description = "lines")))]
pub(crate) async fn events(
    State(state): State<ApiState>,
    which: Result<Query<EventQuery>, QueryRejection>,
) -> Result<Response, Failure> {
    let which = query(which)?;
    let (lines, waiting) = mpsc::channel(PAGE_LEN);
    let journal = state.daemon.surroundings().journal.clone();
    tokio::spawn(async move {
        // Listening begins before reading: what happens meanwhile is seen twice and told once.
        let mut live = journal.live_events();
        let mut last = which.since.unwrap_or(0);
        'replay: loop {
            loop {
                let page = journal.events_after(last, PAGE_LEN).await;
                let more = page.len() == PAGE_LEN;
                for event in page {
                    last = event.sequence;
                    if lines.send(event).await.is_err() {
                        return;
                    }
                }
                if !more {
                    break;
                }
            }
            if !which.follow {
                return;
            }
            loop {
                let event = tokio::select! {
                    event = live.recv() => event,
                    () = lines.closed() => return,
                };
                match event {
                    Ok(event) if event.sequence <= last => {}
                    Ok(event) => {
                        last = event.sequence;
                        if lines.send(EventRecord::clone(&event)).await.is_err() {
                            return;
                        }
                    }
                    // Too slow for the live ones: the journal still has them.
                    Err(RecvError::Lagged(_)) => continue 'replay,
                    Err(RecvError::Closed) => return,
                }
            }
        }
    });
    Ok(json_lines(waiting))
}
