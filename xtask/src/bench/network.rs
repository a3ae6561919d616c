//! The figures of the network, beside QEMU's own user network (slirp) with the same kernel and the same programs
//! (`by_hand`): streams by iperf3, new connections, many at once, a published port over a link that is not loopback,
//! and memory.
//!
//! Packets go to loopback and over a pair of virtual Ethernet cards into a namespace that is made for it, and nowhere
//! else.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::by_hand::{ByHand, LOAD, load_program};
use super::{Row, Running, memory_mib, middle, succeed};
use crate::home::Home;
use crate::{cache, debian, images, program};

/// Where the guests find the host's loopback: our gateway, and slirp's.
const GATEWAYS: [&str; 2] = ["172.16.0.1", "10.0.2.2"];
/// Port of iperf3 in the guests.
const GUEST_PORT: u16 = 5201;
/// Seconds of one measurement of streams or connections.
const SECONDS: u32 = 4;
/// Threads that open connections.
const OPENERS: u32 = 8;
/// Connections of the long row, and its seconds.
const MANY: (u32, u32) = (256, 60);
/// Connections of the memory row, and the bytes that each has sent both ways, more than any of them has room for.
const HELD: (u32, usize) = (1_000, 128 << 10);
/// Idle sandboxes with and without a network that are compared.
const IDLE: usize = 5;
/// The host's and the namespace's address of the pair.
const PAIR: [&str; 2] = ["10.203.77.1", "10.203.77.2"];

/// Measures all rows.
pub(super) fn rows(tree: &Path, rounds: usize) -> Result<Vec<Row>> {
    debian::ensure(&[debian::IMAGES, debian::TRAFFIC, debian::NAMESPACES])?;
    let work = tempfile::Builder::new().prefix("bench-network-").tempdir_in(cache::target())?;
    let scene = Scene::new(tree)?;
    let mut rows = scene.pairs(tree, work.path(), rounds)?;
    rows.push(scene.over_a_link(rounds)?);
    rows.push(scene.many_at_once()?);
    rows.extend(scene.memory()?);
    Ok(rows)
}

/// A sandbox `box` with a port published on loopback and on the pair of cards.
struct Scene {
    home: Home,
    namespace: Namespace,
    /// Where the guest's iperf3 is reached: over loopback, and over the pair.
    published: [String; 2],
}

impl Scene {
    fn new(tree: &Path) -> Result<Self> {
        let namespace = Namespace::new()?;
        let home = Home::new("bench-network", tree)?;
        for (folder, archive) in [(images::tools()?, "tools.tar"), (images::small()?, "busybox.tar")] {
            succeed(&mut home.msb(&["image", "load", "-q", "-i", &folder.join(archive).to_string_lossy()]))?;
        }
        let ports = ["127.0.0.1", PAIR[0]].map(|address| format!("{address}:0:{GUEST_PORT}"));
        let words = [
            "create", "--name", "box", "-m", "1G", "-c", "1", "--net", "host", "-p", &ports[0], "-p", &ports[1],
            "tools",
        ];
        succeed(&mut home.msb(&words))?;
        succeed(&mut home.msb(&["cp", "-q", &load_program()?.to_string_lossy(), &format!("box:{LOAD}")]))?;
        succeed(&mut home.msb(&["exec", "box", "--", "iperf3", "-s", "-D"]))?;
        let text = program::output(&mut home.msb(&["inspect", "--format", "json", "box"]))?;
        let inspected: serde_json::Value = serde_json::from_str(&text)?;
        let port = |index: usize| -> Result<String> {
            let shown = inspected["ports"][index].as_str().with_context(|| format!("no port {index}: {text}"))?;
            Ok(shown.split(':').nth(1).context("a port without its number")?.to_owned())
        };
        let published = [port(0)?, port(1)?];
        Ok(Self { home, namespace, published })
    }

    fn shell(&self, line: &str) -> Result<String> {
        program::output(&mut self.home.msb(&["exec", "box", "--", "sh", "-c", line]))
    }

