//! What is on the wire, generation by generation. One sample of every message is kept as bytes (guest border) or JSON (VMM
//! border); a change that an older peer could not read fails here. To add a generation: add samples, run with
//! `MSB_GOLDEN=write`, review the diff, and never touch a line that was there before.

use std::collections::BTreeMap;
use std::path::PathBuf;

use msb_protocol::control::{GuestMetrics, MetricsSnapshot, SandboxMetrics};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::files::*;
use msb_protocol::guest::*;
use msb_protocol::id::{BootId, SandboxId, SandboxName};
use msb_protocol::spec::EngineChoice;
use msb_protocol::state::{EndCause, ProcessEnd, SandboxState};
use msb_protocol::vmm::{
    self, DiskPart, EndRecord, Event, JailReport, Phase, Reply, Request, RequestFrame, RestoreSpec, Sample, ShareSpec,
    VmSpec, VmState, VmStatus,
};
use prost::Message as _;

/// Compares samples with the lines `name<space>text` of a golden file, or writes it when asked to.
fn hold(file: &str, samples: Vec<(&str, String)>) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
    let text: String = samples.iter().map(|(name, sample)| format!("{name} {sample}\n")).collect();
    if std::env::var_os("MSB_GOLDEN").is_some_and(|mode| mode == "write") {
        std::fs::write(&path, &text).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap();
    let kept: BTreeMap<_, _> = kept.lines().filter_map(|line| line.split_once(' ')).collect();
    assert_eq!(kept.len(), samples.len(), "{file}: a sample is missing on one side");
    for (name, sample) in &samples {
        assert_eq!(kept.get(name), Some(&sample.as_str()), "{file}: {name} changed on the wire");
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn env(name: &str, value: &str) -> EnvVar {
    EnvVar { name: name.into(), value: value.into() }
}

fn exec() -> ExecConfig {
    ExecConfig {
        argv: vec!["sh".into(), "-c".into(), "exit 7".into()],
        env: vec![env("A", "1")],
        workdir: "/w".into(),
        user: "1000:100".into(),
        rlimits: vec![ResourceLimit { resource: "nofile".into(), soft: 10, hard: u64::MAX }],
        stdin: true,
        terminal: Some(TerminalSize { rows: 24, columns: 80 }),
        timeout_ms: 1500,
        wait_output: true,
        login: false,
    }
}

fn config() -> GuestConfig {
    GuestConfig {
        hostname: "box".into(),
        hosts: "127.0.0.1 localhost\n".into(),
        resolv_conf: "nameserver 10.0.0.1\n".into(),
        lower_serial: "root".into(),
        upper_serial: "upper".into(),
        volume_paths: vec!["/var/lib/docker".into()],
        env: vec![env("PATH", "/bin")],
        user: "nobody".into(),
        workdir: "/srv".into(),
        rlimits: vec![ResourceLimit { resource: "core".into(), soft: 0, hard: 0 }],
        main: Some(MainConfig { exec: Some(exec()), autostart: true, stop_signal: 15 }),
        memory_reserve_bytes: 16 << 20,
        ..GuestConfig::default()
    }
}

/// A welcome with what configurations gained in generation 1 after it was first frozen.
fn furnished() -> HostBody {
    let mount = |target: &str, options: &str, source| GuestMount {
        target: target.into(),
        options: options.into(),
        source: Some(source),
    };
    let patch = |kind| GuestPatch { path: "/p".into(), mode: 0o640, kind: Some(kind) };
    HostBody::Welcome(Welcome {
        config: Some(GuestConfig {
            security: "strict".into(),
            mounts: vec![
                mount("/t", "rw,noexec", GuestMountSource::Tmpfs(1 << 20)),
                mount("/s", "ro", GuestMountSource::Share("0".into())),
                mount("/d", "rw", GuestMountSource::Disk("vol-0".into())),
            ],
            patches: vec![
                patch(GuestPatchKind::File(vec![0, 255])),
                patch(GuestPatchKind::Link("/x".into())),
                patch(GuestPatchKind::Directory(true)),
                patch(GuestPatchKind::Removed(true)),
            ],
            ..GuestConfig::default()
        }),
        ..Welcome::default()
    })
}

fn host_samples() -> Vec<(&'static str, HostBody)> {
    let open = |kind| HostBody::Open(Open { generation: 1, boot_id: vec![7; 16], kind: Some(kind) });
    let size = TerminalSize { rows: 24, columns: 80 };
    vec![
        (
            "welcome",
            HostBody::Welcome(Welcome {
                generation: 1,
                boot_id: vec![7; 16],
                realtime_ns: 1_700_000_000_000_000_000,
                entropy: vec![1, 2, 3],
                config: Some(config()),
            }),
        ),
        ("welcome_furnished", furnished()),
        ("clock_sync", HostBody::ClockSync(ClockSync { realtime_ns: 5 })),
        ("goodbye_ack", HostBody::GoodbyeAck(GoodbyeAck {})),
        ("open_control", open(OpenKind::Control(OpenControl {}))),
        ("open_exec", open(OpenKind::Exec(exec()))),
        ("open_main", open(OpenKind::Main(OpenMain { terminal: Some(size), timeout_ms: 1500 }))),
        ("open_attach", open(OpenKind::Attach(OpenAttach { stdin: true, terminal: None }))),
        ("open_tcp", open(OpenKind::Tcp(OpenTcp { host: "db".into(), port: 5432 }))),
        ("open_sftp", open(OpenKind::Sftp(OpenSftp { user: "ann".into() }))),
        (
            "open_login",
            open(OpenKind::Exec(ExecConfig { argv: vec!["ls".into()], login: true, ..ExecConfig::default() })),
        ),
        ("stdin", HostBody::Stdin(Data { data: b"in".to_vec() })),
        ("stdin_eof", HostBody::StdinEof(StdinEof {})),
        ("signal", HostBody::Signal(Signal { number: 9 })),
        ("resize", HostBody::Resize(size)),
        (
            "shutdown",
            HostBody::Shutdown(Shutdown {
                grace_ms: 8000,
                signal: 2,
                pre_stop: vec!["sync".into()],
                pre_stop_budget_ms: 100,
            }),
        ),
        ("ping", HostBody::Ping(Ping { token: 42 })),
        ("part", HostBody::Part(Part { data: vec![9], last: true })),
    ]
}

fn guest_samples() -> Vec<(&'static str, GuestBody)> {
    let exited = Exited { code: 7, signal: 0, core_dumped: false, oom_killed: true, timed_out: true };
    let failure = Failure { code: "exec_not_found".into(), message: "no".into(), errno: 2, stage: "mount".into() };
    vec![
        (
            "agent_hello",
            GuestBody::AgentHello(AgentHello {
                generation: 1,
                agent_version: "0.1.0".into(),
                init_uptime_us: 1,
                hello_uptime_us: 2,
            }),
        ),
        (
            "ready",
            GuestBody::Ready(Ready { ready_uptime_us: 3, steps: vec![Step { name: "mount".into(), duration_us: 4 }] }),
        ),
        ("boot_failed", GuestBody::BootFailed(failure.clone())),
        ("main_started", GuestBody::MainStarted(Started { pid: 12 })),
        ("main_output", GuestBody::MainOutput(Output { stream: OutputStream::Stderr as i32, data: b"out".to_vec() })),
        ("main_exited", GuestBody::MainExited(exited)),
        ("goodbye", GuestBody::Goodbye(Goodbye {})),
        (
            "opened",
            GuestBody::Opened(Opened {
                generation: 1,
                agent_version: "0.1.0".into(),
                main_exited: Some(exited),
                main_pid: 5,
                holds: false,
            }),
        ),
        ("refused", GuestBody::Refused(failure)),
        (
            "beat",
            GuestBody::Beat(Beat {
                sequence: 1,
                uptime_ms: 2,
                sessions: 3,
                memory_used_bytes: 4,
                memory_total_bytes: 5,
                root_used_bytes: 6,
                root_free_bytes: 7,
                load_hundredths: 8,
                processes: 9,
            }),
        ),
        ("pong", GuestBody::Pong(Pong { token: 42 })),
        ("started", GuestBody::Started(Started { pid: 13 })),
        ("output", GuestBody::Output(Output { stream: OutputStream::Stdout as i32, data: b"out".to_vec() })),
        ("stdin_credit", GuestBody::StdinCredit(StdinCredit { bytes: 4096 })),
        (
            "exited",
            GuestBody::Exited(Exited { code: 0, signal: 11, core_dumped: true, oom_killed: false, timed_out: false }),
        ),
        ("output_lost", GuestBody::OutputLost(OutputLost { bytes: 99 })),
        ("part", GuestBody::Part(Part { data: vec![9], last: false })),
        ("log", GuestBody::Log(Log { line: "mounted".into() })),
    ]
}

#[test]
fn the_guest_border_of_generation_1_is_frozen() {
    let host = host_samples().into_iter().map(|(name, body)| (name, HostMessage::from(body).encode_to_vec()));
    hold("host-gen-1.txt", host.map(|(name, bytes)| (name, hex(&bytes))).collect());
    let guest = guest_samples().into_iter().map(|(name, body)| (name, GuestMessage::from(body).encode_to_vec()));
    hold("guest-gen-1.txt", guest.map(|(name, bytes)| (name, hex(&bytes))).collect());
}

/// What generation 2 brought: file sessions.
fn file_host_samples() -> Vec<(&'static str, HostBody)> {
    let open = OpenFiles { user: "ann".into(), at_home: true };
    let request = |operation| HostBody::File(FileRequest { id: 7, operation: Some(operation) });
    let path = || FilePath { path: b"/p".to_vec(), no_follow: true };
    let link = || FileLink { target: b"t".to_vec(), path: b"/p".to_vec() };
    let handle = FileHandle { handle: 3 };
    let time = Some(FileTime { seconds: 4, nanoseconds: 5 });
    let change =
        FileChange { mode: Some(0o644), uid: Some(1), gid: Some(2), size: Some(3), accessed: time, modified: time };
    let flags = FileOpen {
        path: b"/p".to_vec(),
        read: true,
        write: true,
        append: true,
        create: true,
        truncate: true,
        exclusive: true,
        no_follow: true,
        mode: Some(0o600),
    };
    let set = FileSetStat { path: b"/p".to_vec(), no_follow: true, change: Some(change) };
    let make = FileMakeDirectory { path: b"/p".to_vec(), mode: Some(0o755), parents: true };
    let rename = FileRename { from: b"/a".to_vec(), to: b"/b".to_vec(), no_replace: true };
    let watch = FileWatch { path: b"/p".to_vec(), recursive: true };
    let pack = ArchivePack { path: b"/p".to_vec(), name: b"n".to_vec(), follow: true };
    let unpack = ArchiveUnpack { directory: b"/p".to_vec(), name: Some(b"n".to_vec()), keep_owner: true };
    let archive = |action| {
        let open = OpenArchive { user: "0:0".into(), action: Some(action) };
        HostBody::Open(Open { generation: 2, boot_id: vec![7; 16], kind: Some(OpenKind::Archive(open)) })
    };
    vec![
        ("open_files", HostBody::Open(Open { generation: 2, boot_id: vec![7; 16], kind: Some(OpenKind::Files(open)) })),
        ("open", request(FileOperation::Open(flags))),
        ("close", request(FileOperation::Close(handle))),
        ("read", request(FileOperation::Read(FileRead { handle: 3, offset: 4, len: 5 }))),
        ("write", request(FileOperation::Write(FileWrite { handle: 3, offset: 4, data: b"d".to_vec() }))),
        ("stat", request(FileOperation::Stat(path()))),
        ("stat_handle", request(FileOperation::StatHandle(handle))),
        ("set_stat", request(FileOperation::SetStat(set))),
        (
            "set_stat_handle",
            request(FileOperation::SetStatHandle(FileSetStatHandle { handle: 3, change: Some(change) })),
        ),
        ("open_directory", request(FileOperation::OpenDirectory(path()))),
        ("read_directory", request(FileOperation::ReadDirectory(handle))),
        ("make_directory", request(FileOperation::MakeDirectory(make))),
        ("remove", request(FileOperation::Remove(FileRemove { path: b"/p".to_vec(), kind: 2 }))),
        ("rename", request(FileOperation::Rename(rename))),
        ("symlink", request(FileOperation::Symlink(link()))),
        ("hard_link", request(FileOperation::HardLink(link()))),
        ("read_link", request(FileOperation::ReadLink(path()))),
        ("real_path", request(FileOperation::RealPath(path()))),
        ("sync", request(FileOperation::Sync(handle))),
        ("stat_file_system", request(FileOperation::StatFileSystem(path()))),
        ("watch", request(FileOperation::Watch(watch))),
        ("open_pack", archive(ArchiveAction::Pack(pack))),
        ("open_unpack", archive(ArchiveAction::Unpack(unpack))),
    ]
}

fn file_guest_samples() -> Vec<(&'static str, GuestBody)> {
    let reply = |outcome| GuestBody::File(FileReply { id: 7, outcome: Some(outcome) });
    let time = FileTime { seconds: 4, nanoseconds: 5 };
    let attributes = FileAttributes {
        mode: 0o100_644,
        uid: 1,
        gid: 2,
        size: 3,
        accessed: time,
        modified: time,
        changed: time,
        links: 6,
        device: 7,
        inode: 8,
        allocated: 9,
    };
    let entry = FileEntry { name: b"n".to_vec(), attributes: Some(attributes) };
    let system = FileSystemStat {
        block_size: 1,
        fragment_size: 2,
        blocks: 3,
        blocks_free: 4,
        blocks_available: 5,
        files: 6,
        files_free: 7,
        name_max: 8,
        flags: 9,
        id: 10,
    };
    let change = FileChangeSeen { kind: 2, path: b"/p".to_vec(), directory: true };
    vec![
        ("failed", reply(FileOutcome::Failed(FileFailure { errno: 2, message: "no".into() }))),
        ("done", reply(FileOutcome::Done(FileDone {}))),
        ("handle", reply(FileOutcome::Handle(FileHandle { handle: 3 }))),
        ("data", reply(FileOutcome::Data(b"d".to_vec()))),
        ("attributes", reply(FileOutcome::Attributes(attributes))),
        ("entries", reply(FileOutcome::Entries(FileEntries { entries: vec![entry] }))),
        ("path", reply(FileOutcome::Path(b"/p".to_vec()))),
        ("file_system", reply(FileOutcome::FileSystem(system))),
        ("changes", reply(FileOutcome::Changes(FileChanges { changes: vec![change] }))),
    ]
}

#[test]
fn the_files_of_generation_2_are_frozen_and_read_back() {
    let host = file_host_samples().into_iter().map(|(name, body)| (name, HostMessage::from(body).encode_to_vec()));
    hold("host-files-gen-2.txt", host.map(|(name, bytes)| (name, hex(&bytes))).collect());
    let guest = file_guest_samples().into_iter().map(|(name, body)| (name, GuestMessage::from(body).encode_to_vec()));
    hold("guest-files-gen-2.txt", guest.map(|(name, bytes)| (name, hex(&bytes))).collect());
    for (name, body) in file_host_samples() {
        let bytes = HostMessage::from(body.clone()).encode_to_vec();
        assert_eq!(HostMessage::decode(bytes.as_slice()).unwrap().body, Some(body), "{name}");
    }
    for (name, body) in file_guest_samples() {
        let bytes = GuestMessage::from(body.clone()).encode_to_vec();
        assert_eq!(GuestMessage::decode(bytes.as_slice()).unwrap().body, Some(body), "{name}");
    }
}

#[test]
fn the_renewals_of_generation_3_are_frozen_and_read_back() {
    let renew = OpenKind::Renew(Renew { welcome: None, holds: false });
    let host = [
        ("quiesce", HostBody::Quiesce(Quiesce::default())),
        ("thaw", HostBody::Thaw(Thaw {})),
        ("open_renew", HostBody::Open(Open { generation: 3, boot_id: vec![7; 16], kind: Some(renew) })),
    ];
    let encoded = host.clone().map(|(name, body)| (name, hex(&HostMessage::from(body).encode_to_vec())));
    hold("host-gen-3.txt", encoded.to_vec());
    for (name, body) in host {
        let bytes = HostMessage::from(body.clone()).encode_to_vec();
        assert_eq!(HostMessage::decode(bytes.as_slice()).unwrap().body, Some(body), "{name}");
    }
    let quiesced = GuestBody::Quiesced(Quiesced { error: "x".into() });
    let bytes = GuestMessage::from(quiesced.clone()).encode_to_vec();
    hold("guest-gen-3.txt", vec![("quiesced", hex(&bytes))]);
    assert_eq!(GuestMessage::decode(bytes.as_slice()).unwrap().body, Some(quiesced));
}

#[test]
fn golden_bytes_still_mean_what_they_meant() {
    let golden = |file: &str| {
        std::fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file)).unwrap()
    };
    let host: BTreeMap<_, _> = host_samples().into_iter().collect();
    for line in golden("host-gen-1.txt").lines() {
        let (name, bytes) = line.split_once(' ').unwrap();
        assert_eq!(HostMessage::decode(unhex(bytes).as_slice()).unwrap().body.as_ref(), host.get(name), "{name}");
    }
    let guest: BTreeMap<_, _> = guest_samples().into_iter().collect();
    for line in golden("guest-gen-1.txt").lines() {
        let (name, bytes) = line.split_once(' ').unwrap();
        assert_eq!(GuestMessage::decode(unhex(bytes).as_slice()).unwrap().body.as_ref(), guest.get(name), "{name}");
    }
}

