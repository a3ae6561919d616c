//! `msbd`: reads its settings, takes its home, recovers what is there, serves.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use msb_actors::clock::{Clock, SystemClock};
use msb_actors::daemon::Daemon;
use msb_actors::images::ImageActor;
use msb_actors::images::store::ContentStore;
use msb_actors::journal::Journal;
use msb_actors::metrics::MetricsHandle;
use msb_actors::pool::{PoolActor, Workshop};
use msb_actors::pressure::{CPU_PRESSURE, Pressure};
use msb_actors::sandbox::heartbeat::HeartbeatWriter;
use msb_actors::snapshots::{SnapshotFiles, Snapshots};
use msb_actors::starts::Starts;
use msb_actors::supervisor::Surroundings;
use msb_actors::vm::process::{Begun, ProcessLauncher};
use msb_actors::vm::samples::SampleReader;
use msb_protocol::error::ApiError;
use msb_supervisor::api::{self, ApiState};
use msb_supervisor::door::behind::{self, Arrival};
use msb_supervisor::door::front::{self, Place};
use msb_supervisor::host::HostProbe;
use msb_supervisor::settings::Settings;
use msb_supervisor::traces::Traces;
use msb_supervisor::{home, recovery, server, systemd};
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Threads for the API and for streams; actors have the main thread.
const WORKERS: usize = 2;
/// Threads for blocking work: pulls, unpacking, files.
const BLOCKING_THREADS_MAX: usize = 64;
/// Longest time for finding the machines of a daemon before this one.
const RECOVERY: std::time::Duration = std::time::Duration::from_secs(5);
/// Connections from the door that wait for the service.
const HANDED_OVER_LEN: usize = 64;
/// Descriptors this process may have open.
const DESCRIPTORS: u64 = 65_536;
/// Descriptors that there is room for from the beginning: when the table of a process with threads grows, the kernel waits for an RCU grace
/// period.
const DESCRIPTORS_FIRST: i32 = 1_024;
/// Time for answers under way after the end was asked for.
const FAREWELL: std::time::Duration = std::time::Duration::from_millis(200);

/// The service of msb. `msb` starts it by itself; under systemd it is activated by its socket.
#[derive(Parser)]
#[command(name = "msbd", version)]
struct Arguments {
    /// Print the OpenAPI document of the control API and end.
    #[arg(long)]
    print_openapi: bool,
    /// Open the door of the host: root only, one service for each user of group msb
    #[arg(long, conflicts_with_all = ["behind_door", "host_stop"])]
    host: bool,
    /// Stop the sandboxes of every user with a flush
    #[arg(long, conflicts_with = "behind_door")]
    host_stop: bool,
    /// Also take the connections that the door of the host hands over
    #[arg(long, hide = true)]
    behind_door: bool,
    /// Where the door makes scopes for VM processes
    #[arg(long, value_name = "SOCKET", requires = "behind_door", hide = true)]
    door_scopes: Option<PathBuf>,
    /// State of the host's service
    #[arg(long, value_name = "DIR", default_value = front::STATE_DIR, hide = true)]
    host_state: PathBuf,
    /// Sockets of the host's service
    #[arg(long, value_name = "DIR", default_value = front::RUN_DIR, hide = true)]
    host_run: PathBuf,
    /// Who may use the host's service
    #[arg(long, value_name = "GROUP", default_value = front::GROUP, hide = true)]
    host_group: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Without it the wait comes later, and nothing else happens.
    drop(rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), DESCRIPTORS_FIRST - 1));
    if arguments.print_openapi {
        #[expect(clippy::print_stdout, reason = "printing is what the flag asks for")]
        {
            println!("{}", api::openapi_json());
        }
        return ExitCode::SUCCESS;
    }
    let place = Place {
        state_dir: arguments.host_state.clone(),
        run_dir: arguments.host_run.clone(),
        group: arguments.host_group.clone(),
    };
    let outcome = match (arguments.host, arguments.host_stop) {
        (true, _) => log_to_stderr("info").and_then(|()| front::serve(place)),
        (_, true) => log_to_stderr("info").and_then(|()| front::stop_sandboxes(place)),
        _ => run(arguments.behind_door, arguments.door_scopes),
    };
    match outcome {
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

fn log_to_stderr(level: &str) -> Result<(), ApiError> {
    let filter = tracing_subscriber::EnvFilter::try_new(level).unwrap_or_default();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    Ok(())
}

fn run(behind_door: bool, door_scopes: Option<PathBuf>) -> Result<(), ApiError> {
    // Whatever this process and the VM processes make is their owner's alone, however the caller's mask was set.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    // One provider of cryptography in the whole process; whoever was first stays.
    let _ = rustls::crypto::ring::default_provider().install_default();
    allow_descriptors();
    let settings = Settings::load()?;
    log_to_stderr(settings.config.text("log_level").unwrap_or("info"))?;
    home::private_directory(&settings.home.home)?;
    let _lock = home::lock(&settings.home)?;
    home::private_directory(&settings.runtime_dir)?;
    let listening = server::listen(&settings.socket)?;

    let system = actix_rt::System::with_tokio_rt(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .max_blocking_threads(BLOCKING_THREADS_MAX)
            .enable_all()
            .build()
            .unwrap_or_else(|error| panic!("no runtime: {error}"))
    });
    let outcome = system.block_on(serve(&settings, listening.listener, behind_door, door_scopes));
    if !listening.inherited
        && let Err(error) = std::fs::remove_file(&settings.socket)
    {
        tracing::debug!(%error, "the socket was gone");
    }
    outcome
}

