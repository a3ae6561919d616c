//! Metrics of a real guest under a known load, as a real collector, a real Prometheus, the command line and the client see them.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use msb_tests::{Home, observers};
use serde_json::Value;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of one MiB.
const MIB: f64 = 1024.0 * 1024.0;

/// What the guest does, in MiB and seconds.
struct Load {
    written: u32,
    received: u32,
    busy: u32,
}

impl Load {
    /// A short one; with `MSB_TEST_LOAD=full` the one that the figures of the documentation are of.
    fn of_this_run() -> Self {
        if std::env::var("MSB_TEST_LOAD").is_ok_and(|load| load == "full") {
            Self { written: 1024, received: 64, busy: 30 }
        } else {
            Self { written: 64, received: 16, busy: 5 }
        }
    }

    fn written_bytes(&self) -> f64 {
        f64::from(self.written) * MIB
    }
}

/// Sends so many MiB to everybody who connects; gives its port.
fn generous_host(mib: u32) -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
    let port = listener.local_addr().expect("its address").port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let piece = vec![b'm'; 1 << 20];
            for _ in 0..mib {
                if stream.write_all(&piece).is_err() {
                    break;
                }
            }
        }
    });
    port
}

/// A program that ends with this value.
struct Program(Child);

impl Program {
    fn start(command: &mut Command) -> Self {
        let line = format!("{command:?}");
        Self(command.stdin(Stdio::null()).spawn().unwrap_or_else(|error| panic!("{line}: {error}")))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is() {
        assert!(begin.elapsed() < PATIENCE, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its address").port()
}

/// What came out at the end: data points as the official protobuf definitions decode them.
#[derive(Clone, Default)]
struct Points(Arc<Mutex<Vec<Value>>>);

impl Points {
    fn all(&self) -> Vec<Value> {
        self.0.lock().expect("points").clone()
    }

    /// The points of one metric of the sandbox, with this attribute if one is named, in their order in time.
    fn of(&self, name: &str, attribute: Option<(&str, &str)>) -> Vec<Value> {
        let mut found: Vec<Value> = self.all().into_iter().filter(|point| point["name"] == name).collect();
        found.retain(|point| attribute.is_none_or(|(key, value)| point["attributes"][key] == value));
        found.sort_by_key(|point| point["time"].as_u64());
        found
    }

    fn newest(&self, name: &str, attribute: Option<(&str, &str)>) -> f64 {
        let found = self.of(name, attribute);
        found.iter().rev().find_map(|point| point["value"].as_f64()).unwrap_or_default()
    }
}

/// `msb-metrics` → rotel → a sink that decodes with the protobuf package.
struct Pipeline {
    points: Points,
    _programs: Vec<Program>,
}

fn pipeline(home: &Home, observers: &Path, protocol: &str) -> Pipeline {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("collector/sink.py");
    let mut sink = Command::new("python3");
    sink.arg(script).env("PYTHONPATH", observers.join("python")).stdout(Stdio::piped());
    let mut sink = Program::start(&mut sink);
    let mut lines = BufReader::new(sink.0.stdout.take().expect("its output")).lines();
    let first = lines.next().expect("a line").expect("text");
    let port = serde_json::from_str::<Value>(&first).expect("JSON")["port"].as_u64().expect("a port");
    let points = Points::default();
    let taking = points.clone();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let point = serde_json::from_str(&line).expect("JSON of the sink");
            taking.0.lock().expect("points").push(point);
        }
    });
    let (grpc, http) = (free_port(), free_port());
    let mut rotel = Command::new(observers.join("python/rotel/rotel-agent"));
    rotel
        .arg("start")
        .args(["--otlp-grpc-endpoint", &format!("127.0.0.1:{grpc}")])
        .args(["--otlp-http-endpoint", &format!("127.0.0.1:{http}")])
        .args(["--exporter", "otlp", "--otlp-exporter-protocol", "http"])
        .args(["--otlp-exporter-endpoint", &format!("http://127.0.0.1:{port}")])
        .args(["--disable-batching"])
        .env_clear()
        .current_dir(home.scratch())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let rotel = Program::start(&mut rotel);
    let endpoint = match protocol {
        "grpc" => format!("http://127.0.0.1:{grpc}"),
        _ => format!("http://127.0.0.1:{http}/v1/metrics"),
    };
    // The protocol follows from the endpoint.
    let exporter =
        exporter(home, &["otel", "--endpoint", &endpoint, "--compression", "gzip", "--flush-interval", "1s"]);
    Pipeline { points, _programs: vec![exporter, rotel, sink] }
}

