//! A collection as Prometheus text (exposition format 0.0.4), and the small server that answers scrapes with it. The rendering
//! is pure. The server answers `GET /metrics` only and reads nothing but the request's head.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use msb_metrics::{Kind, Metric};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::point::{Collection, Point, Value};

/// Content type of the text format.
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Most scrapes answered at once.
const SCRAPES_MAX: usize = 16;
/// Longest time for the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// The text of one collection. Values have no timestamps: a scrape is now by definition, and stale series must go stale.
pub(crate) fn render(collection: &Collection) -> String {
    let mut text = String::new();
    let mut by_metric: BTreeMap<Metric, Vec<Point<'_>>> = BTreeMap::new();
    collection.points(|point| by_metric.entry(point.metric).or_default().push(point));
    for (metric, points) in by_metric {
        let definition = metric.definition();
        let name = metric.prometheus_name();
        let kind = if definition.kind == Kind::Counter { "counter" } else { "gauge" };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# HELP {name} {}", definition.meaning.replace('\\', "\\\\"));
        let _ = writeln!(text, "# TYPE {name} {kind}");
        for point in points {
            text.push_str(&name);
            text.push('{');
            // Two keys may become the same label name; the first in order wins, because a name twice breaks a whole scrape.
            let mut labels: BTreeMap<String, &str> = BTreeMap::new();
            for (key, value) in point.all_attributes() {
                labels.entry(label_name(key)).or_insert(value);
            }
            for (at, (key, value)) in labels.iter().enumerate() {
                let comma = if at == 0 { "" } else { "," };
                let _ = write!(text, "{comma}{key}=\"{}\"", escape(value));
            }
            let _ = match point.value {
                Value::Unsigned(value) => writeln!(text, "}} {value}"),
                Value::Float(value) => writeln!(text, "}} {value}"),
            };
        }
    }
    text
}

/// A label name: what is not `[a-zA-Z0-9_]` becomes `_`, and it does not begin with a digit.
fn label_name(key: &str) -> String {
    let mut name: String = key.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    if name.starts_with(|c: char| c.is_ascii_digit()) {
        name.insert(0, '_');
    }
    name
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The newest collection, shared with the server. The lock is held only to move one.
#[derive(Clone, Default)]
pub(crate) struct Newest(Arc<Mutex<Shown>>);

#[derive(Default)]
struct Shown {
    collection: Option<Arc<Collection>>,
    /// A scrape has seen it, and with it the last values of runs that ended.
    scraped: bool,
}

impl Newest {
    /// A collection takes the place of the one before; none if the daemon does not answer: values are never frozen. The last values
    /// of runs that ended stay until one scrape has seen them.
    pub(crate) fn put(&self, collection: Option<Collection>) {
        let mut shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = shown.collection.take().filter(|_| !shown.scraped);
        shown.collection = collection.map(|collection| {
            let mut collection = collection.keep_current();
            if let Some(before) = before {
                collection.add_ended(&before);
            }
            Arc::new(collection)
        });
        shown.scraped = false;
    }

    fn scrape(&self) -> Option<Arc<Collection>> {
        let mut shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shown.scraped = true;
        shown.collection.clone()
    }
}

/// Answers scrapes until the process ends.
pub(crate) async fn serve(listen: SocketAddr, newest: Newest) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
    tracing::info!(address = %listener.local_addr()?, "answering scrapes of /metrics");
    let scrapes = Arc::new(Semaphore::new(SCRAPES_MAX));
    loop {
        let permit = Arc::clone(&scrapes).acquire_owned().await?;
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a scrape");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let newest = newest.clone();
        tokio::spawn(async move {
            let service = hyper::service::service_fn(|request| {
                let answer = answer(&request, &newest);
                async { Ok::<_, std::convert::Infallible>(answer) }
            });
            let mut server = hyper::server::conn::http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).keep_alive(false);
            if let Err(error) = server.serve_connection(TokioIo::new(stream), service).await {
                tracing::debug!(%error, "a scrape broke off");
            }
            drop(permit);
        });
    }
}

fn answer(request: &Request<Incoming>, newest: &Newest) -> Response<Full<Bytes>> {
    let (status, content_type, body) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => {
            (StatusCode::OK, CONTENT_TYPE, newest.scrape().map(|collection| render(&collection)).unwrap_or_default())
        }
        (&Method::GET, "/") => (StatusCode::OK, "text/plain", "msb-metrics: see /metrics\n".into()),
        _ => (StatusCode::NOT_FOUND, "text/plain", "not found; see /metrics\n".into()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collect::{AttributeChoice, Memory, collect, tests::snapshot};

    #[test]
    fn text_has_one_head_for_each_metric_and_safe_labels() {
        let mut odd = snapshot();
        odd.sandboxes[0].labels = BTreeMap::from([
            ("a-b".into(), "x\"y\\z\n".into()),
            ("a.b".into(), "second".into()),
            ("9".into(), String::new()),
        ]);
        let text = render(&collect(&odd, &AttributeChoice::default(), &mut Memory::default()));
        let heads: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let mut unique = heads.clone();
        unique.dedup();
        assert_eq!(heads, unique);
        assert!(text.contains("# TYPE microsandbox_disk_io_bytes_total counter\n"));
        assert!(text.contains(r#"microsandbox_uptime_seconds{_9="",a_b="x\"y\\z\n",sandbox_id="00000000-0000-0000-0000-000000000001",sandbox_name="web"} 50.5"#), "{text}");
    }

    #[test]
    fn the_last_value_of_a_run_is_scraped_once_and_nothing_is_frozen() {
        let (choice, mut memory) = (AttributeChoice::default(), Memory::default());
        let newest = Newest::default();
        let mut ended = snapshot();
        ended.sandboxes[0].last = true;
        let shows = |newest: &Newest| newest.scrape().is_some_and(|seen| render(&seen).contains("uptime"));
        newest.put(Some(collect(&snapshot(), &choice, &mut memory)));
        assert!(shows(&newest) && shows(&newest));
        newest.put(Some(collect(&ended, &choice, &mut memory)));
        newest.put(Some(collect(&ended, &choice, &mut memory)));
        assert!(shows(&newest), "nobody had seen it");
        newest.put(Some(collect(&ended, &choice, &mut memory)));
        assert!(!shows(&newest));
        newest.put(None);
        assert!(newest.scrape().is_none());
    }
}
