//! Where to send and how: flags over `OTEL_*` variables, and the protocol from the endpoint when nobody names it. Pure.

use std::collections::BTreeMap;

/// How OTLP is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Protocol {
    /// OTLP/gRPC.
    Grpc,
    /// OTLP/HTTP with protobuf bodies.
    Http,
}

/// Where to send. For HTTP the URL is used exactly as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// The URL.
    pub url: String,
    /// How.
    pub protocol: Protocol,
}

/// Why there is no endpoint.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EndpointError {
    /// Nobody named one.
    #[error("no endpoint: give --endpoint URL or set OTEL_EXPORTER_OTLP_ENDPOINT")]
    Missing,
    /// It is no URL.
    #[error("endpoint {0:?} is not a URL of http or https")]
    NotAUrl(String),
    /// OTEL_EXPORTER_OTLP_PROTOCOL has a value that is not spoken here.
    #[error("OTEL_EXPORTER_OTLP_PROTOCOL is {0:?}; grpc and http/protobuf are spoken here")]
    Protocol(String),
}

/// Decides endpoint and protocol.
///
/// `--endpoint` and `OTEL_EXPORTER_OTLP_METRICS_ENDPOINT` are used as they are; `OTEL_EXPORTER_OTLP_ENDPOINT` is a base URL to which
/// HTTP adds `/v1/metrics` (OpenTelemetry specification, "OTLP Exporter Configuration"). Without a named protocol, port 4318 or a
/// path means HTTP, anything else gRPC.
pub(crate) fn resolve(
    flag: Option<&str>,
    protocol: Option<Protocol>,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Endpoint, EndpointError> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    let own = flag.map(str::to_owned).or_else(|| set("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"));
    let base = set("OTEL_EXPORTER_OTLP_ENDPOINT");
    let protocol = match protocol {
        Some(protocol) => Some(protocol),
        // A flag names a new endpoint, so the environment's protocol belongs to another one.
        None if flag.is_some() => None,
        None => {
            match set("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL").or_else(|| set("OTEL_EXPORTER_OTLP_PROTOCOL")).as_deref() {
                None => None,
                Some("grpc") => Some(Protocol::Grpc),
                Some("http/protobuf") => Some(Protocol::Http),
                Some(other) => return Err(EndpointError::Protocol(other.into())),
            }
        }
    };
    let (url, is_base) = match (own, base) {
        (Some(url), _) => (url, false),
        (None, Some(url)) => (url, true),
        (None, None) => return Err(EndpointError::Missing),
    };
    let (port, path) = port_and_path(&url).ok_or_else(|| EndpointError::NotAUrl(url.clone()))?;
    let has_path = !is_bare(path);
    let protocol = protocol.unwrap_or(if port == Some(4318) || has_path { Protocol::Http } else { Protocol::Grpc });
    let url =
        if is_base && protocol == Protocol::Http { format!("{}/v1/metrics", url.trim_end_matches('/')) } else { url };
    Ok(Endpoint { url, protocol })
}

impl Endpoint {
    /// Whether the URL has no path of its own.
    pub(crate) fn path_is_bare(&self) -> bool {
        port_and_path(&self.url).is_some_and(|(_, path)| is_bare(path))
    }
}

fn is_bare(path: &str) -> bool {
    path.is_empty() || path == "/"
}

fn port_and_path(url: &str) -> Option<(Option<u16>, &str)> {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"))?;
    let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    let host_port = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    if host_port.is_empty() || host_port.contains(char::is_whitespace) {
        return None;
    }
    // A colon inside brackets belongs to an IPv6 address.
    let after_host = host_port.rfind(']').map_or(host_port, |at| &host_port[at..]);
    match after_host.rsplit_once(':') {
        Some((_, port)) => Some((Some(port.parse().ok()?), path)),
        None => Some((None, path)),
    }
}

/// `key=value,key=value` with percent-encoding, as in `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_EXPORTER_OTLP_HEADERS`
/// (W3C Baggage form). Entries that are no pair are passed over.
pub(crate) fn parse_pairs(text: &str) -> BTreeMap<String, String> {
    let decode = |part: &str| {
        let bytes = part.trim().as_bytes();
        let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
        while at < bytes.len() {
            let escaped = (bytes[at] == b'%')
                .then(|| bytes.get(at + 1..at + 3))
                .flatten()
                .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
            out.push(escaped.unwrap_or(bytes[at]));
            at += if escaped.is_some() { 3 } else { 1 };
        }
        String::from_utf8_lossy(&out).into_owned()
    };
    text.split(',')
        .filter_map(|entry| entry.split_once('='))
        .filter(|(key, _)| !key.trim().is_empty())
        .map(|(key, value)| (decode(key), decode(value)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(
        flag: Option<&str>,
        protocol: Option<Protocol>,
        variables: &[(&str, &str)],
    ) -> Result<Endpoint, EndpointError> {
        resolve(flag, protocol, |name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn the_protocol_follows_the_endpoint_when_nobody_names_it() {
        for (url, protocol) in [
            ("http://localhost:4317", Protocol::Grpc),
            ("https://collector.example", Protocol::Grpc),
            ("http://localhost:4318", Protocol::Http),
            ("https://otlp.example.com/v1/metrics", Protocol::Http),
            ("http://[::1]:4318/", Protocol::Http),
            ("http://[::1]", Protocol::Grpc),
        ] {
            let endpoint = with(Some(url), None, &[]).unwrap();
            assert_eq!((endpoint.url.as_str(), endpoint.protocol), (url, protocol));
        }
        let forced = with(Some("http://x:4318"), Some(Protocol::Grpc), &[]).unwrap();
        assert_eq!(forced.protocol, Protocol::Grpc);
    }

    #[test]
    fn variables_stand_below_flags_and_only_the_base_gets_a_path() {
        let base = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318/")];
        assert_eq!(with(None, None, &base).unwrap().url, "http://c:4318/v1/metrics");
        let own = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318"),
            ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://d:4318"),
        ];
        assert_eq!(with(None, None, &own).unwrap().url, "http://d:4318");
        assert_eq!(with(Some("http://e:4317"), None, &own).unwrap().url, "http://e:4317");
        let grpc = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4317"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")];
        assert_eq!(
            with(None, None, &grpc).unwrap(),
            Endpoint { url: "http://c:4317".into(), protocol: Protocol::Grpc }
        );
        let json = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")];
        assert_eq!(with(None, None, &json), Err(EndpointError::Protocol("http/json".into())));
    }

    #[test]
    fn what_is_no_url_is_refused() {
        assert_eq!(with(None, None, &[]), Err(EndpointError::Missing));
        for bad in ["localhost:4317", "ftp://x", "http://", "http://x:port", "http:// x"] {
            assert!(with(Some(bad), None, &[]).is_err(), "{bad}");
        }
    }

    #[test]
    fn pairs_are_decoded() {
        let pairs = parse_pairs("a=1, b = two%2Cparts ,bad,=x,c=%zz");
        assert_eq!(
            pairs.into_iter().collect::<Vec<_>>(),
            [("a".into(), "1".into()), ("b".into(), "two,parts".into()), ("c".into(), "%zz".into())]
                as [(String, String); 3]
        );
    }
}
