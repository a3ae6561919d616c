//! `msb-metrics` as a program, against backends that are down, slow, refusing or broken, and against no daemon at all.
#![expect(clippy::unwrap_used, clippy::cast_precision_loss, reason = "a test stops at the first surprise")]
#![expect(clippy::print_stderr, reason = "figures for the reader of the output")]

mod scene;

use std::path::PathBuf;
use std::time::Duration;

use msb_protocol::paths::Surroundings;
use scene::{Answer, Backend, Daemon, Exporter, until};

const READ: &str = "microsandbox.disk.bytes_read";

fn socket(directory: &tempfile::TempDir) -> PathBuf {
    directory.path().join("msbd.sock")
}

fn otel<'a>(url: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let words = ["otel", "--endpoint", url, "--collect-interval", "100ms", "--flush-interval", "100ms"];
    words.iter().chain(more).copied().collect()
}

/// A port that nobody listens on, until somebody does.
fn unused_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Whatever a backend does, every sample arrives, in its order, once for each time the backend said that it took it, with its own time.
#[tokio::test(flavor = "multi_thread")]
async fn every_sample_arrives_with_its_own_time_after_refusals_and_cuts() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&socket(&directory), 1);
    let backend = Backend::with(&[
        Answer::Take,
        Answer::Status(503, Some(1)),
        Answer::Status(429, None),
        Answer::Cut,
        Answer::Status(502, None),
        Answer::Take,
        Answer::TakePart(5),
        Answer::Status(504, None),
    ]);
    let url = format!("http://127.0.0.1:{}/v1/metrics", backend.listen(0).await);
    let exporter = Exporter::start(
        directory.path(),
        &[("MSB_HOST", &socket(&directory))],
        &otel(&url, &["--compression", "gzip", "--header", "x-key=secret"]),
    );
    until("the last fault is over and points came after it", || backend.values(READ).last() > Some(&30.0)).await;
    until("own metrics", || backend.values("microsandbox.collector.points.rejected").last() == Some(&5.0)).await;
    let log = exporter.log();
    assert_eq!(exporter.end(), Some(0));
    let read: Vec<_> = backend.taken().into_iter().filter(|taken| taken.metric == READ).collect();
    let values: Vec<f64> = read.iter().map(|taken| taken.value).collect();
    // An answer that was cut may have been taken: then the same comes again. Nothing is missing and nothing comes late.
    let mut unique = values.clone();
    unique.dedup();
    let expected: Vec<f64> = (1..=unique.len()).map(|number| number as f64).collect();
    assert_eq!(unique, expected);
    assert!(read.iter().all(|taken| taken.second == 1_000_000 + taken.value as u64));
    assert!(unique.len() as u64 >= daemon.asked() - 1, "the end sends what waits");
    assert!(read.iter().all(|taken| taken.host_id == "host-1" && taken.service == "microsandbox"));
    let own: Vec<_> = backend.taken().into_iter().filter(|taken| taken.service == "msb-metrics").collect();
    assert!(own.iter().all(|taken| taken.host_id == "host-1"));
    assert!(own.iter().any(|taken| taken.metric == "microsandbox.collector.exports.failure" && taken.value >= 5.0));
    let heads = backend.heads();
    assert!(heads[0].1.contains("x-key: secret") && heads[0].1.contains("content-encoding: gzip"));
    // The second answer was 503 with Retry-After: 1.
    assert!(heads[2].0 - heads[1].0 >= Duration::from_millis(950), "Retry-After was not obeyed");
    assert!(log.contains("took only a part") && !log.contains("secret"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_is_down_costs_the_oldest_and_is_counted() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&socket(&directory), 1);
    let backend = Backend::default();
    let port = unused_port();
    let url = format!("http://127.0.0.1:{port}/v1/metrics");
    let exporter =
        Exporter::start(directory.path(), &[("MSB_HOST", &socket(&directory))], &otel(&url, &["--max-buffered", "3"]));
    until("more was collected than fits", || daemon.asked() > 12).await;
    backend.listen(port).await;
    until("points", || !backend.values(READ).is_empty()).await;
    until("the loss is counted", || {
        backend.values("microsandbox.collector.collections.dropped").last().is_some_and(|dropped| *dropped >= 5.0)
    })
    .await;
    assert_eq!(exporter.end(), Some(0));
    let values = backend.values(READ);
    assert!(values[0] > 5.0, "the oldest are gone: {values:?}");
    assert!(values.windows(2).all(|pair| pair[1] == pair[0] + 1.0), "and what was kept is whole: {values:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_backend_delays_no_collection() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&socket(&directory), 1);
    let backend = Backend::always(Answer::TakeAfter(Duration::from_secs(3)));
    let url = format!("http://127.0.0.1:{}/v1/metrics", backend.listen(0).await);
    let _exporter = Exporter::start(directory.path(), &[("MSB_HOST", &socket(&directory))], &otel(&url, &[]));
    until("the first request", || !backend.heads().is_empty()).await;
    let before = daemon.asked();
    until("collections go on", || daemon.asked() > before + 10).await;
    assert!(backend.heads().len() < 10, "while the backend has answered few");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_started_again_is_found_and_nothing_is_told_meanwhile() {
    let directory = tempfile::tempdir().unwrap();
    let first = Daemon::start(&socket(&directory), 1);
    let backend = Backend::default();
    let url = format!("http://127.0.0.1:{}/v1/metrics", backend.listen(0).await);
    let exporter = Exporter::start(directory.path(), &[("MSB_HOST", &socket(&directory))], &otel(&url, &[]));
    until("points", || backend.values(READ).len() > 3).await;
    drop(first);
    until("it is missed", || exporter.log().contains("no msbd answers")).await;
    // What was under way arrives.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = backend.values(READ).len();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(backend.values(READ).len(), before, "a value was frozen");
    let _second = Daemon::start(&socket(&directory), 1);
    until("points again", || backend.values(READ).len() > before + 3).await;
    assert_eq!(exporter.end(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_say_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let _daemon = Daemon::start(&socket(&directory), 1);
    let backend = Backend::always(Answer::Status(404, None));
    let url = format!("http://127.0.0.1:{}", backend.listen(0).await);
    let home = socket(&directory);
    let exporter = Exporter::start(directory.path(), &[("MSB_HOST", &home)], &otel(&url, &["--protocol", "http"]));
    until("the hint", || exporter.log().contains("did you mean …/v1/metrics?")).await;
    drop(exporter);
    let exporter = Exporter::start(directory.path(), &[("MSB_HOST", &home)], &["otel"]);
    until("the reason", || exporter.log().contains("give --endpoint URL or set OTEL_EXPORTER_OTLP_ENDPOINT")).await;
    assert_eq!(exporter.end(), Some(1));
}

/// It waits for a daemon without leaving a trace, and needs no restart when one comes.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_home_stays_empty_and_a_daemon_that_comes_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let [home, runtime, logs] = ["home", "runtime", "logs"].map(|name| {
        let path = directory.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    });
    let exporter = Exporter::start(
        &logs,
        &[("MSB_HOME", &home), ("XDG_RUNTIME_DIR", &runtime), ("HOME", &home)],
        &["stdout", "--collect-interval", "200ms"],
    );
    until("it waits", || exporter.log().contains("no msbd answers")).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    for path in [&home, &runtime] {
        assert_eq!(std::fs::read_dir(path).unwrap().count(), 0, "{}", path.display());
    }
    let surroundings = Surroundings {
        msb_home: Some(home.clone()),
        home: Some(home),
        xdg_runtime_dir: Some(runtime),
        ..Surroundings::default()
    };
    let _daemon = Daemon::start(&surroundings.control_socket(), 2);
    let output = || std::fs::read_to_string(&exporter.output).unwrap();
    until("points", || output().contains("\"microsandbox.uptime\"")).await;
    for line in output().lines() {
        let point: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(point["time_unix_nano"].as_u64().unwrap() > 0);
    }
    assert_eq!(exporter.end(), Some(0));
}

/// What a fleet costs. Prints; asserts only what no busy machine changes: memory and completeness.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_sandboxes_fit_and_all_of_them_arrive() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&socket(&directory), 1_000);
    let backend = Backend::default();
    let port = unused_port();
    let url = format!("http://127.0.0.1:{port}/v1/metrics");
    let words = [
        "otel",
        "--endpoint",
        &url,
        "--collect-interval",
        "100ms",
        "--flush-interval",
        "500ms",
        "--max-buffered",
        "60",
    ];
    let exporter = Exporter::start(directory.path(), &[("MSB_HOST", &socket(&directory))], &words);
    // The backend is away until the default buffer is full: this is the most that is ever held.
    until("a full buffer", || daemon.asked() > 65).await;
    let full = figures(exporter.pid());
    backend.listen(port).await;
    let sandboxes = || {
        let names = backend.taken().into_iter().filter(|taken| taken.metric == READ).map(|taken| taken.sandbox);
        names.collect::<std::collections::BTreeSet<_>>().len()
    };
    until("all sandboxes", || sandboxes() == 1_000).await;
    eprintln!("1,000 sandboxes, 65 collections held: {full:?}");
    if cfg!(not(debug_assertions)) {
        assert!(full.resident_kib < 32 << 10, "{full:?}");
    }
    assert!(full.resident_kib < 64 << 10, "{full:?}");
}

#[derive(Debug)]
#[expect(dead_code, reason = "for the reader of the test's output")]
struct Figures {
    resident_kib: u64,
    cpu_ms: u64,
}

fn figures(pid: u32) -> Figures {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let status = read("status");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let stat = read("stat");
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let ticks: u64 = fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum();
    Figures { resident_kib: resident.trim().trim_end_matches(" kB").parse().unwrap(), cpu_ms: ticks * 10 }
}
