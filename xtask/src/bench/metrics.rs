//! The figures of metrics: a real msbd with a thousand sandboxes whose machines are [`xtask-machine`](../../machine/main.rs), and a real
//! `msb-metrics` before a backend that is away at first.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{Row, Running, images::peak_mib, processor_time, succeed, timed};
use crate::home::Home;
use crate::{binaries, cache, images};

/// Simulated sandboxes.
const SANDBOXES: usize = 1_000;
/// How long processor time is counted.
const WATCHED: Duration = Duration::from_secs(60);
/// Collections that the default buffer holds, and some seconds more.
const BUFFER_FULL: Duration = Duration::from_secs(70);

/// Measures all rows.
pub(super) fn rows(tree: &Path) -> Result<Vec<Row>> {
    let work = tempfile::Builder::new().prefix("bench-metrics-").tempdir_in(cache::target())?;
    let tree = tree_with_machines(tree, work.path())?;
    let home = Home::new("bench-fleet", &tree)?;
    // First without samples (a machine here sends none at this interval): what a daemon with so many sandboxes takes anyway.
    let settings = home.path().join("config.toml");
    std::fs::write(&settings, "[metrics]\nsample_interval = \"10s\"\n")?;
    let archive = images::small()?.join("busybox.tar");
    succeed(&mut home.msb(&["image", "load", "-q", "-i", &archive.to_string_lossy()]))?;
    for number in 0..SANDBOXES {
        if number % 50 == 0 {
            print!("\rstarting simulated sandbox {number} of {SANDBOXES}");
            std::io::stdout().flush()?;
        }
        let (name, label) = (format!("s{number}"), format!("job=job-{number}"));
        let words = ["create", "-q", "-m", "64M", "--name", &name, "--label", &label, "--label", "team=ml", "busybox"];
        succeed(&mut home.msb(&words))?;
    }
    println!();
    let daemon = |home: &Home| home.running("msbd").first().copied().context("the daemon does not run");
    let without = share(&[daemon(&home)?])?[0];
    std::fs::write(&settings, "[metrics]\nsample_interval = \"1s\"\n")?;
    let old = daemon(&home)?;
    succeed(Command::new("kill").arg(old.to_string()))?;
    until("the end of the daemon", || Ok(!home.running("msbd").contains(&old)))?;
    until("samples of all sandboxes", || {
        let mut ask = home.msb(&["metrics", "--format", "json"]);
        let rows: serde_json::Value = serde_json::from_slice(&ask.output()?.stdout).unwrap_or_default();
        Ok(rows.as_array().is_some_and(|rows| rows.len() == SANDBOXES))
    })?;
    let asked = timed(&mut home.msb(&["metrics"]), Some(0))?;

    let sink = Sink::new()?;
    let exporter = Exporter::start(&home, &sink.url)?;
    std::thread::sleep(BUFFER_FULL);
    let full = peak_mib(exporter.pid()?)?;
    sink.listen()?;
    until("the buffer to be sent", || Ok(sink.requests.load(Ordering::Relaxed) > 60))?;
    std::thread::sleep(Duration::from_secs(15));
    let shares = share(&[daemon(&home)?, exporter.pid()?])?;
    let (with, exporting) = (shares[0], shares[1]);
    println!(
        "msbd with {SANDBOXES} sandboxes: {:.2} % of a core without samples, {:.2} % with samples and msb-metrics; {} requests of {} MiB came",
        without * 100.0,
        with * 100.0,
        sink.requests.load(Ordering::Relaxed),
        sink.bytes.load(Ordering::Relaxed) >> 20
    );
    let percent = |share: f64| format!("{:.2} % of a core", share * 100.0);
    let own = (with - without).max(0.0);
    Ok(vec![
        Row {
            what: format!("msb-metrics with {SANDBOXES} sandboxes at 1 s: processor"),
            measured: percent(exporting),
            promise: "under 2 % of a core",
            holds: exporting < 0.02,
        },
        Row {
            what: "msb-metrics with the default buffer full: memory at most".to_owned(),
            measured: format!("{full:.1} MiB"),
            promise: "under 32 MiB",
            holds: full < 32.0,
        },
        Row {
            what: format!("msbd with {SANDBOXES} sandboxes: what samples and msb-metrics add"),
            measured: percent(own),
            promise: "under 1 % of a core",
            holds: own < 0.01,
        },
        Row {
            what: format!("msb metrics for {SANDBOXES} sandboxes, one request"),
            measured: format!("{} ms", asked.as_millis()),
            promise: "under 1 s",
            holds: asked < Duration::from_secs(1),
        },
    ])
}

