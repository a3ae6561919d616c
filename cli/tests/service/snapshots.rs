//! The snapshot routes of the canned service: `warm`, and `warmer` on top of it.

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query};
use axum::response::{IntoResponse, Json, Response};
use msb_protocol::error::ErrorCode;
use msb_protocol::id::SandboxName;
use msb_protocol::snapshot::{
    CreateSnapshot, ImportSnapshot, SnapshotCheck, SnapshotDetail, SnapshotDisk, SnapshotImage, SnapshotKind,
    SnapshotList, SnapshotParent, SnapshotSummary,
};
use msb_protocol::spec::SandboxSpec;

use super::{DIGEST, refuse, time};

fn name(text: &str) -> SandboxName {
    SandboxName::parse(text).unwrap()
}

fn detail(text: &str) -> SnapshotDetail {
    let mut spec = SandboxSpec::new("busybox");
    spec.memory_mib = 128;
    spec.env = [("SECRET".to_owned(), "hunter2".to_owned())].into();
    spec.workdir = Some("/srv".into());
    let child = text == "warmer";
    SnapshotDetail {
        summary: SnapshotSummary {
            name: name(text),
            id: format!("sha256:{:064}", text.len()),
            kind: SnapshotKind::Disk,
            created_at: time("2026-01-02T03:04:05Z"),
            source: name("old"),
            image: SnapshotImage { reference: "busybox".into(), digest: DIGEST.into() },
            parent: child.then(|| SnapshotParent { id: format!("sha256:{:064}", 4), name: name("warm") }),
            size_bytes: 8 << 30,
            allocated_bytes: 3 << 20,
            labels: if child { Default::default() } else { [("team".to_owned(), "ml".to_owned())].into() },
            ready_forks: None,
        },
        spec,
        disk: SnapshotDisk { size_bytes: 8 << 30, data_bytes: 2 << 20, digest: DIGEST.into() },
        memory: None,
        created_by: "0.1.0".into(),
        children: if child { vec![] } else { vec![name("warmer")] },
        path: format!("/home/u/.msb/snapshots/{text}"),
    }
}

#[expect(clippy::result_large_err, reason = "an answer is an answer")]
fn known(text: &str) -> Result<SnapshotDetail, Response> {
    match text {
        "warm" | "warmer" | "bad" => Ok(detail(text)),
        _ => Err(refuse(ErrorCode::SnapshotNotFound, format!("no snapshot is called {text}; there are warm, warmer"))),
    }
}

pub(super) async fn list() -> Json<SnapshotList> {
    Json(SnapshotList { snapshots: vec![detail("warm").summary, detail("warmer").summary] })
}

pub(super) async fn create(Json(request): Json<CreateSnapshot>) -> Response {
    match (request.from.as_str(), request.name.as_str()) {
        ("web", _) => {
            refuse(ErrorCode::SandboxStillRunning, "sandbox web is running: a snapshot is taken of a stopped one")
        }
        (_, "warm") => refuse(ErrorCode::SnapshotAlreadyExists, "snapshot warm exists already"),
        (_, new) => Json(SnapshotDetail { children: vec![], ..detail(new) }).into_response(),
    }
}

pub(super) async fn inspect(Path(text): Path<String>) -> Response {
    known(&text).map_or_else(|refused| refused, |detail| Json(detail).into_response())
}

pub(super) async fn remove(Path(text): Path<String>) -> Response {
    match known(&text) {
        Err(refused) => refused,
        Ok(_) if text == "warm" => refuse(ErrorCode::SnapshotInUse, "snapshot warm is the parent of warmer"),
        Ok(_) => Json(serde_json::json!({})).into_response(),
    }
}

pub(super) async fn verify(Path(text): Path<String>) -> Response {
    let problems = match text.as_str() {
        "bad" => vec!["its disk has digest sha256:1 and should have sha256:2".to_owned()],
        _ => vec![],
    };
    known(&text).map_or_else(
        |refused| refused,
        |detail| Json(SnapshotCheck { name: detail.summary.name, bytes: 2 << 20, problems }).into_response(),
    )
}

pub(super) async fn export(Path(text): Path<String>) -> Response {
    match known(&text) {
        Err(refused) => refused,
        Ok(_) if text == "bad" => {
            let pieces = [Ok("half".to_owned()), Err(std::io::Error::other("the disk is gone"))];
            Body::from_stream(futures_util::stream::iter(pieces)).into_response()
        }
        Ok(_) => format!("archive of {text}").into_response(),
    }
}

pub(super) async fn import(Query(how): Query<ImportSnapshot>, archive: Bytes) -> Response {
    if archive.starts_with(b"!") {
        return refuse(ErrorCode::InvalidArchive, "the archive is no snapshot: it is empty");
    }
    Json(detail(how.name.as_deref().unwrap_or("warmer"))).into_response()
}
