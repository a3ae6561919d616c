//! `msb-metrics`: reads the metrics of a running msbd and sends them to an OTLP backend, to standard output or to Prometheus.
//!
//! ```text
//!   msbd socket ─► collector ─► collect ─► point ─► export (buffer, retry) ─► sender ─► backend
//!                                  ├───► prometheus (newest only) ◄─ scrape
//!                                  └───► standard output
//! ```
//!
//! It only reads. It never starts a daemon, never creates a file, and a slow backend never slows a sandbox.

#![forbid(unsafe_code)]

mod args;
mod buffer;
mod collect;
mod collector;
mod endpoint;
mod export;
mod otlp;
mod point;
mod prometheus;
mod retry;
mod self_metrics;
mod sender;
mod settings;
mod stdout;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser as _;
use msb_protocol::paths::{HomeLayout, Surroundings};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{Cli, Command, LogFormat, OtelArgs};
use crate::collector::Source;
use crate::export::Exporter;
use crate::point::Collection;
use crate::sender::Sender;
use crate::settings::OtelSettings;

/// Longest time for a last export when asked to end.
const LAST_EXPORT: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let cli = Cli::parse();
    let log = tracing_subscriber::fmt().with_max_level(cli.log_level).with_writer(std::io::stderr).with_target(false);
    match cli.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    // One TLS provider for the whole process; every TLS stack here is built without one of its own.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::debug!("a TLS provider was installed already");
    }
    let outcome = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run(cli)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    let source = source(cli.msb_home);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let ended = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    match cli.command {
        Command::Otel(args) => otel(source, args, ended).await,
        Command::Stdout(args) => {
            let (lines, failed) = stdout::writer();
            tokio::select! {
                () = collector::run(source, &args, |collection| lines.write(collection)) => Ok(()),
                error = failed => stdout::outcome(error),
                () = ended => Ok(()),
            }
        }
        Command::Prometheus(args) => {
            let newest = prometheus::Newest::default();
            tokio::select! {
                () = collector::run(source, &args.collect, |collection| newest.put(collection)) => Ok(()),
                outcome = prometheus::serve(args.listen, newest.clone()) => outcome,
                () = ended => Ok(()),
            }
        }
    }
}

async fn otel(source: Source, args: OtelArgs, ended: impl Future<Output = ()>) -> anyhow::Result<()> {
    let OtelSettings { sender, resource, flush_interval } = settings::resolve(&args, |name| std::env::var(name).ok())?;
    tracing::info!(endpoint = sender.endpoint.url, protocol = ?sender.endpoint.protocol, "exporting");
    let own = self_metrics::SelfMetrics::new(sender.clone(), resource.clone(), flush_interval);
    let queue = export::Queue::new(args.max_buffered);
    let mut exporter = Exporter { queue: queue.clone(), backend: Sender::new(sender)?, resource, own, partly: None };
    let take = |collection: Option<Collection>| {
        if let Some(collection) = collection {
            queue.with(|buffer| buffer.push(Arc::new(collection.keep_new())));
        }
    };
    tokio::select! {
        () = collector::run(source, &args.collect, take) => {}
        () = exporter.run(flush_interval) => {}
        () = ended => {}
    }
    if !matches!(tokio::time::timeout(LAST_EXPORT, exporter.flush()).await, Ok(Ok(()))) {
        tracing::warn!(lost = queue.with(|buffer| buffer.len()), "ended before everything was exported");
    }
    tokio::task::spawn_blocking(move || exporter.own.shutdown()).await?;
    Ok(())
}

/// The service to read.
fn source(msb_home: Option<PathBuf>) -> Source {
    let mut surroundings = Surroundings::from_environment(rustix::process::getuid().as_raw());
    if msb_home.is_some() {
        surroundings.msb_home = msb_home;
        surroundings.msb_host = None;
    }
    Source {
        socket: surroundings.control_socket(),
        // Whoever names a socket has a service behind it in mind that is not this home's.
        lock: surroundings.msb_host.is_none().then(|| HomeLayout::new(surroundings.home_dir()).lock()),
    }
}
