//! `xtask-machine`: stands where `msb-vmm` stands and runs no machine. For `cargo xtask bench`, which lets a real msbd have a thousand.
//!
//! It takes the launch on its standard input, says that the agent is ready, answers the agent's control stream with a beat each second and
//! sends a sample at each interval, as a sandbox does that works a little. It does nothing else: no exec, no disks, no network.
#![expect(clippy::exit, reason = "a machine that is killed is gone at once")]

use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use msb_protocol::frame::{Decoder, SPEC_LEN_MAX, decode_json, encode_json};
use msb_protocol::guest::{Assembler, Beat, GuestBody, HostBody, Opened, encode_guest};
use msb_protocol::id::BootId;
use msb_protocol::spec::EngineChoice;
use msb_protocol::version::{GUEST_GENERATION, VMM_GENERATION};
use msb_protocol::vmm::{
    CONTROL_SOCKET, Event, JailReport, Message, NetworkCount, NetworkCounts, Phase, Reply, Request, RequestFrame,
    Sample, SampleEncoder, VSOCK_SOCKET, VmSpec, VmState, VmStatus,
};
use rustix::event::{PollFd, PollFlags, poll};

/// The longest interval of the settings. Here it means never, so that the bench can tell what samples cost.
const NEVER_MS: u64 = 10_000;
/// Time between two beats.
const BEAT: Duration = Duration::from_secs(1);

fn main() -> Result<()> {
    let control = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let link = Link(Arc::new(Mutex::new(control.try_clone()?)));
    let mut requests = Requests { control, decoder: Decoder::with_limit(SPEC_LEN_MAX) };
    let first = requests.next()?;
    let Request::Launch { spec } = first.request else { bail!("the first request is no launch") };
    link.reply(first.id, Reply::Status(Box::new(status(&spec, VmState::Booting))))?;
    let adopters = UnixListener::bind(spec.run_dir.join(CONTROL_SOCKET)).context("the control socket")?;
    let listener = UnixListener::bind(spec.run_dir.join(VSOCK_SOCKET)).context("the vsock socket")?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A stream that breaks is opened again by the daemon.
            std::thread::spawn(move || drop(agent(stream)));
        }
    });
    let phases = ["spawn", "kernel_load", "kernel", "init", "agent", "ready"];
    let phases = phases.map(|name| Phase { name: name.into(), duration_us: 1_000 }).to_vec();
    link.event(Event::AgentReady { boot_id: spec.boot_id, phases })?;
    let spec = Arc::new(*spec);
    // Whoever comes later: the same daemon for its samples, and each of its successors.
    let later = Arc::clone(&spec);
    std::thread::spawn(move || {
        for control in adopters.incoming().flatten() {
            let spec = Arc::clone(&later);
            std::thread::spawn(move || -> Result<()> {
                let link = Link(Arc::new(Mutex::new(control.try_clone()?)));
                serve(&mut Requests { control, decoder: Decoder::new() }, &link, &spec)
            });
        }
    });
    // Until the daemon is gone. The machine stays.
    let _ = serve(&mut requests, &link, &spec);
    loop {
        std::thread::park();
    }
}

/// Answers one daemon.
fn serve(requests: &mut Requests, link: &Link, spec: &VmSpec) -> Result<()> {
    loop {
        let RequestFrame { id, request } = requests.next()?;
        match request {
            Request::Status | Request::Adopt { .. } => {
                link.reply(id, Reply::Status(Box::new(status(spec, VmState::Ready))))?
            }
            Request::Subscribe { sample_interval_ms, compact } => {
                link.reply(id, Reply::Done)?;
                if sample_interval_ms < NEVER_MS {
                    let (link, boot_id, memory_bytes) = (link.clone(), spec.boot_id, u64::from(spec.memory_mib) << 20);
                    let encoder = compact.then(SampleEncoder::default);
                    std::thread::spawn(move || sample(&link, encoder, sample_interval_ms, boot_id, memory_bytes));
                }
            }
            Request::Kill { .. } => std::process::exit(0),
            Request::ConsoleTail { .. } => link.reply(id, Reply::ConsoleTail { text: String::new() })?,
            _ => link.reply(id, Reply::Done)?,
        }
    }
}

/// What the daemon asks.
struct Requests {
    control: UnixStream,
    decoder: Decoder,
}

impl Requests {
    fn next(&mut self) -> Result<RequestFrame> {
        let mut buffer = [0; 16 << 10];
        loop {
            if let Some(body) = self.decoder.next_body()? {
                return Ok(decode_json(body)?);
            }
            // Not in the read itself: there the kernel would wake it each time the daemon takes something, which a real machine, whose
            // thread waits in poll(2), never is.
            poll(&mut [PollFd::new(&self.control, PollFlags::IN)], None)?;
            match self.control.read(&mut buffer)? {
                0 => bail!("the daemon is gone"),
                count => self.decoder.push(&buffer[..count]),
            }
        }
    }
}

/// The way to the daemon.
#[derive(Clone)]
struct Link(Arc<Mutex<UnixStream>>);

