//! Metrics: the fleet now, the fleet as a stream, the last hour of one sandbox. Reads what the metrics actor holds, never a VM.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::HeaderMap;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::response::{IntoResponse as _, Response};
use msb_actors::metrics::HISTORY_MS;
use msb_actors::metrics::snapshot::Choice;
use msb_protocol::control::{HistoryQuery, MetricsHistory, MetricsSnapshot};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::fleet::FLEET_MEDIA_TYPE;
use msb_protocol::id::SandboxName;
use msb_protocol::labels::LabelTerm;
use msb_protocol::selector::Selector;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::ApiState;
use super::failure::{Failure, query};
use super::images::json_lines;
use super::sandboxes::{TERMS_MAX, name};

/// Least time between two snapshots of a stream.
const INTERVAL_MIN_MS: u64 = 100;
/// Most time between two snapshots of a stream.
const INTERVAL_MAX_MS: u64 = 3_600_000;
/// Points of a history for which nobody says how many.
const POINTS_DEFAULT: u32 = 600;
/// Points of a history: an hour at the shortest interval.
const POINTS_MAX: u32 = 36_000;

fn refuse(code: ErrorCode, why: String) -> Failure {
    Failure(ApiError::new(code, why))
}

type Pairs = Result<Query<Vec<(String, String)>>, QueryRejection>;

/// The choice and, where a stream is asked for, its interval.
fn parse(pairs: Pairs, is_stream: bool) -> Result<(Choice, Duration), Failure> {
    let pairs = query(pairs)?;
    if pairs.len() > TERMS_MAX {
        return Err(refuse(ErrorCode::LimitExceeded, format!("a filter has at most {TERMS_MAX} terms")));
    }
    let (mut choice, mut interval_ms) = (Choice::default(), 1_000);
    for (key, value) in pairs {
        match key.as_str() {
            "name" => choice.names.push(SandboxName::parse(&value)?),
            "label" => choice.terms.push(LabelTerm::parse(&value)?),
            "selector" => choice.terms.push(LabelTerm::Fits(Selector::parse(&value)?)),
            "interval_ms" if is_stream => {
                interval_ms =
                    value.parse().ok().filter(|ms| (INTERVAL_MIN_MS..=INTERVAL_MAX_MS).contains(ms)).ok_or_else(
                        || {
                            let range = format!("{INTERVAL_MIN_MS} to {INTERVAL_MAX_MS}");
                            refuse(ErrorCode::InvalidRequest, format!("interval_ms must be {range}, not {value:?}"))
                        },
                    )?;
            }
            other => {
                return Err(refuse(ErrorCode::InvalidRequest, format!("unknown query parameter {other:?}")));
            }
        }
    }
    Ok((choice, Duration::from_millis(interval_ms)))
}

#[utoipa::path(get, path = "/v1/metrics", params(("name" = Option<Vec<String>>, Query), ("label" = Option<Vec<String>>, Query), ("selector" = Option<Vec<String>>, Query)), responses((status = 200, body = MetricsSnapshot), (status = "4XX", body = ApiError)))]
pub(crate) async fn snapshot(
    State(state): State<ApiState>,
    headers: HeaderMap,
    pairs: Pairs,
) -> Result<Response, Failure> {
    let (choice, _) = parse(pairs, false)?;
    let fleet = state.daemon.fleet(&choice).await?;
    if accepts_compact(&headers) {
        return Ok(([(CONTENT_TYPE, FLEET_MEDIA_TYPE)], fleet.encode()).into_response());
    }
    Ok(Json(fleet.into_snapshot()).into_response())
}

/// Whether the client named the compact form; its order among others does not matter, only our own clients know it.
fn accepts_compact(headers: &HeaderMap) -> bool {
    let mut accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepted.any(|value| value.split(',').any(|one| one.trim() == FLEET_MEDIA_TYPE))
}

#[utoipa::path(get, path = "/v1/metrics/stream", params(("name" = Option<Vec<String>>, Query), ("label" = Option<Vec<String>>, Query), ("selector" = Option<Vec<String>>, Query), ("interval_ms" = Option<u64>, Query, description = "100 to 3600000; 1000 if not given")), responses((status = 200, body = MetricsSnapshot, content_type = "application/x-ndjson", description = "a line at each interval, the first at once"), (status = "4XX", body = ApiError)))]
pub(crate) async fn stream(State(state): State<ApiState>, pairs: Pairs) -> Result<Response, Failure> {
    let (choice, interval) = parse(pairs, true)?;
    // One snapshot waits at most: a reader who stops reading gets no old ones piled up.
    let (lines, waiting) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = lines.closed() => return,
            }
            let Ok(snapshot) = state.daemon.metrics(&choice).await else { return };
            if lines.send(snapshot).await.is_err() {
                return;
            }
        }
    });
    Ok(json_lines(waiting))
}

#[utoipa::path(get, path = "/v1/sandboxes/{name}/metrics", params(("name" = String, Path), HistoryQuery), responses((status = 200, body = MetricsHistory), (status = "4XX", body = ApiError)))]
pub(crate) async fn history(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    which: Result<Query<HistoryQuery>, QueryRejection>,
) -> Result<Json<MetricsHistory>, Failure> {
    let which = query(which)?;
    let points_max = which.points_max.unwrap_or(POINTS_DEFAULT);
    if points_max == 0 || points_max > POINTS_MAX {
        return Err(refuse(
            ErrorCode::InvalidRequest,
            format!("points_max must be 1 to {POINTS_MAX}, not {points_max}"),
        ));
    }
    let last_ms = which.last_ms.unwrap_or(HISTORY_MS);
    let points_max = usize::try_from(points_max).unwrap_or(usize::MAX);
    Ok(Json(state.daemon.metrics_history(&name(&sandbox)?, last_ms, points_max).await?))
}