    /// Everything that slirp can do, too.
    fn pairs(&self, tree: &Path, work: &Path, rounds: usize) -> Result<Vec<Row>> {
        let port = free_port()?;
        let netdev = format!("user,id=net,hostfwd=tcp:127.0.0.1:{port}-:{GUEST_PORT}");
        let words = ["-netdev", &netdev, "-device", "virtio-net-device,netdev=net"].map(str::to_owned);
        let mut peer = ByHand::start(tree, work, false, &words)?;
        peer.shell("ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0 && ip route add default via 10.0.2.2")?;
        peer.shell("iperf3 -s -D")?;
        let ends = [self.published[0].clone(), port.to_string()];
        let mut rows = Vec::new();
        for streams in [1, 8] {
            let mut out = [Vec::new(), Vec::new()];
            let mut into = [Vec::new(), Vec::new()];
            for _ in 0..rounds {
                out[0].push(guest_to_host(GATEWAYS[0], streams, |line| self.shell(line))?);
                out[1].push(guest_to_host(GATEWAYS[1], streams, |line| peer.shell(line))?);
                for (port, into) in ends.iter().zip(&mut into) {
                    into.push(host_to_guest(Command::new("iperf3"), "127.0.0.1", port, streams)?);
                }
            }
            let many = if streams == 1 { "stream" } else { "streams" };
            rows.push(faster(format!("guest to host TCP, {streams} {many}; slirp"), "MiB/s", out, 1.5));
            rows.push(faster(format!("host to guest, published port, {streams} {many}; slirp"), "MiB/s", into, 1.5));
        }
        let server = answering()?;
        let mut rates = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            let line = |gateway: &str| format!("{LOAD} connect {gateway}:{server} {SECONDS} {OPENERS}");
            rates[0].push(rate(&self.shell(&line(GATEWAYS[0]))?)?);
            rates[1].push(rate(&peer.shell(&line(GATEWAYS[1]))?)?);
        }
        rows.push(faster("new connections through policy; slirp".to_owned(), "a second", rates, 2.0));
        Ok(rows)
    }

    /// A published port from a namespace, beside the same over loopback.
    fn over_a_link(&self, rounds: usize) -> Result<Row> {
        let mut rates = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            rates[0].push(host_to_guest(self.namespace.command("iperf3"), PAIR[0], &self.published[1], 1)?);
            rates[1].push(host_to_guest(Command::new("iperf3"), "127.0.0.1", &self.published[0], 1)?);
        }
        Ok(faster("published port over a virtual Ethernet; over loopback".to_owned(), "MiB/s", rates, 0.8))
    }

    fn many_at_once(&self) -> Result<Row> {
        let port = echoing()?;
        let (connections, seconds) = MANY;
        let text = self.shell(&format!("{LOAD} echo {}:{port} {connections} {seconds}", GATEWAYS[0]))?;
        let numbers: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [lost, longest_ms, trips] = numbers[..] else { bail!("three numbers were expected: {text}") };
        Ok(Row {
            what: format!("{connections} connections at once for {seconds} s, {trips} messages there and back"),
            measured: format!("{lost} lost; longest wait {longest_ms} ms"),
            promise: "none lost, none over 1 s",
            holds: lost == 0 && longest_ms <= 1_000,
        }
        .told())
    }

    fn memory(&self) -> Result<Vec<Row>> {
        let mut sizes = [Vec::new(), Vec::new()];
        for (extra, sizes) in [&["--net", "public"][..], &["--no-net"]].into_iter().zip(&mut sizes) {
            for number in 0..IDLE {
                let before = self.home.running("msb-vmm");
                let name = format!("idle{}{number}", extra.len());
                let words = [&["create", "-q", "-m", "128M", "--name", &name][..], extra, &["busybox"]].concat();
                succeed(&mut self.home.msb(&words))?;
                let started = self.home.running("msb-vmm").into_iter().find(|pid| !before.contains(pid));
                std::thread::sleep(Duration::from_secs(2));
                // Not what it maps of the guest's memory, which is a file.
                sizes.push(memory_mib(started.context("no machine was started")?, &["Anonymous:"])?);
                succeed(&mut self.home.msb(&["rm", "-f", &name]))?;
            }
        }
        let [with, without] = sizes.map(middle);
        let share = with - without;
        let machine = *self.home.running("msb-vmm").first().context("the machine does not run")?;
        let idle = memory_mib(machine, &["Anonymous:"])?;
        let (connections, bytes) = HELD;
        let port = silent(bytes)?;
        let line = format!("{LOAD} hold {}:{port} {connections} {bytes}", GATEWAYS[0]);
        let mut hold = self.home.msb(&["exec", "box", "--", "sh", "-c", &line]);
        let mut hold = Running(hold.stdout(Stdio::piped()).spawn()?);
        let mut held = String::new();
        BufReader::new(hold.0.stdout.take().context("no output")?).read_line(&mut held)?;
        if held.trim() != connections.to_string() {
            bail!("{held} connections are held");
        }
        std::thread::sleep(Duration::from_secs(3));
        let full = memory_mib(machine, &["Anonymous:"])?;
        Ok(vec![
            Row {
                what: format!("network's memory in an idle sandbox (with {with:.2} MiB, without {without:.2} MiB)"),
                measured: format!("{share:.2} MiB"),
                promise: "under 1 MiB",
                holds: share < 1.0,
            },
            Row {
                what: format!("memory for {connections} connections with {} KiB both ways", bytes >> 10),
                measured: format!("{:.1} MiB ({idle:.1} before)", full - idle),
                promise: "under 64 MiB",
                holds: full - idle < 64.0,
            },
        ])
    }
}