#[test]
fn a_message_from_the_future_is_malformed_and_an_unknown_field_is_passed_over() {
    let mut assembler = Assembler::new();
    // Field 100 of the oneof, length 0: a body this generation does not know.
    assert!(assembler.host(&[0xa2, 0x06, 0x00]).is_err());
    // Ping{token: 42} with an unknown field 15 = 1 inside.
    let ping = assembler.host(&[0x52, 0x04, 0x08, 0x2a, 0x78, 0x01]).unwrap();
    assert_eq!(ping, Some(HostBody::Ping(Ping { token: 42 })));
}

fn vm_spec() -> VmSpec {
    VmSpec {
        generation: 1,
        sandbox_id: SandboxId(uuid::Uuid::from_u128(1)),
        name: SandboxName::parse("box").unwrap(),
        boot_id: BootId(uuid::Uuid::from_u128(2)),
        engine: EngineChoice::Qemu,
        cpus: 2,
        memory_mib: 256,
        kernel: "/k".into(),
        initramfs: "/i".into(),
        cmdline_extra: vec!["quiet".into()],
        lower: vec![DiskPart { path: "/m".into(), len_bytes: 4096 }],
        upper: "/u".into(),
        run_dir: "/r".into(),
        log_dir: "/l".into(),
        log_size_max_bytes: 1,
        log_files_max: 2,
        guest: config(),
        boot_timeout_ms: 3,
        disk_full_timeout_ms: 4,
        qemu: Some("/q".into()),
        network: None,
        shares: Vec::new(),
        disks: Vec::new(),
        restore: None,
        suspends: false,
    }
}

