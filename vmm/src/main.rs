//! `msb-vmm`: one virtual machine. Started by `msbd` with a control socket as its standard input; by hand for benches and debugging.
//!
//! ```text
//!  msb-vmm                    standard input is a socket: wait for `Launch`, maybe with a VM begun (`MakeVm`), or stand by for one (`StandBy`)
//!  msb-vmm --spec FILE        boot the VmSpec in FILE (JSON), as a benchmark or a developer does; control.sock works as usual
//!  msb-vmm --probe            print which engine this host can run (JSON)
//!  msb-vmm --explain TARGET   print which rule of the VmNetwork on standard input (JSON) would decide about TARGET (JSON)
//!  msb-vmm --version
//! ```
//!
//! The exit code names the cause of the end (`msb_vmm::end::exit_code`). Logs go to standard error, which `msbd` makes `vmm.log`; of a
//! process that was started before it was known whose, with the launch.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use msb_vmm::control::{Connection, First, explain_network, receive_first};
use msb_vmm::end::EXIT_USAGE;
use msb_vmm::engine::kvm::machine::EmptyVm;
use msb_vmm::engine::qemu::child::{CHILD_WORD, become_qemu};
use msb_vmm::jail::namespaces;
use msb_vmm::jail::process::{close_inherited, make_room_for_descriptors};
use msb_vmm::launch::engine_choice;
use msb_vmm::process::{self, Launcher};
use tracing_subscriber::fmt::format::FmtSpan;

/// How long a daemon may take to send its request after it has started us.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(10);
/// The same of one that was begun before there was a launch: longer than the daemon keeps it, and asks for its scope.
const BEGUN_TIMEOUT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let started = Instant::now();
    let mut words = std::env::args_os().skip(1);
    let first = words.next();
    if first.as_deref() == Some(CHILD_WORD.as_ref()) {
        let error = become_qemu(words);
        return complain(&format!("QEMU could not be started: {error}"), ExitCode::FAILURE);
    }
    close_inherited(&[]);
    make_room_for_descriptors();
    start_log();
    match dispatch(first, words, started) {
        Ok(code) => ExitCode::from(code),
        Err(error) => complain(&format!("{error:#}"), ExitCode::from(EXIT_USAGE)),
    }
}

fn dispatch(
    first: Option<OsString>,
    mut words: impl Iterator<Item = OsString>,
    started: Instant,
) -> anyhow::Result<u8> {
    let Some(first) = first else { return launched_by_daemon(started) };
    match first.to_str() {
        Some("--spec") => {
            let path = PathBuf::from(words.next().context("--spec needs a file")?);
            launched_by_hand(&path, started)
        }
        Some("--probe") => {
            let qemu = engine_choice::find_qemu(words.next().map(PathBuf::from).as_deref());
            print(&serde_json::to_string_pretty(&engine_choice::report(qemu.as_deref()))?);
            Ok(0)
        }
        Some("--explain") => {
            let target = words.next().context("--explain needs a target")?;
            let network = serde_json::from_reader(std::io::stdin().lock()).context("standard input is no VmNetwork")?;
            print(&serde_json::to_string(&explain_network(&network, &target.to_string_lossy()))?);
            Ok(0)
        }
        Some("--version") => {
            print(&format!("msb-vmm {}", env!("CARGO_PKG_VERSION")));
            Ok(0)
        }
        _ => bail!("unknown argument {first:?}; usage: msb-vmm [--spec FILE | --probe | --explain TARGET | --version]"),
    }
}

fn launched_by_daemon(started: Instant) -> anyhow::Result<u8> {
    let input = std::io::stdin().as_fd().try_clone_to_owned().context("standard input")?;
    let stream = UnixStream::from(input);
    if stream.peer_addr().is_err() {
        bail!("standard input is not a socket: msb-vmm is started by msbd, or by hand with --spec FILE");
    }
    namespaces::enter();
    let mut connection = Connection::new(stream).context("control socket")?;
    let (mut started, mut empty_vm) = (started, None);
    let (request_id, spec, stands_by) = loop {
        let timeout = if empty_vm.is_some() { BEGUN_TIMEOUT } else { LAUNCH_TIMEOUT };
        match receive_first(&mut connection, timeout) {
            Ok((_, First::MakeVm)) => empty_vm = Some(EmptyVm::begin()),
            Ok((request_id, First::Launch(spec))) => break (request_id, spec, false),
            Ok((request_id, First::StandBy(spec))) => break (request_id, spec, true),
            // The start that it was begun for came to nothing.
            Err(_) if empty_vm.is_some() => return Ok(0),
            Err(error) => return Err(error).context("no launch request came"),
        }
    };
    if empty_vm.is_some() {
        started = Instant::now();
        if let Some(log) = connection.take_last_descriptor() {
            nix::unistd::dup2_stdout(&log).and_then(|()| nix::unistd::dup2_stderr(&log)).context("its log")?;
        }
    }
    Ok(process::run(&spec, Some(Launcher { connection, request_id, stands_by, empty_vm }), started))
}

fn launched_by_hand(path: &Path, started: Instant) -> anyhow::Result<u8> {
    let text = std::fs::read(path).with_context(|| path.display().to_string())?;
    let spec = serde_json::from_slice(&text).with_context(|| format!("{} is not a VmSpec", path.display()))?;
    namespaces::enter();
    Ok(process::run(&spec, None, started))
}

/// Plain lines on standard error. Set up by hand so that the `log` crate stays unconnected: the virtio libraries log what a guest
/// does through it, without any limit.
fn start_log() {
    let subscriber = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .with_span_events(FmtSpan::NONE)
        .finish();
    let _ = tracing::subscriber::set_global_default(subscriber);
}

#[expect(clippy::print_stdout, reason = "the answers of --probe and --version")]
fn print(text: &str) {
    println!("{text}");
}

#[expect(clippy::print_stderr, reason = "errors before there is a log, or about the command line itself")]
fn complain(text: &str, code: ExitCode) -> ExitCode {
    eprintln!("msb-vmm: {text}");
    code
}