fn exporter(home: &Home, words: &[&str]) -> Program {
    let mut command = home.command("msb-metrics", words);
    Program::start(command.stdout(Stdio::null()).stderr(Stdio::null()))
}

/// Milliseconds that the threads of the machine's vCPUs ran, as the host's kernel tells it.
fn vcpu_ms(home: &Home) -> f64 {
    let machine = home
        .processes()
        .into_iter()
        .find(|process| process.program.starts_with("qemu-system"))
        .or_else(|| home.running("msb-vmm").into_iter().next())
        .expect("a machine");
    let tasks = std::fs::read_dir(format!("/proc/{}/task", machine.pid)).expect("its threads");
    let ticks: u64 = tasks
        .flatten()
        .filter(|task| {
            let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            name.starts_with("CPU ") || name.starts_with("vcpu-")
        })
        .map(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            let (_, fields) = stat.rsplit_once(')').expect("a name");
            fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().expect("ticks")).sum::<u64>()
        })
        .sum();
    (ticks * 10) as f64
}

#[track_caller]
fn close(what: &str, told: f64, truth: f64, slack: f64) {
    let off = (told - truth).abs();
    println!("{what}: told {told:.0}, it was {truth:.0}, {:.3} % off", off / truth.abs().max(1.0) * 100.0);
    assert!(off <= truth.abs() * 0.02 + slack, "{what}: told {told}, but it was {truth}");
}

