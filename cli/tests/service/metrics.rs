//! Metrics of the service of canned answers: every sandbox that it knows and that has run, with numbers made from its place.

use axum::extract::Query;
use axum::response::{IntoResponse, Json, Response};
use msb_protocol::control::{GuestMetrics, MetricsSnapshot, SandboxMetrics};
use msb_protocol::labels::LabelTerm;
use msb_protocol::vmm::Sample;

use super::{boot, sandboxes, time};

type Pairs = Query<Vec<(String, String)>>;

/// `GET /v1/metrics`.
pub(super) async fn snapshot(Query(pairs): Pairs) -> Json<MetricsSnapshot> {
    Json(answer(&pairs, 0))
}

/// `GET /v1/metrics/stream`: three snapshots, of which the last two are of one moment.
pub(super) async fn stream(Query(pairs): Pairs) -> Response {
    let lines = [0, 1, 1].map(|second| serde_json::to_string(&answer(&pairs, second)).unwrap() + "\n");
    ([("content-type", "application/x-ndjson")], lines.concat()).into_response()
}

fn answer(pairs: &[(String, String)], second: u64) -> MetricsSnapshot {
    let of = |wanted: &'static str| pairs.iter().filter(move |(key, _)| key == wanted).map(|(_, value)| value);
    let names: Vec<_> = of("name").collect();
    let terms: Vec<_> = of("label").map(|term| LabelTerm::parse(term).unwrap()).collect();
    let rows = sandboxes().into_iter().enumerate().filter_map(|(place, summary)| {
        let place = u64::try_from(place).unwrap() + 1;
        let wanted = (names.is_empty() || names.contains(&&summary.name.to_string()))
            && terms.iter().all(|term| term.matches(&summary.labels));
        summary.started_at.filter(|_| wanted)?;
        Some(SandboxMetrics {
            name: summary.name,
            id: summary.id,
            boot_id: boot(),
            vmm_pid: 7,
            status: summary.status,
            labels: summary.labels,
            restarts: 1,
            created_at: summary.created_at,
            started_at: time("2026-01-02T03:05:00Z"),
            last: !summary.status.is_live(),
            sample: Sample {
                at_ns: (1_767_323_200 + second) * 1_000_000_000,
                uptime_ms: 61_500 + second * 1_000,
                cpu_time_us: place * 1_500_000,
                memory_limit_bytes: 512 << 20,
                memory_resident_bytes: place * (70 << 20),
                disk_read_bytes: place * 1_500,
                disk_written_bytes: place * (3 << 20),
                network_received_bytes: place * 700,
                network_sent_bytes: place * 80,
                ..Sample::default()
            },
            cpu_utilization: 0.25 / place as f64,
            guest: Some(GuestMetrics {
                memory_used_bytes: place * (40 << 20),
                memory_total_bytes: 490 << 20,
                root_used_bytes: place * (12 << 20),
                root_free_bytes: 7 << 30,
                processes: 2,
            }),
            boot_phases: Vec::new(),
        })
    });
    MetricsSnapshot {
        host_id: "0123456789abcdef".into(),
        host_name: "lab".into(),
        instance_id: "fedcba9876543210".into(),
        taken_at: time("2026-01-02T03:06:40Z"),
        states: [("running".to_owned(), 1)].into(),
        ready_forks: [].into(),
        sandboxes: rows.collect(),
    }
}