/// A row of rates: ours, the other, and how often it must be that.
fn faster(what: String, unit: &str, rates: [Vec<f64>; 2], times: f64) -> Row {
    let [ours, other] = rates.map(middle);
    let ratio = ours / other;
    Row {
        what,
        measured: format!("{ours:.0}; {other:.0} {unit}; {ratio:.2} times"),
        promise: if times >= 2.0 {
            "2 times"
        } else if times > 1.0 {
            "1.5 times"
        } else {
            "at least 0.8 times"
        },
        holds: ratio >= times,
    }
    .told()
}

/// Mebibytes a second that arrived, from iperf3's report.
fn received(report: &str) -> Result<f64> {
    let report: serde_json::Value = serde_json::from_str(report)?;
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(rate.filter(|rate| *rate > 0.0).with_context(|| format!("iperf3: {}", report["error"]))? / f64::from(8 << 20))
}

/// iperf3's server here, its client in a guest that runs a line of a shell.
fn guest_to_host(gateway: &str, streams: u32, shell: impl FnOnce(&str) -> Result<String>) -> Result<f64> {
    let port = free_port()?;
    let mut server = Command::new("iperf3");
    server.args(["-s", "-1", "-J", "-B", "127.0.0.1", "-p", &port.to_string()]);
    let mut server = Running(server.stdout(Stdio::piped()).spawn().context("iperf3")?);
    // Looked up and not tried: it serves one client, and a try would be one.
    let listening = format!("0100007F:{port:04X} 00000000:0000 0A");
    let began = Instant::now();
    while !std::fs::read_to_string("/proc/net/tcp")?.contains(&listening) {
        if began.elapsed() > Duration::from_secs(20) {
            bail!("iperf3 does not listen");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    shell(&format!("iperf3 -c {gateway} -p {port} -t {SECONDS} -P {streams} >/dev/null"))?;
    let mut report = String::new();
    server.0.stdout.take().context("no output")?.read_to_string(&mut report)?;
    received(&report)
}

/// iperf3's client, its server in the guest.
fn host_to_guest(mut client: Command, address: &str, port: &str, streams: u32) -> Result<f64> {
    client.args(["-c", address, "-p", port, "-J", "-t", &SECONDS.to_string(), "-P", &streams.to_string()]);
    received(&program::output(&mut client)?)
}

/// Connections a second, from what the load program printed.
fn rate(text: &str) -> Result<f64> {
    let (made, took) = text.trim().split_once(' ').with_context(|| format!("two numbers were expected: {text}"))?;
    Ok(made.parse::<f64>()? * 1e9 / took.parse::<f64>()?)
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Serves connections of a listener with so many threads for the rest of this process; gives its port.
fn serving(threads: usize, serve: impl Fn(TcpStream) + Clone + Send + 'static) -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    for _ in 0..threads {
        let (listener, serve) = (listener.try_clone()?, serve.clone());
        std::thread::spawn(move || listener.incoming().flatten().for_each(serve));
    }
    Ok(port)
}

/// Answers a byte and ends.
fn answering() -> Result<u16> {
    serving(8, |mut stream| {
        let mut byte = [0];
        if stream.read_exact(&mut byte).is_ok() {
            let _ = stream.write_all(&byte);
        }
    })
}

/// Sends back what comes.
fn echoing() -> Result<u16> {
    serving(1, |mut stream| {
        std::thread::spawn(move || {
            let _ = stream.set_nodelay(true);
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..count]).is_err() {
                    return;
                }
            }
        });
    })
}

/// Sends so many bytes, as far as there is room, reads nothing and stays.
fn silent(bytes: usize) -> Result<u16> {
    serving(1, move |mut stream| {
        let message = vec![2; bytes];
        if stream.set_nonblocking(true).is_ok() {
            let _ = stream.write(&message);
        }
        // It is open for as long as this process is.
        std::mem::forget(stream);
    })
}

/// A network namespace with one end of a pair of cards, until it is dropped.
struct Namespace {
    name: String,
}

impl Namespace {
    fn new() -> Result<Self> {
        let id = std::process::id();
        let namespace = Self { name: format!("msb-bench-{id}") };
        let [here, there] = [format!("msbb{id}"), format!("msbp{id}")];
        let name = &namespace.name;
        let lines = [
            format!("netns add {name}"),
            format!("link add {here} type veth peer name {there} netns {name}"),
            format!("addr add {}/30 dev {here}", PAIR[0]),
            format!("link set {here} up"),
            format!("-n {name} addr add {}/30 dev {there}", PAIR[1]),
            format!("-n {name} link set {there} up"),
            format!("-n {name} link set lo up"),
        ];
        for line in lines {
            program::output(program::command_as_root("ip")?.args(line.split(' ')))?;
        }
        Ok(namespace)
    }

    /// A program in it.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The pair goes with it.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_and_rates_are_read() {
        let report = r#"{"end": {"sum_received": {"bits_per_second": 16777216.0}}}"#;
        assert!((received(report).unwrap() - 2.0).abs() < 1e-9);
        assert!(received(r#"{"error": "refused"}"#).unwrap_err().to_string().contains("refused"));
        assert!((rate("30 2000000000\n").unwrap() - 15.0).abs() < 1e-9);
    }
}
