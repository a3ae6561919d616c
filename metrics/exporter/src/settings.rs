//! What `otel` does, from flags over `OTEL_*` variables over defaults. Pure: files are read by `sender`.
//!
//! A variable for metrics (`OTEL_EXPORTER_OTLP_METRICS_…`) stands above the one for every signal (`OTEL_EXPORTER_OTLP_…`), as the
//! OpenTelemetry specification has it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::args::{Compression, OtelArgs};
use crate::endpoint::{self, EndpointError};
use crate::sender::SenderOptions;

/// Time between two exports when nobody says.
const FLUSH_INTERVAL: Duration = Duration::from_secs(10);
/// Longest time for one export when nobody says.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(30);

/// Everything decided.
#[derive(Debug)]
pub(crate) struct OtelSettings {
    /// How to reach the backend.
    pub sender: SenderOptions,
    /// Resource attributes over our own.
    pub resource: BTreeMap<String, String>,
    /// Time between two exports.
    pub flush_interval: Duration,
}

/// A variable that makes no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SettingsError {
    /// About the endpoint.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// A value that is none of those that exist.
    #[error("{name} is {value:?}; it must be {wanted}")]
    Variable {
        /// Of the variable.
        name: String,
        /// Its value.
        value: String,
        /// What it may be.
        wanted: &'static str,
    },
    /// One of certificate and key without the other.
    #[error(
        "a client certificate needs its key: set both OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and OTEL_EXPORTER_OTLP_CLIENT_KEY"
    )]
    HalfAnIdentity,
}

/// Decides.
pub(crate) fn resolve(
    args: &OtelArgs,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<OtelSettings, SettingsError> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    // The name that is set, and its value: the one for metrics first.
    let of_signal = |suffix: &str| {
        [format!("OTEL_EXPORTER_OTLP_METRICS_{suffix}"), format!("OTEL_EXPORTER_OTLP_{suffix}")]
            .into_iter()
            .find_map(|name| set(&name).map(|value| (name, value)))
    };
    let milliseconds = |found: Option<(String, String)>| match found {
        None => Ok(None),
        Some((name, value)) => match value.parse::<u64>() {
            Ok(ms) if ms > 0 => Ok(Some(Duration::from_millis(ms))),
            _ => Err(SettingsError::Variable { name, value, wanted: "milliseconds above 0" }),
        },
    };
    let endpoint = endpoint::resolve(args.endpoint.as_deref(), args.protocol, &variable)?;
    let mut headers = set("OTEL_EXPORTER_OTLP_HEADERS").map(|text| endpoint::parse_pairs(&text)).unwrap_or_default();
    headers
        .extend(set("OTEL_EXPORTER_OTLP_METRICS_HEADERS").map(|text| endpoint::parse_pairs(&text)).unwrap_or_default());
    headers.extend(args.header.iter().cloned());
    let mut resource = set("OTEL_RESOURCE_ATTRIBUTES").map(|text| endpoint::parse_pairs(&text)).unwrap_or_default();
    resource.extend(set("OTEL_SERVICE_NAME").map(|name| ("service.name".to_owned(), name)));
    resource.extend(args.resource.iter().cloned());
    let gzip = match (args.compression, of_signal("COMPRESSION")) {
        (Some(compression), _) => compression == Compression::Gzip,
        (None, None) => false,
        (None, Some((name, value))) => match value.as_str() {
            "gzip" => true,
            "none" => false,
            _ => return Err(SettingsError::Variable { name, value, wanted: "gzip or none" }),
        },
    };
    let file = |flag: &Option<PathBuf>, suffix: &str| {
        flag.clone().or_else(|| of_signal(suffix).map(|(_, path)| PathBuf::from(path)))
    };
    let client_cert = match (file(&args.client_cert, "CLIENT_CERTIFICATE"), file(&args.client_key, "CLIENT_KEY")) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        _ => return Err(SettingsError::HalfAnIdentity),
    };
    let timeout = match args.export_timeout {
        Some(timeout) => Some(timeout),
        None => milliseconds(of_signal("TIMEOUT"))?,
    };
    let flush_interval = match args.flush_interval {
        Some(interval) => Some(interval),
        None => {
            let name = "OTEL_METRIC_EXPORT_INTERVAL";
            milliseconds(set(name).map(|value| (name.to_owned(), value)))?
        }
    };
    let ca_cert = file(&args.ca_cert, "CERTIFICATE");
    let timeout = timeout.unwrap_or(EXPORT_TIMEOUT);
    Ok(OtelSettings {
        sender: SenderOptions { endpoint, headers, gzip, ca_cert, client_cert, timeout },
        resource,
        flush_interval: flush_interval.unwrap_or(FLUSH_INTERVAL),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn with(flags: &[&str], variables: &[(&str, &str)]) -> Result<OtelSettings, SettingsError> {
        let words = ["msb-metrics", "otel", "--endpoint", "http://c:4317"].iter().chain(flags);
        let Command::Otel(args) = Cli::try_parse_from(words).unwrap().command else { panic!("otel") };
        resolve(&args, |name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn flags_stand_over_variables_and_those_of_metrics_over_the_general_ones() {
        let settings = with(&[], &[]).unwrap();
        assert_eq!((settings.sender.timeout, settings.flush_interval), (EXPORT_TIMEOUT, FLUSH_INTERVAL));
        assert!(!settings.sender.gzip && settings.sender.headers.is_empty() && settings.resource.is_empty());
        let variables = [
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=1,b=1"),
            ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "b=2"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "none"),
            ("OTEL_EXPORTER_OTLP_METRICS_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "5000"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "2000"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca.pem"),
            ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "/c.pem"),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/k.pem"),
            ("OTEL_RESOURCE_ATTRIBUTES", "service.name=x,deployment.environment=test"),
            ("OTEL_SERVICE_NAME", "y"),
        ];
        let settings = with(&[], &variables).unwrap();
        assert_eq!((settings.sender.headers["a"].as_str(), settings.sender.headers["b"].as_str()), ("1", "2"));
        assert!(settings.sender.gzip);
        assert_eq!((settings.sender.timeout.as_secs(), settings.flush_interval.as_secs()), (5, 2));
        assert_eq!(settings.sender.ca_cert.unwrap(), PathBuf::from("/ca.pem"));
        assert_eq!(settings.sender.client_cert.unwrap(), ("/c.pem".into(), "/k.pem".into()));
        assert_eq!(settings.resource["service.name"], "y");
        assert_eq!(settings.resource["deployment.environment"], "test");
        let flags = [
            "--compression=none",
            "--export-timeout=7s",
            "--flush-interval=3s",
            "--header=b=3",
            "--resource=service.name=z",
            "--ca-cert=/other.pem",
        ];
        let settings = with(&flags, &variables).unwrap();
        assert!(!settings.sender.gzip);
        assert_eq!((settings.sender.timeout.as_secs(), settings.flush_interval.as_secs()), (7, 3));
        assert_eq!((settings.sender.headers["b"].as_str(), settings.resource["service.name"].as_str()), ("3", "z"));
        assert_eq!(settings.sender.ca_cert.unwrap(), PathBuf::from("/other.pem"));
    }

    #[test]
    fn variables_that_make_no_sense_are_named() {
        for (name, value) in [
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
            ("OTEL_EXPORTER_OTLP_METRICS_COMPRESSION", "zstd"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
        ] {
            let error = with(&[], &[(name, value)]).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(value), "{error}");
        }
        let half = with(&[], &[("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/k.pem")]);
        assert_eq!(half.unwrap_err(), SettingsError::HalfAnIdentity);
    }
}