#[test]
fn the_vmm_border_of_generation_1_is_frozen() {
    let boot_id = BootId(uuid::Uuid::from_u128(2));
    let phase = Phase { name: "kernel".into(), duration_us: 5 };
    let record = EndRecord {
        boot_id,
        cause: EndCause::GuestPanic,
        main_end: Some(ProcessEnd::exited(3)),
        message: "panic".into(),
        at_ns: 9,
        boot_error: None,
        sample: None,
    };
    let status = VmStatus {
        generation: 1,
        version: "0.1.0".into(),
        sandbox_id: SandboxId(uuid::Uuid::from_u128(1)),
        boot_id,
        pid: 77,
        engine: EngineChoice::Kvm,
        engine_reason: Some("probe".into()),
        state: VmState::Ready,
        agent_generation: Some(1),
        main_end: None,
        main_started: true,
        paused: false,
        phases: vec![phase.clone()],
        jail: JailReport { in_force: vec!["seccomp".into()], missing: vec![] },
    };
    let json = |value: &dyn erased::Json| value.text();
    let request = |request| RequestFrame { id: 1, request };
    let reply = |result| vmm::Message::Reply { id: 1, result };
    let event = |event| vmm::Message::Event { event };
    hold(
        "vmm-gen-1.txt",
        vec![
            ("launch", json(&request(Request::Launch { spec: Box::new(vm_spec()) }))),
            ("adopt", json(&request(Request::Adopt { generation: 1 }))),
            ("status", json(&request(Request::Status))),
            ("kill", json(&request(Request::Kill { cause: EndCause::Killed }))),
            ("expect_end", json(&request(Request::ExpectEnd { cause: EndCause::Idle }))),
            ("console_tail", json(&request(Request::ConsoleTail { bytes_max: 10 }))),
            ("sample", json(&request(Request::Sample))),
            ("subscribe", json(&request(Request::Subscribe { sample_interval_ms: 1000, compact: false }))),
            ("reply_done", json(&reply(Ok(Reply::Done)))),
            ("reply_status", json(&reply(Ok(Reply::Status(Box::new(status)))))),
            ("reply_sample", json(&reply(Ok(Reply::Sample(Box::<Sample>::default()))))),
            ("reply_error", json(&reply(Err(ApiError::new(ErrorCode::InvalidKernel, "not a kernel"))))),
            ("agent_hello", json(&event(Event::AgentHello { boot_id, generation: 1 }))),
            ("agent_ready", json(&event(Event::AgentReady { boot_id, phases: vec![phase] }))),
            ("main_started", json(&event(Event::MainStarted { boot_id, pid: 12 }))),
            ("main_exited", json(&event(Event::MainExited { boot_id, end: ProcessEnd::signalled(9) }))),
            ("host_disk_full", json(&event(Event::HostDiskFull { boot_id, full: true }))),
            ("sampled", json(&event(Event::Sampled { boot_id, sample: Box::<Sample>::default() }))),
            ("ended", json(&event(Event::Ended { record: Box::new(record) }))),
        ],
    );
}