/// One sandbox, one known load, every way to see it.
#[test]
fn a_known_load_is_told_truly_to_everybody() {
    let Some(observers) = observers() else {
        println!("skipped: no collector, because it could not be fetched");
        return;
    };
    let home = Home::with_busybox("metrics");
    home.succeeds(&["ls"]);
    // Before there is anything to tell, and with nothing to start.
    let pipelines = ["grpc", "http"].map(|protocol| pipeline(&home, &observers, protocol));
    let prometheus = Prometheus::start(&home, &observers);
    home.succeeds(&["create", "--name", "box", "-m", "256M", "--net", "host", "--label", "team=ml", "busybox"]);

    let load = Load::of_this_run();
    let shell = |line: &str| home.msb(["exec", "box", "--", "sh", "-c", line]).run();
    let before = home.json(&["metrics", "box"])[0].clone();
    let _ = shell(&format!("dd if=/dev/zero of=/root/data bs=1048576 count={} && sync", load.written)).succeeds();
    let port = generous_host(load.received);
    let _ = shell(&format!("nc 172.16.0.1 {port} </dev/null | wc -c"))
        .succeeds()
        .prints(&format!("{}\n", load.received << 20));
    let _ = shell("nc -w 30 10.1.2.3 443 </dev/null").exits(1);
    let busy = format!("end=$(($(date +%s)+{})); while [ $(date +%s) -lt $end ]; do :; done", load.busy);
    let _ = shell(&busy).succeeds();
    let truth_ms = vcpu_ms(&home);
    let counted = |line: &str| -> f64 { shell(line).succeeds().text().trim().parse().expect("a number") };
    // Data that went to disks. The count of the disk itself has what was only zeroed in it, of which nothing is moved.
    let disk_truth = counted("sed -n 's/^pgpgout //p' /proc/vmstat") * 1024.0;
    // What `ip -s link` prints.
    let card = |file: &str| counted(&format!("cat /sys/class/net/eth0/statistics/{file}"));
    let network = [
        ("net_rx_bytes", "microsandbox.network.io", "receive", card("rx_bytes")),
        ("net_tx_bytes", "microsandbox.network.io", "transmit", card("tx_bytes")),
        ("net_rx_packets", "microsandbox.network.packets", "receive", card("rx_packets")),
        ("net_tx_packets", "microsandbox.network.packets", "transmit", card("tx_packets")),
    ];
    std::thread::sleep(Duration::from_secs(3));

    // The command line.
    let now = home.json(&["metrics", "box"])[0].clone();
    let number = |value: &Value, key: &str| value[key].as_f64().unwrap_or_else(|| panic!("{key} of {value}"));
    let grown = number(&now, "disk_write_bytes") - number(&before, "disk_write_bytes");
    let written = load.written_bytes();
    assert!((written..written * 1.1).contains(&grown), "the load was {written}, {grown} were written");
    for (key, _, _, truth) in network {
        close(key, number(&now, key), truth, if key.ends_with("packets") { 8.0 } else { 2048.0 });
    }
    assert!(number(&now, "net_rx_bytes") > f64::from(load.received) * MIB, "{now}");
    close("disk against the guest's own count", number(&now, "disk_write_bytes"), disk_truth, 512.0 * 1024.0);
    close("cpu against /proc", number(&now, "cpu_time_secs") * 1000.0, truth_ms, 300.0);
    assert_eq!(now["labels"]["team"], "ml");
    assert_eq!(now["memory_limit_bytes"], 256 << 20);
    let text = home.succeeds(&["metrics", "--sort", "cpu"]);
    assert!(text.lines().count() == 2 && text.contains("box") && text.contains("256 MiB"), "{text}");
    home.fails(&["metrics", "nobody"], 1, "sandbox_not_found");

    // A real Prometheus and every query of the documentation.
    prometheus.holds(&now, written);

    // The real collector, over both protocols.
    for (Pipeline { points, .. }, protocol) in pipelines.iter().zip(["gRPC", "HTTP"]) {
        println!("a collector over {protocol}");
        let write = Some(("disk.io.direction", "write"));
        until("points at the collector", || {
            points.newest("microsandbox.disk.io", write) >= number(&before, "disk_write_bytes") + written
        });
        close("disk", points.newest("microsandbox.disk.io", write), disk_truth, 512.0 * 1024.0);
        close("cpu", points.newest("microsandbox.cpu.time", None) * 1000.0, truth_ms, 300.0);
        for (_, metric, direction, truth) in network {
            let told = points.newest(metric, Some(("network.io.direction", direction)));
            close(metric, told, truth, if metric.ends_with("packets") { 8.0 } else { 2048.0 });
        }
        assert!(points.newest("microsandbox.network.denied", Some(("network.transport", "tcp"))) >= 1.0);
        let outbound = Some(("network.connection.direction", "outbound"));
        assert!(points.newest("microsandbox.network.connections.opened", outbound) >= 1.0);
        let io = points.of("microsandbox.disk.io", write);
        assert!(io.iter().all(|point| point["monotonic"] == true && point["cumulative"] == true), "{:?}", io[0]);
        let starts: std::collections::BTreeSet<_> = io.iter().map(|point| point["start"].as_u64()).collect();
        assert_eq!(starts.len(), 1, "another start would be a reset");
        // Each sample once, with its own time, none merged: about one a second.
        let times: Vec<u64> = io.iter().filter_map(|point| point["time"].as_u64()).collect();
        let unique: std::collections::BTreeSet<_> = times.iter().collect();
        assert_eq!(unique.len(), times.len(), "a sample came twice");
        assert!(times.len() >= 6, "{} samples in more than ten seconds", times.len());
        let point = io.last().expect("a point");
        assert_eq!(point["resource"]["service.name"], "microsandbox");
        for key in ["host.id", "host.name", "service.instance.id"] {
            assert!(point["resource"][key].as_str().is_some_and(|text| !text.is_empty()), "{key}: {point}");
        }
        assert_eq!(point["attributes"]["sandbox.name"], "box");
        assert_eq!(point["attributes"]["team"], "ml");
        assert_eq!(
            point["attributes"]["org.opencontainers.image.title"], "busybox",
            "labels of the image flow through"
        );
        until("own metrics", || !points.of("microsandbox.collector.exports.success", None).is_empty());
    }

    // The end: a last point with the last counters, and no more.
    home.succeeds(&["stop", "box"]);
    for Pipeline { points, .. } in &pipelines {
        let stopped = || points.of("microsandbox.state", Some(("sandbox.state", "stopped")));
        until("the last point", || !stopped().is_empty());
        let count = points.of("microsandbox.uptime", None).len();
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(points.of("microsandbox.uptime", None).len(), count, "something came after the last point");
        let last = points.of("microsandbox.uptime", None).pop().expect("a point");
        assert_eq!((&last["flags"], &last["value"]), (&Value::from(1), &Value::Null), "the series is marked stale");
    }
    until("Prometheus forgets it", || prometheus.ask("microsandbox_uptime_seconds").is_empty());
    let all = home.json(&["metrics", "--all"]);
    assert_eq!((all[0]["last"].as_bool(), home.json(&["metrics"]).as_array().map(Vec::len)), (Some(true), Some(0)));
    drop((pipelines, prometheus));
    home.finish();
}

