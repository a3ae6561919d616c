//! The command line of `msb-metrics`. Types only; what they mean is decided in `main`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::endpoint::Protocol;

/// Ships the metrics of every sandbox to any OTLP backend
///
/// Only reads: it asks a running msbd over its socket, never starts one, and waits quietly while there is none.
#[derive(Debug, Parser)]
#[command(name = "msb-metrics", version, max_term_width = 100)]
pub(crate) struct Cli {
    /// What to do with the metrics
    #[command(subcommand)]
    pub command: Command,
    /// How much to log, to standard error
    #[arg(long, global = true, default_value = "info", value_name = "LEVEL")]
    pub log_level: tracing::Level,
    /// How to log
    #[arg(long, global = true, default_value = "text")]
    pub log_format: LogFormat,
    /// Home of the service to read, in place of $MSB_HOME
    #[arg(long, global = true, value_name = "DIR")]
    pub msb_home: Option<PathBuf>,
}

/// What to do with the metrics.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Send them to an OTLP backend over gRPC or HTTP
    Otel(OtelArgs),
    /// Print each collection as lines of JSON
    Stdout(CollectArgs),
    /// Answer Prometheus scrapes
    Prometheus(PrometheusArgs),
}

/// How logs look.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Compression of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Compression {
    /// As they are.
    None,
    /// gzip.
    Gzip,
}

/// What is collected.
#[derive(Debug, Args)]
pub(crate) struct CollectArgs {
    /// Leave out all labels
    #[arg(long)]
    pub no_labels: bool,
    /// Leave out labels of this key (repeatable)
    #[arg(long, value_name = "KEY")]
    pub exclude_label_key: Vec<String>,
    /// Only labels of these keys (repeatable)
    #[arg(long, value_name = "KEY")]
    pub include_label_key: Vec<String>,
    /// Most different values of one label key that are sent; further ones are left out and counted (0: no limit)
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub max_label_values: usize,
    /// Add sandbox.run_id, which is new at each boot
    #[arg(long)]
    pub emit_run_id: bool,
    /// Add sandbox.pid
    #[arg(long)]
    pub emit_pid: bool,
    /// Time between two collections
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_interval)]
    pub collect_interval: Duration,
}

/// Where and how to send.
#[derive(Debug, Args)]
pub(crate) struct OtelArgs {
    /// URL of the backend, used exactly as given (else the OTEL_EXPORTER_OTLP_* variables)
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// Protocol; if absent, port 4318 or a path in the URL means http, anything else grpc
    #[arg(long)]
    pub protocol: Option<Protocol>,
    /// Compression of requests
    #[arg(long)]
    pub compression: Option<Compression>,
    /// Certificate authority of the backend, PEM, in place of the system's
    #[arg(long, value_name = "FILE")]
    pub ca_cert: Option<PathBuf>,
    /// Certificate we show the backend, PEM
    #[arg(long, value_name = "FILE", requires = "client_key")]
    pub client_cert: Option<PathBuf>,
    /// Key of that certificate, PEM
    #[arg(long, value_name = "FILE", requires = "client_cert")]
    pub client_key: Option<PathBuf>,
    /// Header or gRPC metadata (repeatable); over OTEL_EXPORTER_OTLP_HEADERS
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_pair)]
    pub header: Vec<(String, String)>,
    /// Resource attribute (repeatable); over OTEL_RESOURCE_ATTRIBUTES
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_pair)]
    pub resource: Vec<(String, String)>,
    /// What is collected
    #[command(flatten)]
    pub collect: CollectArgs,
    /// Time between two exports (10s if neither this nor OTEL_METRIC_EXPORT_INTERVAL is given)
    #[arg(long, value_name = "DURATION", value_parser = parse_interval)]
    pub flush_interval: Option<Duration>,
    /// Collections kept while the backend is away; the oldest are dropped and counted
    #[arg(long, value_name = "N", default_value = "60", value_parser = parse_count)]
    pub max_buffered: usize,
    /// Longest time for one export (30s if neither this nor OTEL_EXPORTER_OTLP_TIMEOUT is given)
    #[arg(long, value_name = "DURATION", value_parser = parse_interval)]
    pub export_timeout: Option<Duration>,
}

/// Where to answer scrapes.
#[derive(Debug, Args)]
pub(crate) struct PrometheusArgs {
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9464")]
    pub listen: SocketAddr,
    /// What is collected
    #[command(flatten)]
    pub collect: CollectArgs,
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    match msb_protocol::quantity::parse_duration_ms(text) {
        Ok(0) => Err("must be greater than 0".into()),
        Ok(ms) => Ok(Duration::from_millis(ms)),
        Err(error) => Err(error.to_string()),
    }
}

fn parse_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be greater than 0".into()),
        Ok(count) => Ok(count),
        Err(_) => Err("is not a whole number".into()),
    }
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("is not KEY=VALUE".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn zero_intervals_and_counts_are_refused() {
        for bad in [
            ["--collect-interval", "0"],
            ["--flush-interval", "0s"],
            ["--max-buffered", "0"],
            ["--export-timeout", "0"],
        ] {
            let args = ["msb-metrics", "otel", "--endpoint", "http://x:4317"].into_iter().chain(bad);
            assert!(Cli::try_parse_from(args).is_err(), "{bad:?}");
        }
    }
}
