//! The image routes of the canned service that change things or report on the disk.

use axum::body::Body;
use axum::response::{IntoResponse, Json, Response};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::images::{
    ArchiveFormat, DiskUsage, DiskUsageRow, LoginReport, LoginRequest, PinRequest, PruneReport, PruneRequest,
    PrunedImage, PullEvent, PullLayer, PullRequest, RegistryList, RegistryRow, SaveRequest, TagRequest,
};

use super::{DIGEST, image, lines, refuse};

pub(super) async fn pull(Json(request): Json<PullRequest>) -> Response {
    let layer = |number: u8| PullLayer { digest: format!("sha256:{number:064}"), bytes: 1 << 20 };
    let resolved =
        PullEvent::Resolved { digest: DIGEST.into(), platform: "linux/amd64".into(), layers: vec![layer(1), layer(2)] };
    let retry = PullEvent::Retry { what: "000000000001".into(), reason: "cut".into(), wait_ms: 500 };
    let warning = PullEvent::Warning { message: "mirror m.test: unreachable".into() };
    let last = match request.reference.as_str() {
        "busybox" | "newest" => PullEvent::Done { image: Box::new(image()), was_present: false },
        name => PullEvent::Error {
            error: ApiError::new(ErrorCode::ImageNotFound, format!("registry docker.io has no {name}")),
        },
    };
    let done = PullEvent::LayerDone { digest: format!("sha256:{:064}", 1), known: true };
    let step = PullEvent::Layer { digest: format!("sha256:{:064}", 2), bytes: 1 << 19 };
    lines(&[resolved, done, step, retry, warning, last])
}

pub(super) async fn registries() -> Json<RegistryList> {
    let row = RegistryRow {
        registry: "r.test:5000".into(),
        username: "me".into(),
        source: "file".into(),
        mirrors: vec!["m.test".into()],
        insecure: true,
    };
    Json(RegistryList { registries: vec![row] })
}

pub(super) async fn login(Json(request): Json<LoginRequest>) -> Response {
    if request.credentials.password != "right" {
        return refuse(ErrorCode::RegistryDenied, "registry r.test: it refuses the name or the password");
    }
    Json(LoginReport { registry: request.registry, stored_in: "/home/u/.msb/registries.json".into() }).into_response()
}

pub(super) async fn logout() -> Json<serde_json::Value> {
    Json(serde_json::json!({}))
}

pub(super) async fn save(Json(request): Json<SaveRequest>) -> Response {
    let format = if request.format == ArchiveFormat::Oci { "oci" } else { "docker" };
    match request.references.iter().find(|name| *name != "busybox" && *name != "broken") {
        Some(name) => refuse(ErrorCode::ImageNotFound, format!("no image is called {name}")),
        // An archive that breaks off in the middle.
        None if request.references.contains(&"broken".to_owned()) => {
            let pieces = [Ok("half".to_owned()), Err(std::io::Error::other("the disk is gone"))];
            Body::from_stream(futures_util::stream::iter(pieces)).into_response()
        }
        None => format!("{format} archive of {}", request.references.join(", ")).into_response(),
    }
}

pub(super) async fn tag(Json(request): Json<TagRequest>) -> Response {
    if request.reference != "busybox" {
        return refuse(ErrorCode::ImageNotFound, "no such image");
    }
    let mut tagged = image();
    tagged.references.push(request.name);
    Json(tagged).into_response()
}

pub(super) async fn pin(Json(request): Json<PinRequest>) -> Response {
    if request.reference != "busybox" {
        return refuse(ErrorCode::ImageNotFound, "no such image");
    }
    let mut image = image();
    image.pinned = request.pinned;
    Json(image).into_response()
}

pub(super) async fn prune(Json(request): Json<PruneRequest>) -> Response {
    if request.labels.contains(&"nothing".to_owned()) {
        return Json(PruneReport { dry_run: request.dry_run, ..PruneReport::default() }).into_response();
    }
    Json(PruneReport {
        dry_run: request.dry_run,
        image_refs_removed: 1,
        manifests_removed: 1,
        layers_removed: 2,
        fsmeta_removed: 1,
        partials_removed: 0,
        bytes_reclaimed: 3 << 20,
        images: vec![PrunedImage { digest: DIGEST.into(), references: vec!["busybox:latest".into()] }],
    })
    .into_response()
}

pub(super) async fn usage() -> Json<DiskUsage> {
    let row = |kind: &str, count, active, bytes, reclaimable_bytes| DiskUsageRow {
        kind: kind.into(),
        count,
        active,
        bytes,
        reclaimable_bytes,
    };
    Json(DiskUsage {
        rows: vec![row("images", 2, 1, 3 << 20, 1 << 20), row("sandboxes", 1, 1, 5 << 20, 0)],
        free_bytes: 40 << 30,
    })
}