/// `msb-metrics prometheus` and Debian's Prometheus that scrapes it each second.
struct Prometheus {
    port: u16,
    _programs: Vec<Program>,
    _data: tempfile::TempDir,
}

impl Prometheus {
    fn start(home: &Home, observers: &Path) -> Self {
        let (scraped, port) = (free_port(), free_port());
        let exporter = exporter(home, &["prometheus", "--listen", &format!("127.0.0.1:{scraped}")]);
        let data = tempfile::tempdir().expect("a folder");
        let config = data.path().join("prometheus.yml");
        let documented = documents().join("observability/prometheus.yml");
        let text = std::fs::read_to_string(documented).expect("the documented configuration");
        let text = text.replace("127.0.0.1:9464", &format!("127.0.0.1:{scraped}")).replace("5s", "1s");
        std::fs::write(&config, text).expect("configuration");
        let mut program = Command::new(observers.join("debian/usr/bin/prometheus"));
        program
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", data.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let program = Program::start(&mut program);
        Self { port, _programs: vec![program, exporter], _data: data }
    }

    /// The values of a query, by the name of the sandbox.
    fn ask(&self, query: &str) -> Vec<(String, f64)> {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let mut answer = String::new();
        let asked = TcpStream::connect(("127.0.0.1", self.port)).and_then(|mut stream| {
            // HTTP/1.0: the answer ends with the connection.
            write!(stream, "GET /api/v1/query?query={encoded} HTTP/1.0\r\n\r\n")?;
            stream.read_to_string(&mut answer)
        });
        let body = asked.ok().and_then(|_| answer.split_once("\r\n\r\n")).map(|(_, body)| body);
        let Some(answer) = body.and_then(|body| serde_json::from_str::<Value>(body).ok()) else {
            return Vec::new();
        };
        let results = answer["data"]["result"].as_array().cloned().unwrap_or_default();
        results
            .iter()
            .map(|result| {
                let name = result["metric"]["sandbox_name"].as_str().unwrap_or_default().to_owned();
                (name, result["value"][1].as_str().and_then(|text| text.parse().ok()).unwrap_or(f64::NAN))
            })
            .collect()
    }

    /// It agrees with what the command line said, and every documented query has an answer.
    fn holds(&self, now: &Value, written: f64) {
        let series = "microsandbox_disk_io_bytes_total{disk_io_direction=\"write\",sandbox_name=\"box\",team=\"ml\"}";
        until("a scrape", || self.ask(series).first().is_some_and(|(_, value)| *value >= written));
        let told = self.ask(series)[0].1;
        close("disk at Prometheus", told, now["disk_write_bytes"].as_f64().expect("a number"), 512.0 * 1024.0);
        let limit = self.ask("microsandbox_memory_limit_bytes");
        assert_eq!(limit, [("box".to_owned(), f64::from(256u32 << 20))]);
        let queries = documented_queries();
        assert!(queries.len() >= 15, "{queries:?}");
        for query in queries {
            // Rates need two scrapes within their range.
            let mut values = Vec::new();
            until(&query, || {
                values = self.ask(&query);
                !values.is_empty()
            });
            assert!(values.iter().all(|(_, value)| value.is_finite() && *value >= 0.0), "{query}: {values:?}");
        }
        let busy = self.ask("max_over_time(microsandbox_cpu_utilization_ratio[10m])")[0].1;
        assert!(busy > 0.1, "a busy vCPU shows: {busy}");
        // The picture of the documentation, when somebody wants a new one.
        if let Ok(picture) = std::env::var("MSB_TEST_DASHBOARD") {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("collector/dashboard.py");
            let dashboard = documents().join("observability/dashboard.json");
            let mut draw = Command::new("python3");
            draw.arg(script).arg(dashboard).arg(format!("http://127.0.0.1:{}", self.port)).args(["90", &picture]);
            assert!(draw.status().expect("python3").success(), "the picture of the dashboard");
        }
    }
}