#[test]
fn what_later_generations_of_the_vmm_border_brought_is_frozen() {
    let json = |request| serde_json::to_string(&RequestFrame { id: 1, request }).unwrap();
    hold("vmm-gen-3.txt", vec![("save", json(Request::Save { flush: false })), ("release", json(Request::Release))]);
    hold("vmm-gen-2.txt", vec![("pause", json(Request::Pause)), ("resume", json(Request::Resume))]);
}

/// The compact forms of metrics: a sample that came first on its connection and one that came later, and a snapshot of
/// a fleet.
#[test]
fn compact_metrics_are_frozen() {
    let boot_id = BootId(uuid::Uuid::from_u128(2));
    let count = vmm::NetworkCount {
        metric: "microsandbox.network.connections".into(),
        attributes: BTreeMap::from([("network.transport".into(), "tcp".into())]),
        value: 3,
    };
    let sample = Sample {
        at_ns: 1_700_000_000_000_000_000,
        started_at_ns: 1_600_000_000_000_000_000,
        uptime_ms: 1,
        cpu_time_us: 2,
        memory_limit_bytes: 3,
        memory_resident_bytes: 4,
        disk_read_bytes: 5,
        disk_written_bytes: 6,
        disk_read_operations: 7,
        disk_write_operations: 8,
        root_allocated_bytes: 9,
        network_received_bytes: 10,
        network_sent_bytes: 11,
        network_received_packets: 12,
        network_sent_packets: 13,
        network_inbound_opened: 14,
        network_inbound_open: 15,
        network: [count].into_iter().collect(),
    };
    let mut encoder = vmm::SampleEncoder::default();
    let mut frame = || {
        let mut wire = Vec::new();
        encoder.encode(boot_id, &sample, &mut wire).unwrap();
        hex(&wire)
    };
    let row = SandboxMetrics {
        name: SandboxName::parse("web").unwrap(),
        id: SandboxId(uuid::Uuid::from_u128(1)),
        boot_id,
        vmm_pid: 77,
        status: SandboxState::Running,
        labels: BTreeMap::from([("team".into(), "ml".into())]),
        restarts: 1,
        created_at: "2026-01-02T03:04:05.678Z".parse().unwrap(),
        started_at: "2026-01-02T03:04:06Z".parse().unwrap(),
        last: true,
        sample: sample.clone(),
        cpu_utilization: 0.5,
        guest: Some(GuestMetrics {
            memory_used_bytes: 1,
            memory_total_bytes: 2,
            root_used_bytes: 3,
            root_free_bytes: 4,
            processes: 5,
        }),
        boot_phases: vec![Phase { name: "kernel".into(), duration_us: 5 }],
    };
    let snapshot = MetricsSnapshot {
        host_id: "host".into(),
        host_name: "h1".into(),
        instance_id: "instance".into(),
        taken_at: "2026-01-02T03:04:07Z".parse().unwrap(),
        states: BTreeMap::from([("running".into(), 1)]),
        ready_forks: BTreeMap::new(),
        sandboxes: vec![row],
    };
    let subscribe = RequestFrame { id: 1, request: Request::Subscribe { sample_interval_ms: 1000, compact: true } };
    hold(
        "metrics.txt",
        vec![
            ("subscribe", serde_json::to_string(&subscribe).unwrap()),
            ("first_sample", frame()),
            ("later_sample", frame()),
            ("fleet", hex(&msb_protocol::fleet::encode(&snapshot))),
        ],
    );
}

