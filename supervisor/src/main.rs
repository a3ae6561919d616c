//! `msbd`: reads its settings, takes its home, recovers what is there, serves.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::Arc;

use actix::Actor;
use clap::Parser;
use msb_actors::clock::{Clock, SystemClock};
use msb_actors::daemon::Daemon;
use msb_actors::images::ImageActor;
use msb_actors::images::store::ContentStore;
use msb_actors::journal::Journal;
use msb_actors::metrics::{MetricsActor, MetricsHandle};
use msb_actors::sandbox::heartbeat::HeartbeatWriter;
use msb_actors::snapshots::{SnapshotFiles, Snapshots};
use msb_actors::supervisor::Surroundings;
use msb_actors::vm::process::ProcessLauncher;
use msb_protocol::error::ApiError;
use msb_supervisor::api::{self, ApiState};
use msb_supervisor::host::HostProbe;
use msb_supervisor::settings::Settings;
use msb_supervisor::{home, recovery, server};
use tokio::signal::unix::{SignalKind, signal};

/// Threads for the API and for streams; actors have the main thread.
const WORKERS: usize = 2;
/// Threads for blocking work: pulls, unpacking, files.
const BLOCKING_THREADS_MAX: usize = 64;
/// Longest time for finding the machines of a daemon before this one.
const RECOVERY: std::time::Duration = std::time::Duration::from_secs(5);
/// Time for answers under way after the end was asked for.
const FAREWELL: std::time::Duration = std::time::Duration::from_millis(200);

/// The service of msb. `msb` starts it by itself; under systemd it is activated by its socket.
#[derive(Parser)]
#[command(name = "msbd", version)]
struct Arguments {
    /// Print the OpenAPI document of the control API and end.
    #[arg(long)]
    print_openapi: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.print_openapi {
        #[expect(clippy::print_stdout, reason = "printing is what the flag asks for")]
        {
            println!("{}", api::openapi_json());
        }
        return ExitCode::SUCCESS;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "the log may not exist yet; msb shows the end of this stream")]
            {
                eprintln!("msbd: {} [{}]\n  hint: {}", error.message, error.code, error.hint);
            }
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), ApiError> {
    // Whatever this process and the VM processes make is their owner's alone, however the caller's mask was set.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    // One provider of cryptography in the whole process; whoever was first stays.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let settings = Settings::load()?;
    let filter =
        tracing_subscriber::EnvFilter::try_new(settings.config.text("log_level").unwrap_or("info")).unwrap_or_default();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    home::private_directory(&settings.home.home)?;
    let _lock = home::lock(&settings.home)?;
    home::private_directory(&settings.runtime_dir)?;
    let listener = server::listen(&settings.socket)?;

    let system = actix_rt::System::with_tokio_rt(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .max_blocking_threads(BLOCKING_THREADS_MAX)
            .enable_all()
            .build()
            .unwrap_or_else(|error| panic!("no runtime: {error}"))
    });
    let outcome = system.block_on(serve(&settings, listener));
    if let Err(error) = std::fs::remove_file(&settings.socket) {
        tracing::debug!(%error, "the socket was gone");
    }
    outcome
}

async fn serve(settings: &Settings, listener: std::os::unix::net::UnixListener) -> Result<(), ApiError> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
    let (journal, found) = Journal::open(&settings.home.journal(), clock.clone())?;
    for problem in &found.problems {
        tracing::warn!(problem, "the journal was repaired");
    }
    let launcher = Arc::new(ProcessLauncher { program: settings.vmm_program.clone() });
    let known: Vec<_> = found.records.iter().map(|record| record.id).collect();
    recovery::sweep(&settings.runtime_dir, &known, &*launcher).await;
    let store = ContentStore::open(&settings.home.home, settings.upper_template())?
        .with_registries(settings.config.registries().clone())
        .with_limits(
            settings.config.text("images.keep_size").map(|_| settings.config.bytes("images.keep_size")),
            settings.config.bytes("images.free_reserve"),
        );
    let heartbeats =
        HeartbeatWriter::start().map_err(|error| ApiError::internal(format!("no thread for heartbeats: {error}")))?;
    let surroundings = Arc::new(Surroundings {
        home: settings.home.clone(),
        runtime_dir: settings.runtime_dir.clone(),
        host: settings.host_settings(),
        launcher,
        images: ImageActor::new(Arc::new(store)).start(),
        snapshots: Snapshots::start(SnapshotFiles::new(settings.home.snapshots()), journal.clone(), found.snapshots),
        metrics: MetricsHandle(MetricsActor::default().start()),
        journal,
        clock,
        heartbeats,
    });
    let daemon = Daemon::over(surroundings, found.records);
    // Clients that connect meanwhile wait on the socket, which is already there.
    daemon.recovered(RECOVERY).await;
    let probe = HostProbe::new(settings.vmm_program.clone(), settings.config.text("qemu").map(Into::into));
    let state = ApiState::new(daemon.clone(), probe, settings.share_dir.clone());
    let router = api::router(state.clone());
    // On the workers: a request in flight never waits for an actor's turn on this thread.
    let serving = tokio::spawn(server::serve(listener, router));
    tracing::info!(socket = %settings.socket.display(), home = %settings.home.home.display(), sandboxes = known.len(), "serving");
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::debug!(%error, "nobody waits for a notification");
    }
    let failed = |error: std::io::Error| ApiError::internal(format!("signals cannot be watched: {error}"));
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate()).map_err(failed)?, signal(SignalKind::interrupt()).map_err(failed)?);
    let aborter = serving.abort_handle();
    tokio::select! {
        _ = terminate.recv() => tracing::info!("told to end by a signal; sandboxes go on"),
        _ = interrupt.recv() => tracing::info!("interrupted; sandboxes go on"),
        () = state.shutdown_requested() => tracing::info!("told to end by a client; sandboxes go on"),
        ended = serving => tracing::error!(?ended, "the socket is not served any more"),
    }
    tokio::time::sleep(FAREWELL).await;
    aborter.abort();
    daemon.let_go().await;
    Ok(())
}
