//! What the SDKs cost and what they keep: `cargo xtask bench --sdks` compares them with the raw API and with `msb run`, `cargo xtask leaks`
//! runs thousands of commands through one client of each. Both drive the programs of the conformance suite.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::suite::{Driver, POOL_SLACK};
use super::{Built, Sdk, suite};
use crate::home::Home;
use crate::{binaries, program};

/// Commands of one measurement of the round trip.
const ROUND_LEN: u32 = 50;
/// Commands between two looks at a client.
const LOOK_EACH: u64 = 1_000;
/// Most that a client may keep for a command that is over, in bytes. A forgotten object of any language is larger than its share of the
/// noise of allocators and collectors.
const KEPT_LEN_MAX: f64 = 512.0;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Commands through each client
    #[arg(long, default_value_t = 10_000)]
    execs: u64,
    /// Only the SDKs whose name contains this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    #[command(flatten)]
    build: binaries::Arguments,
}

/// Runs thousands of commands through one client of each SDK; fails if one keeps descriptors or memory.
pub(crate) fn leaks(arguments: &Arguments) -> Result<()> {
    let built = Built::ensure(arguments.build, arguments.filter.as_deref())?;
    println!(
        "{:<12} {:>8} {:>12} {:>16} {:>12} {:>16}",
        "client", "commands", "descriptors", "memory, KiB", "of msbd", "memory, KiB"
    );
    // Side by side, each with a service and a sandbox of its own: most of the time is the guest's.
    let failed: Vec<_> = std::thread::scope(|scope| {
        let clients: Vec<_> =
            built.sdks.iter().map(|sdk| (sdk.name, scope.spawn(|| leaks_of(sdk, &built, arguments.execs)))).collect();
        let failed = clients.into_iter().filter_map(|(name, client)| {
            let outcome = client.join().unwrap_or_else(|_| bail!("it panicked"));
            outcome.inspect_err(|error| println!("{name:<12} FAILED: {error:#}")).is_err().then_some(name)
        });
        failed.collect()
    });
    if failed.is_empty() { Ok(()) } else { bail!("a client keeps what it should not: {}", failed.join(", ")) }
}

/// A client and the service, as they are at one moment.
struct Look {
    descriptors: usize,
    memory_kib: u64,
    service_descriptors: usize,
    service_memory_kib: u64,
}

fn leaks_of(sdk: &Sdk, built: &Built, execs: u64) -> Result<()> {
    let home = &Home::new(&format!("leaks-{}", sdk.name), &built.tree)?;
    load(home, &built.archives)?;
    let name = format!("{}-leaks", sdk.name);
    let mut driver = Driver::start(suite::service(sdk, home, &built.tree, &built.archives))?;
    ask(&mut driver, "create", json!({ "name": name, "image": "busybox", "memory_mib": 256, "ephemeral": true }))?;
    let service = *home.running("msbd").first().context("the service does not run")?;
    let began = Instant::now();
    let mut first: Option<Look> = None;
    let mut done = 0;
    while done < execs {
        let count = LOOK_EACH.min(execs - done);
        let good = ask(&mut driver, "exec_many", json!({ "name": name, "count": count }))?;
        if good != count {
            bail!("of {count} commands {good} ended well");
        }
        done += count;
        // Collectors run when they like; what is left after they were asked to is kept.
        ask(&mut driver, "settle", json!({}))?;
        let pid = i32::try_from(driver.child.id())?;
        let look = Look {
            descriptors: descriptors(pid)?,
            memory_kib: memory_kib(pid)?,
            service_descriptors: descriptors(service)?,
            service_memory_kib: memory_kib(service)?,
        };
        println!(
            "{:<12} {done:>8} {:>12} {:>16} {:>12} {:>16}",
            sdk.name, look.descriptors, look.memory_kib, look.service_descriptors, look.service_memory_kib
        );
        let Some(first) = &first else {
            first = Some(look);
            continue;
        };
        if look.descriptors > first.descriptors + POOL_SLACK
            || look.service_descriptors > first.service_descriptors + POOL_SLACK
        {
            bail!("descriptors pile up");
        }
        if done == execs {
            let grown = (look.memory_kib as f64 - first.memory_kib as f64) * 1024.0 / (done - LOOK_EACH) as f64;
            let each_ms = began.elapsed().as_secs_f64() * 1000.0 / done as f64;
            println!("{:<12} {grown:.0} bytes of memory and {each_ms:.1} ms a command", sdk.name);
            if grown > KEPT_LEN_MAX {
                bail!("{grown:.0} bytes are kept for each command");
            }
        }
    }
    Ok(())
}

fn ask(driver: &mut Driver, call: &str, args: Value) -> Result<Value> {
    let mut answer = driver.call(&json!({ "call": call, "args": args }))?;
    match answer.get_mut("ok") {
        Some(value) => Ok(value.take()),
        None => bail!("{call}: {answer}"),
    }
}