/// The tree of the programs, with machines that run nothing.
pub(super) fn tree_with_machines(tree: &Path, work: &Path) -> Result<PathBuf> {
    let mut build = binaries::cargo();
    build.args([
        "build",
        "--release",
        "--locked",
        "--package",
        "xtask",
        "--features",
        "machine",
        "--bin",
        "xtask-machine",
    ]);
    crate::program::run(&mut build)?;
    let (copy, share) = (work.join("tree"), work.join("tree/share"));
    std::fs::create_dir_all(copy.join("bin"))?;
    for program in ["msb", "msbd", "msb-metrics"] {
        std::fs::copy(tree.join("bin").join(program), copy.join("bin").join(program))?;
    }
    std::fs::copy(cache::target().join("release/xtask-machine"), copy.join("bin/msb-vmm"))?;
    std::os::unix::fs::symlink(tree.join("share"), share)?;
    Ok(copy)
}

fn until(what: &str, mut is: impl FnMut() -> Result<bool>) -> Result<()> {
    let began = Instant::now();
    while !is()? {
        if began.elapsed() > Duration::from_secs(180) {
            bail!("waited in vain for {what}");
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}

/// The share of a core that each process takes.
pub(super) fn share(processes: &[i32]) -> Result<Vec<f64>> {
    let times = || processes.iter().map(|pid| processor_time(*pid)).collect::<Result<Vec<_>>>();
    std::thread::sleep(Duration::from_secs(5));
    let before = times()?;
    std::thread::sleep(WATCHED);
    let shares = times()?.into_iter().zip(before).map(|(now, before)| (now - before).as_secs_f64());
    Ok(shares.map(|seconds| seconds / WATCHED.as_secs_f64()).collect())
}

/// `msb-metrics otel`, until it is dropped.
struct Exporter(Running);

impl Exporter {
    fn start(home: &Home, url: &str) -> Result<Self> {
        let mut command = home.command("msb-metrics");
        command.args(["otel", "--endpoint", url]).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(Running(command.spawn().context("msb-metrics")?)))
    }

    fn pid(&self) -> Result<i32> {
        Ok(i32::try_from(self.0.0.id())?)
    }
}

/// A backend that takes everything and looks at nothing.
struct Sink {
    address: std::net::SocketAddr,
    url: String,
    requests: Arc<AtomicU64>,
    bytes: Arc<AtomicU64>,
}

impl Sink {
    /// Its address; nobody listens there yet.
    fn new() -> Result<Self> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        Ok(Self {
            address,
            url: format!("http://{address}/v1/metrics"),
            requests: Arc::default(),
            bytes: Arc::default(),
        })
    }

    fn listen(&self) -> Result<()> {
        let listener = TcpListener::bind(self.address)?;
        let (requests, bytes) = (Arc::clone(&self.requests), Arc::clone(&self.bytes));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (requests, bytes) = (Arc::clone(&requests), Arc::clone(&bytes));
                // A connection that ends is one that ends.
                std::thread::spawn(move || drop(take(stream, &requests, &bytes)));
            }
        });
        Ok(())
    }
}

fn take(stream: TcpStream, requests: &AtomicU64, bytes: &AtomicU64) -> Result<()> {
    let mut answers = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if let Some((_, value)) = line.split_once(':').filter(|(key, _)| key.eq_ignore_ascii_case("content-length"))
            {
                length = value.trim().parse()?;
            }
            if line.trim().is_empty() {
                break;
            }
        }
        std::io::copy(&mut (&mut reader).take(length), &mut std::io::sink())?;
        requests.fetch_add(1, Ordering::Relaxed);
        bytes.fetch_add(length, Ordering::Relaxed);
        answers.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n")?;
    }
}