/// `serde::Serialize` is not object safe; this is all the test needs of it.
mod erased {
    pub(super) trait Json {
        fn text(&self) -> String;
    }
    impl<T: serde::Serialize> Json for T {
        fn text(&self) -> String {
            serde_json::to_string(self).unwrap()
        }
    }
}

#[test]
fn a_machine_that_stands_by_becomes_whoever_asks_for_the_same() {
    let standing = VmSpec { engine: EngineChoice::Kvm, network: None, ..vm_spec() };
    let taken = |change: fn(&mut VmSpec)| {
        let mut own = VmSpec {
            sandbox_id: SandboxId::generate(),
            boot_id: BootId::generate(),
            name: SandboxName::parse("other").unwrap(),
            upper: "/other/upper.img".into(),
            run_dir: "/other/run".into(),
            log_dir: "/other/logs".into(),
            ..standing.clone()
        };
        own.guest.hostname = "other".into();
        own.guest.hosts = "127.0.1.1 other".into();
        own.guest.main = None;
        change(&mut own);
        own.takes_over(&standing)
    };
    assert!(taken(|_| {}));
    assert!(taken(|own| own.engine = EngineChoice::Auto) && !taken(|own| own.engine = EngineChoice::Qemu));
    assert!(taken(|own| own.suspends = true));
    assert!(!taken(|own| own.memory_mib += 1));
    assert!(!taken(|own| own.guest.env.clear()));
    assert!(!taken(|own| own.restore = Some(RestoreSpec { memory: "/m".into(), state: "/s".into(), written: None })));
    assert!(!taken(|own| own.shares.push(ShareSpec {
        name: "a".into(),
        path: "/a".into(),
        read_only: true,
        is_root_owned: false,
        quota_bytes: None,
    })));
}
