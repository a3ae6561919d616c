//! Makes the index and the files agree when a daemon starts: what an earlier one began is undone or finished, what it finished is
//! seen. Runs before the actor answers anything.

use std::collections::BTreeSet;

use msb_image::snapshot::{SnapshotError, SnapshotFiles};
use msb_protocol::id::SandboxName;
use msb_protocol::snapshot::SnapshotManifest;

use crate::journal::{Change, Journal, SnapshotPhase, SnapshotRecord};

/// Every snapshot that is seen from now on. A failure is told and leaves what it is about for the next start.
pub(super) async fn recover(
    files: SnapshotFiles,
    journal: Journal,
    found: Vec<SnapshotRecord>,
) -> Vec<(SandboxName, String, SnapshotManifest)> {
    let on_disk = files.clone();
    let swept = blocking(move || on_disk.sweep()).await;
    let mut known: BTreeSet<SandboxName> = BTreeSet::new();
    let mut index = Vec::new();
    for record in found {
        known.insert(record.name.clone());
        match record.phase {
            SnapshotPhase::Ready { id, manifest } if !manifest.transient => index.push((record.name, id, *manifest)),
            // A transient one is of no use to anybody any more.
            SnapshotPhase::Making | SnapshotPhase::Removing | SnapshotPhase::Ready { .. } => {
                let (on_disk, name) = (files.clone(), record.name.clone());
                if blocking(move || on_disk.remove(&name)).await.is_some() {
                    tracing::warn!(snapshot = %record.name, "an unfinished snapshot was removed");
                    forget(&journal, record.name).await;
                }
            }
        }
    }
    // A directory under its own name was whole before it got it, and a record came before it. Without one the journal was lost.
    for name in swept.unwrap_or_default().into_iter().filter(|name| !known.contains(name)) {
        let (on_disk, own) = (files.clone(), name.clone());
        let Some((id, manifest)) = blocking(move || on_disk.read(&own)).await else { continue };
        if manifest.transient {
            let (on_disk, own) = (files.clone(), name.clone());
            let _ = blocking(move || on_disk.remove(&own)).await;
            continue;
        }
        tracing::warn!(snapshot = %name, "a snapshot that the journal did not know is taken in again");
        let phase = SnapshotPhase::Ready { id: id.to_string(), manifest: Box::new(manifest.clone()) };
        let record = SnapshotRecord { name: name.clone(), phase };
        match journal.write(Change::PutSnapshot(Box::new(record), None)).await {
            Ok(()) => index.push((name, id.to_string(), manifest)),
            Err(error) => tracing::error!(snapshot = %name, %error, "it could not be written down"),
        }
    }
    index
}

async fn forget(journal: &Journal, name: SandboxName) {
    if let Err(error) = journal.write(Change::RemoveSnapshot(name.clone())).await {
        tracing::error!(snapshot = %name, %error, "the record of an unfinished snapshot stays");
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, SnapshotError> + Send + 'static) -> Option<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => Some(value),
        Ok(Err(error)) => {
            tracing::warn!(%error, "the files of a snapshot cannot be used");
            None
        }
        Err(error) => {
            tracing::error!(%error, "work on snapshots ended early");
            None
        }
    }
}