fn descriptors(pid: i32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// Memory of its own that a process has, without files it maps (proc(5): `RssAnon`).
fn memory_kib(pid: i32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("an odd status file")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}

fn load(home: &Home, archives: &Path) -> Result<()> {
    let archive = archives.join("busybox.tar");
    program::output(&mut home.msb(&["image", "load", "-q", "-i", &archive.to_string_lossy()])).map(drop)
}

/// A figure of an SDK beside what it is measured against.
pub(crate) struct Pair {
    pub(crate) what: String,
    pub(crate) ours: Duration,
    pub(crate) other: Duration,
    pub(crate) ratio_max: f64,
}

/// Round trips of a command through each SDK and the raw API, and the way from creation to the first byte, each in turn, medians.
pub(crate) fn pairs(build: binaries::Arguments, rounds: usize) -> Result<Vec<Pair>> {
    let built = Built::ensure(build, None)?;
    let home = Home::new("bench-sdks", &built.tree)?;
    load(&home, &built.archives)?;
    program::output(&mut home.msb(&["create", "-m", "256M", "--name", "box", "busybox"]))?;
    let socket = home.socket()?;
    let mut drivers = Vec::new();
    for sdk in &built.sdks {
        let mut driver = Driver::start(suite::service(sdk, &home, &built.tree, &built.archives))?;
        // What is compiled and connected at first use is not measured.
        ask(&mut driver, "exec_many", json!({ "name": "box", "count": 5 }))?;
        drivers.push((sdk.name, driver, Vec::new(), Vec::new()));
    }
    let (mut raw, mut run) = (Vec::new(), Vec::new());
    for _ in 0..rounds.max(1) {
        let began = Instant::now();
        for _ in 0..ROUND_LEN {
            raw_exec(&socket, "box")?;
        }
        raw.push(began.elapsed() / ROUND_LEN);
        for (_, driver, trips, _) in &mut drivers {
            let began = Instant::now();
            ask(driver, "exec_many", json!({ "name": "box", "count": ROUND_LEN }))?;
            trips.push(began.elapsed() / ROUND_LEN);
        }
    }
    program::output(&mut home.msb(&["rm", "--force", "box"]))?;
    for _ in 0..rounds.max(1) {
        run.push(first_byte_of_run(&home)?);
        for (_, driver, _, firsts) in &mut drivers {
            let took = ask(driver, "first_byte", json!({ "image": "busybox" }))?;
            firsts.push(Duration::from_secs_f64(took.as_f64().context("milliseconds")? / 1000.0));
        }
    }
    let (raw, run) = (median(raw), median(run));
    let mut pairs = Vec::new();
    for (name, _, trips, firsts) in drivers {
        let what = format!("exec round trip, {name}; the raw API");
        pairs.push(Pair { what, ours: median(trips), other: raw, ratio_max: 1.5 });
        let what = format!("create to first byte of exec, {name}; msb run");
        pairs.push(Pair { what, ours: median(firsts), other: run, ratio_max: 1.05 });
    }
    pairs.sort_by_key(|pair| pair.ratio_max < 1.5);
    Ok(pairs)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// From the start of `msb run busybox -- echo x` to the first byte it prints.
fn first_byte_of_run(home: &Home) -> Result<Duration> {
    let began = Instant::now();
    let mut child =
        home.msb(&["run", "busybox", "--", "echo", "x"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut byte = [0];
    child.stdout.take().context("its stdout is a pipe")?.read_exact(&mut byte)?;
    let took = began.elapsed();
    child.wait()?;
    Ok(took)
}

/// One command over the API with nothing in between: a connection, an upgrade, a message, and frames until the end.
fn raw_exec(socket: &Path, name: &str) -> Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    let key = "AAAAAAAAAAAAAAAAAAAAAA==";
    write!(
        stream,
        "GET /v1/sandboxes/{name}/exec HTTP/1.1\r\nhost: msbd\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: {key}\r\n\r\n"
    )?;
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    if !head.starts_with(b"HTTP/1.1 101") {
        bail!("no WebSocket: {}", String::from_utf8_lossy(&head));
    }
    let message = json!({ "type": "exec", "exec": { "command": ["true"] } }).to_string();
    // A mask of zeroes changes nothing; a client must have one.
    let mut frame = vec![0x81, 0x80 | u8::try_from(message.len())?, 0, 0, 0, 0];
    frame.extend_from_slice(message.as_bytes());
    stream.write_all(&frame)?;
    loop {
        let mut start = [0; 2];
        stream.read_exact(&mut start)?;
        let len = match start[1] {
            126 => {
                let mut wide = [0; 2];
                stream.read_exact(&mut wide)?;
                usize::from(u16::from_be_bytes(wide))
            }
            len => usize::from(len),
        };
        let mut data = vec![0; len];
        stream.read_exact(&mut data)?;
        if start[0] == 0x81 {
            let message: Value = serde_json::from_slice(&data)?;
            match message["type"].as_str() {
                Some("exited") if message["end"]["code"] == 0 => return Ok(()),
                Some("exited" | "error") => bail!("the command ended badly: {message}"),
                _ => {}
            }
        }
    }
}
