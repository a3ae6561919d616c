//! Collects at an interval: asks the daemon, makes points, hands them on. One missing daemon is a debug line, not an error: the
//! exporter may start before it and outlive it. It never starts one and creates no file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use msb_protocol::control::MetricsSnapshot;
use msb_sdk::Client;
use tokio::time::MissedTickBehavior;

use crate::args::CollectArgs;
use crate::point::{AttributeChoice, Collection, Memory, collect};

/// Longest time a daemon may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Collects until the process ends; `take` gets each collection and must not block.
pub(crate) async fn run(socket: PathBuf, args: &CollectArgs, mut take: impl FnMut(Collection)) {
    let choice = AttributeChoice {
        no_labels: args.no_labels,
        include_keys: args.include_label_key.clone(),
        exclude_keys: args.exclude_label_key.clone(),
        run_id: args.emit_run_id,
        pid: args.emit_pid,
        values_per_key_max: args.max_label_values,
    };
    let mut memory = Memory::default();
    let mut ticks = tokio::time::interval(args.collect_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let (mut client, mut was_there) = (None, None);
    loop {
        ticks.tick().await;
        let there = match ask(&socket, &mut client).await {
            Ok(snapshot) => {
                take(collect(&snapshot, &choice, &mut memory));
                true
            }
            Err(error) => {
                tracing::debug!(%error, "no answer from msbd");
                client = None;
                false
            }
        };
        if was_there != Some(there) {
            was_there = Some(there);
            if there {
                tracing::info!(socket = %socket.display(), "reading from msbd");
            } else {
                tracing::info!(socket = %socket.display(), "no msbd answers; waiting for one");
            }
        }
    }
}

/// Asks over the connection of the time before, or a new one. Connecting never starts a daemon.
async fn ask(socket: &Path, client: &mut Option<Client>) -> anyhow::Result<MetricsSnapshot> {
    let ask = async {
        let connected = match client.take() {
            Some(connected) => connected,
            None => Client::at(socket).await?,
        };
        Ok(client.insert(connected).metrics().await?)
    };
    tokio::time::timeout(ANSWER_TIMEOUT, ask).await?
}