/// Every stream of a client costs two descriptors: a thousand commands at once do not fit the limit that a login session begins with.
fn allow_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let wanted = DESCRIPTORS.min(hard);
        if wanted > soft {
            // What the hard limit does not allow is refused stream by stream.
            let _ = setrlimit(Resource::RLIMIT_NOFILE, wanted, hard);
        }
    }
}

async fn serve(
    settings: &Settings,
    listener: std::os::unix::net::UnixListener,
    behind_door: bool,
    door_scopes: Option<PathBuf>,
) -> Result<(), ApiError> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
    let (journal, found) = Journal::open(&settings.home.journal(), clock.clone())?;
    for problem in &found.problems {
        tracing::warn!(problem, "the journal was repaired");
    }
    let metrics = MetricsHandle::start(&settings.home.home, clock.clone());
    let launcher = Arc::new(ProcessLauncher {
        program: settings.vmm_program.clone(),
        sample_interval_ms: settings.sample_interval_ms(),
        samples: SampleReader::start(metrics.clone()),
        scopes: systemd::scopes(door_scopes).await,
        begun: Begun::default(),
    });
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
    let snapshots = Snapshots::start(SnapshotFiles::new(settings.home.snapshots()), journal.clone(), clock.clone());
    let images = ImageActor::keep(Arc::new(store), clock.clone());
    let workshop = Workshop {
        home: settings.home.clone(),
        runtime_dir: settings.runtime_dir.clone(),
        host: settings.host_settings(),
        images: images.clone(),
        snapshots: snapshots.clone(),
        launcher: launcher.clone(),
    };
    let pool = PoolActor::keep(workshop, clock.clone());
    let surroundings = Arc::new(Surroundings {
        home: settings.home.clone(),
        runtime_dir: settings.runtime_dir.clone(),
        host: settings.host_settings(),
        pressure: Pressure::at(CPU_PRESSURE),
        starts: Starts::for_this_host(clock.clone()),
        launcher,
        images,
        snapshots,
        pool,
        metrics,
        journal,
        clock,
        heartbeats,
    });
    let daemon = Daemon::over(surroundings, found.records);
    // Clients that connect meanwhile wait on the socket, which is already there.
    daemon.recovered(RECOVERY).await;
    let probe = HostProbe::new(settings.vmm_program.clone(), settings.config.text("qemu").map(Into::into));
    let traces = Traces::begin(daemon.surroundings().metrics.identity(), |name| std::env::var(name).ok());
    let state = ApiState::new(daemon.clone(), probe, settings.share_dir.clone());
    let router = api::router(state.clone());
    // On the workers: a request in flight never waits for an actor's turn on this thread.
    let (mut arrivals, handed_over, queue) = match behind_door {
        true => {
            let (sender, queue) = mpsc::channel(HANDED_OVER_LEN);
            (Some(behind::open(&settings.runtime_dir)?), Some(sender), Some(queue))
        }
        false => (None, None, None),
    };
    let serving = tokio::spawn(server::serve(listener, queue, router));
    tracing::info!(socket = %settings.socket.display(), home = %settings.home.home.display(), sandboxes = known.len(), "serving");
    systemd::ready(&daemon);
    let failed = |error: std::io::Error| ApiError::internal(format!("signals cannot be watched: {error}"));
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate()).map_err(failed)?, signal(SignalKind::interrupt()).map_err(failed)?);
    let aborter = serving.abort_handle();
    let through_the_door = async {
        match (&mut arrivals, handed_over) {
            (Some(arrivals), Some(handed_over)) => keep_door(arrivals, &handed_over, &daemon).await,
            _ => std::future::pending().await,
        }
    };
    tokio::select! {
        () = through_the_door => tracing::info!("told to end through the door"),
        _ = terminate.recv() => tracing::info!("told to end by a signal; sandboxes go on"),
        _ = interrupt.recv() => tracing::info!("interrupted; sandboxes go on"),
        () = state.shutdown_requested() => tracing::info!("told to end by a client; sandboxes go on"),
        ended = serving => tracing::error!(?ended, "the socket is not served any more"),
    }
    tokio::time::sleep(FAREWELL).await;
    aborter.abort();
    daemon.let_go().await;
    // The SDK waits for its own thread.
    if let Err(error) = tokio::task::spawn_blocking(move || traces.end()).await {
        tracing::debug!(%error, "the last spans were not sent");
    }
    Ok(())
}

/// Passes on what comes through the door, until it says that the service is to end.
async fn keep_door(arrivals: &mut mpsc::Receiver<Arrival>, handed_over: &mpsc::Sender<UnixStream>, daemon: &Daemon) {
    while let Some(arrival) = arrivals.recv().await {
        match arrival {
            Arrival::Connection(connection) => {
                if handed_over.send(connection).await.is_err() {
                    return;
                }
            }
            Arrival::End => return,
            Arrival::Alive(mut answer) => {
                let daemon = daemon.clone();
                // A supervisor that does not answer says nothing, and the front door draws its conclusion.
                tokio::spawn(async move {
                    if daemon.count().await.is_ok() {
                        let _ = std::io::Write::write_all(&mut answer, b".");
                    }
                });
            }
            Arrival::StopSandboxes(mut answer) => {
                match daemon.host_stop().await {
                    Ok(stopped) => tracing::info!(stopped, "every sandbox was stopped because the host goes down"),
                    Err(error) => tracing::error!(error = %error.message, "sandboxes could not be stopped"),
                }
                // A front door that has not waited knows nothing, and nothing depends on it.
                let _ = std::io::Write::write_all(&mut answer, b".");
                return;
            }
        }
    }
    // A door that is shut says nothing; the service goes on.
    std::future::pending().await
}
