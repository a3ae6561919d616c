//! Collections as lines of JSON on standard output: one line for each point, for `jq` and for a first look.

use std::io::Write as _;
use std::sync::mpsc;

use serde_json::json;
use tokio::sync::oneshot;

use crate::point::{Collection, Point, Value};

/// Collections that may wait for a slow reader; further ones are left out.
const WAITING_MAX: usize = 4;

/// Hands collections to the thread that writes, so that a reader who stops reading never stops the collector.
pub(crate) struct Lines(mpsc::SyncSender<String>);

impl Lines {
    /// Queues a collection.
    pub(crate) fn write(&self, collection: Option<Collection>) {
        let Some(collection) = collection.map(Collection::keep_new) else { return };
        let mut text = String::new();
        collection.points(|point| text.push_str(&line(&point)));
        if self.0.try_send(text).is_err() {
            tracing::debug!("the reader of standard output is slow, a collection is left out");
        }
    }
}

/// Starts the writing thread; the receiver tells when it cannot write any more.
pub(crate) fn writer() -> (Lines, oneshot::Receiver<std::io::Error>) {
    let (sender, waiting) = mpsc::sync_channel::<String>(WAITING_MAX);
    let (failed, outcome) = oneshot::channel();
    std::thread::spawn(move || {
        let mut out = std::io::stdout().lock();
        for text in waiting {
            if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
                // The receiver is gone only when the process ends.
                let _ = failed.send(error);
                return;
            }
        }
    });
    (Lines(sender), outcome)
}

/// A reader that went away (`| head`) is a good end.
pub(crate) fn outcome(error: Result<std::io::Error, oneshot::error::RecvError>) -> anyhow::Result<()> {
    match error {
        Ok(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        Ok(error) => Err(anyhow::Error::new(error).context("cannot write to standard output")),
        Err(_) => Ok(()),
    }
}

fn line(point: &Point<'_>) -> String {
    let definition = point.metric.definition();
    let value = match point.value {
        Value::Unsigned(value) => json!(value),
        Value::Float(value) => json!(value),
    };
    let line = json!({
        "name": definition.name,
        "unit": definition.unit.as_str(),
        "kind": definition.kind,
        "value": value,
        "time_unix_nano": point.time_ns,
        "start_time_unix_nano": point.start_ns,
        "attributes": point.all_attributes().collect::<std::collections::BTreeMap<_, _>>(),
    });
    format!("{line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collect::{AttributeChoice, Memory, collect, tests::snapshot};

    #[test]
    fn each_point_is_one_line_of_json() {
        let collection = collect(&snapshot(), &AttributeChoice::default(), &mut Memory::default());
        let mut lines = 0;
        collection.points(|point| {
            let text = line(&point);
            assert_eq!(text.matches('\n').count(), 1);
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(value["name"], point.metric.name());
            let of_the_service = point.metric.definition().family == msb_metrics::Family::Daemon;
            assert_eq!(value["attributes"]["sandbox.name"] == "web", !of_the_service);
            lines += 1;
        });
        assert!(lines > 20);
    }
}