impl Link {
    fn write(&self, wire: &[u8]) -> Result<()> {
        Ok(self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(wire)?)
    }

    fn send(&self, message: &Message) -> Result<()> {
        let mut wire = Vec::new();
        encode_json(message, &mut wire)?;
        self.write(&wire)
    }

    fn compact(&self, encoder: &mut SampleEncoder, boot_id: BootId, sample: &Sample) -> Result<()> {
        let mut wire = Vec::new();
        encoder.encode(boot_id, sample, &mut wire)?;
        self.write(&wire)
    }

    fn reply(&self, id: u64, reply: Reply) -> Result<()> {
        self.send(&Message::Reply { id, result: Ok(reply) })
    }

    fn event(&self, event: Event) -> Result<()> {
        self.send(&Message::Event { event })
    }
}

fn status(spec: &VmSpec, state: VmState) -> VmStatus {
    VmStatus {
        generation: VMM_GENERATION,
        version: env!("CARGO_PKG_VERSION").into(),
        sandbox_id: spec.sandbox_id,
        boot_id: spec.boot_id,
        pid: std::process::id(),
        engine: EngineChoice::Qemu,
        engine_reason: Some("nothing runs".into()),
        state,
        agent_generation: Some(GUEST_GENERATION),
        main_end: None,
        main_started: false,
        paused: false,
        phases: Vec::new(),
        jail: JailReport::default(),
    }
}

/// The agent's side of one stream: opens it, and beats.
fn agent(mut stream: UnixStream) -> Result<()> {
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte)?;
    }
    stream.write_all(b"OK 1\n")?;
    let (mut decoder, mut assembler, mut buffer) = (Decoder::new(), Assembler::new(), [0; 4 << 10]);
    let open = loop {
        if let Some(body) = decoder.next_body()?
            && let Some(message) = assembler.host(body)?
        {
            break message;
        }
        match stream.read(&mut buffer)? {
            0 => bail!("closed before it was opened"),
            count => decoder.push(&buffer[..count]),
        }
    };
    let HostBody::Open(_) = open else { bail!("the first message opens nothing") };
    let mut send = |body: GuestBody| -> Result<()> {
        let mut wire = Vec::new();
        encode_guest(body, &mut wire)?;
        Ok(stream.write_all(&wire)?)
    };
    send(GuestBody::Opened(Opened { generation: GUEST_GENERATION, ..Opened::default() }))?;
    let began = Instant::now();
    for sequence in 1.. {
        send(GuestBody::Beat(Beat {
            sequence,
            uptime_ms: u64::try_from(began.elapsed().as_millis())?,
            memory_used_bytes: (20 << 20) + sequence % 64 * 4_096,
            memory_total_bytes: 120 << 20,
            root_used_bytes: (12 << 20) + sequence * 4_096,
            root_free_bytes: 200 << 20,
            ..Beat::default()
        }))?;
        std::thread::sleep(BEAT);
    }
    Ok(())
}

/// The counters of a sandbox that does a little each second, at each interval, until nobody takes them.
fn sample(link: &Link, mut encoder: Option<SampleEncoder>, interval_ms: u64, boot_id: BootId, memory_bytes: u64) {
    let began = Instant::now();
    let now_ns = || {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    };
    let started_at_ns = now_ns();
    for number in 1.. {
        std::thread::sleep(Duration::from_millis(interval_ms));
        let sample = Sample {
            at_ns: now_ns(),
            started_at_ns,
            uptime_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
            cpu_time_us: number * 20_000,
            memory_limit_bytes: memory_bytes,
            memory_resident_bytes: (40 << 20) + number % 64 * 4_096,
            disk_read_bytes: 8 << 20,
            disk_written_bytes: number * 4_096,
            disk_read_operations: 300,
            disk_write_operations: number,
            root_allocated_bytes: 5 << 20,
            network_received_bytes: number * 1_500,
            network_sent_bytes: number * 600,
            network_received_packets: number * 3,
            network_sent_packets: number * 3,
            network_inbound_opened: 0,
            network_inbound_open: 0,
            network: network(number),
        };
        let sent = match &mut encoder {
            Some(encoder) => link.compact(encoder, boot_id, &sample),
            None => link.event(Event::Sampled { boot_id, sample: Box::new(sample) }),
        };
        if sent.is_err() {
            return;
        }
    }
}

/// What a sandbox with some traffic has.
fn network(number: u64) -> NetworkCounts {
    let count = |metric: &str, attributes: &[(&str, &str)]| NetworkCount {
        metric: metric.into(),
        attributes: attributes.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
        value: number,
    };
    let (outbound, tcp) = (("network.connection.direction", "outbound"), ("network.transport", "tcp"));
    let counts = [
        count("microsandbox.network.connections", &[tcp]),
        count("microsandbox.network.connections.opened", &[outbound, tcp]),
        count("microsandbox.network.denied", &[outbound, tcp]),
    ];
    counts.into_iter().collect()
}