fn documents() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

/// The queries of the text and of the dashboard, with Grafana's variables filled in.
fn documented_queries() -> Vec<String> {
    let text = std::fs::read_to_string(documents().join("observability.md")).expect("the text");
    let mut queries = Vec::new();
    let mut lines = text.lines();
    while lines.by_ref().any(|line| line == "```promql") {
        queries.extend(lines.by_ref().take_while(|line| *line != "```").map(str::to_owned));
    }
    let dashboard = std::fs::read_to_string(documents().join("observability/dashboard.json")).expect("the dashboard");
    let dashboard: Value = serde_json::from_str(&dashboard).expect("JSON");
    for panel in dashboard["panels"].as_array().expect("panels") {
        for target in panel["targets"].as_array().expect("targets") {
            let query = target["expr"].as_str().expect("a query");
            queries.push(query.replace("$sandbox", ".*").replace("$__rate_interval", "10s"));
        }
    }
    queries
}

/// One line for each sample of each sandbox; the history has what the lines said; labels choose.
#[tokio::test]
async fn samples_are_followed_and_remembered() {
    use msb_sdk::protocol::control::{HistoryQuery, MetricsQuery};
    let home = Home::with_busybox("metrics_stream");
    home.succeeds(&["create", "--name", "a", "-m", "256M", "--label", "team=ml", "busybox"]);
    home.succeeds(&["create", "--name", "b", "-m", "256M", "busybox"]);
    let client = super::sdk::client(&home).await;
    let query = MetricsQuery { selectors: vec!["team in (ml,web)".into()], ..MetricsQuery::default() };
    let mut stream = client.metrics_stream(&query, Duration::from_millis(500)).await.expect("a stream");
    let mut seen: BTreeMap<u64, u64> = BTreeMap::new();
    while seen.len() < 4 {
        let snapshot = stream.next().await.expect("a line").expect("more");
        assert!(snapshot.sandboxes.iter().all(|sandbox| sandbox.name.as_str() == "a"));
        seen.extend(
            snapshot.sandboxes.iter().map(|sandbox| (sandbox.sample.at_ns / 1_000_000, sandbox.sample.cpu_time_us)),
        );
    }
    drop(stream);
    let name = "a".parse().expect("a name");
    let history = client.metrics_history(&name, &HistoryQuery::default()).await.expect("a history");
    for (at_ms, cpu_time_us) in seen {
        let point =
            history.points.iter().find(|point| point.at.as_millisecond() == i64::try_from(at_ms).expect("a time"));
        assert_eq!(point.map(|point| point.cpu_time_us), Some(cpu_time_us));
    }
    // The agent beats once it is there.
    assert!(history.points.last().and_then(|point| point.guest).is_some_and(|guest| guest.memory_used_bytes > 0));
    let thin = HistoryQuery { last_ms: None, points_max: Some(2) };
    let thin = client.metrics_history(&name, &thin).await.expect("a history");
    assert!(thin.points.len() <= 2);
    // A daemon that is started again goes on with the machines that ran meanwhile.
    let daemon = home.daemon();
    daemon.signal(rustix::process::Signal::TERM);
    until("the end of the daemon", || !daemon.is_alive());
    until("samples after the restart", || home.json(&["metrics"]).as_array().is_some_and(|rows| rows.len() == 2));
    home.finish();
}
