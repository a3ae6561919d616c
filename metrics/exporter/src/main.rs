//! `msb-metrics`: reads the metrics of a running msbd and sends them to an OTLP backend, to standard output or to Prometheus.
//!
//! ```text
//!   msbd socket ─► collector ─► point ─► export (buffer, retry) ─► sender ─► backend
//!                                  ├───► prometheus (newest only) ◄─ scrape
//!                                  └───► standard output
//! ```
//!
//! It only reads. It never starts a daemon, never creates a file, and a slow backend never slows a sandbox.

#![forbid(unsafe_code)]

mod args;
mod buffer;
mod collector;
mod endpoint;
mod export;
mod otlp;
mod point;
mod prometheus;
mod retry;
mod self_metrics;
mod sender;
mod stdout;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser as _;
use msb_protocol::paths::Surroundings;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{Cli, Command, Compression, LogFormat, OtelArgs};
use crate::sender::{Sender, SenderOptions};

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
    let socket = socket(cli.msb_home);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let ended = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    match cli.command {
        Command::Otel(args) => otel(socket, args, ended).await,
        Command::Stdout(args) => {
            let (lines, failed) = stdout::writer();
            tokio::select! {
                () = collector::run(socket, &args, |collection| lines.write(&collection)) => Ok(()),
                error = failed => stdout::outcome(error),
                () = ended => Ok(()),
            }
        }
        Command::Prometheus(args) => {
            let newest = prometheus::Newest::default();
            let take = |collection| {
                if let Ok(mut newest) = newest.write() {
                    *newest = Some(Arc::new(collection));
                }
            };
            tokio::select! {
                () = collector::run(socket, &args.collect, take) => Ok(()),
                outcome = prometheus::serve(args.listen, Arc::clone(&newest)) => outcome,
                () = ended => Ok(()),
            }
        }
    }
}

async fn otel(socket: PathBuf, args: OtelArgs, ended: impl Future<Output = ()>) -> anyhow::Result<()> {
    let variable = |name: &str| std::env::var(name).ok();
    let endpoint = endpoint::resolve(args.endpoint.as_deref(), args.protocol, variable)?;
    let pairs = |name: &str| variable(name).map(|text| endpoint::parse_pairs(&text)).unwrap_or_default();
    let mut headers = pairs("OTEL_EXPORTER_OTLP_HEADERS");
    headers.extend(args.header);
    let mut resource: BTreeMap<String, String> = pairs("OTEL_RESOURCE_ATTRIBUTES");
    resource.extend(variable("OTEL_SERVICE_NAME").map(|name| ("service.name".to_owned(), name)));
    resource.extend(args.resource);
    let gzip = match args.compression {
        Some(compression) => compression == Compression::Gzip,
        None => variable("OTEL_EXPORTER_OTLP_COMPRESSION").is_some_and(|value| value == "gzip"),
    };
    let ca_cert = args.ca_cert.or_else(|| variable("OTEL_EXPORTER_OTLP_CERTIFICATE").map(PathBuf::from));
    let options = SenderOptions { endpoint, headers, gzip, ca_cert, timeout: args.export_timeout };
    tracing::info!(endpoint = options.endpoint.url, protocol = ?options.endpoint.protocol, "exporting");
    let own = self_metrics::SelfMetrics::new(&options, args.flush_interval)?;
    let mut sender = Sender::new(options)?;
    let queue = export::Queue::new(args.max_buffered);
    tokio::select! {
        () = collector::run(socket, &args.collect, |collection| queue.with(|buffer| buffer.push(collection))) => {}
        () = export::run(&queue, &mut sender, &resource, &own, args.flush_interval) => {}
        () = ended => {}
    }
    let last = export::flush(&queue, &mut sender, &resource, &own);
    if !matches!(tokio::time::timeout(LAST_EXPORT, last).await, Ok(Ok(()))) {
        tracing::warn!(lost = queue.with(|buffer| buffer.len()), "ended before everything was exported");
    }
    tokio::task::spawn_blocking(move || own.shutdown()).await?;
    Ok(())
}

/// The control socket of the service to read.
fn socket(msb_home: Option<PathBuf>) -> PathBuf {
    let mut surroundings = Surroundings::from_environment(rustix::process::getuid().as_raw());
    if msb_home.is_some() {
        surroundings.msb_home = msb_home;
        surroundings.msb_host = None;
    }
    surroundings.control_socket()
}
