//! Brings published images to disk behind the caller's back.
//!
//! Waiting for the disk would make a load several times slower than unpacking with `tar`, which does not wait. So publishing renames
//! and returns, a record says `flushed: false` with the host's boot id, and this thread syncs parts, directories and at last the
//! record. A killed process loses nothing (the page cache is the kernel's). After a power cut the boot id differs, and an unflushed
//! image is verified against its digests before it is believed (see `check`).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::digest::Digest;
use crate::error::ImageError;
use crate::faults;
use crate::store::{Part, Shared};

/// The thread and how to reach it.
pub(super) struct Flusher {
    sender: Mutex<Option<Sender<Digest>>>,
    pending: Arc<Pending>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Pending {
    count: Mutex<u64>,
    idle: Condvar,
}

impl Flusher {
    pub(super) fn start(shared: Arc<Shared>) -> Result<Self, ImageError> {
        // Unbounded, but each entry is 32 bytes and comes from a load that wrote at least a record.
        let (sender, receiver) = channel();
        let pending = Arc::new(Pending::default());
        let thread = std::thread::Builder::new()
            .name("image-flush".into())
            .spawn({
                let pending = Arc::clone(&pending);
                move || run(&shared, &receiver, &pending)
            })
            .map_err(|source| ImageError::Io { action: "start a thread for", path: "images".into(), source })?;
        Ok(Self { sender: Mutex::new(Some(sender)), pending, thread: Mutex::new(Some(thread)) })
    }

    pub(super) fn submit(&self, image: Digest) {
        if let Some(sender) = &*self.sender.lock().unwrap_or_else(PoisonError::into_inner) {
            *self.pending.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            if sender.send(image).is_err() {
                self.pending.finish_one();
            }
        }
    }

    pub(super) fn wait_idle(&self) {
        let mut count = self.pending.count.lock().unwrap_or_else(PoisonError::into_inner);
        while *count > 0 {
            count = self.pending.idle.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        // Closing the channel ends the thread once it has done what was asked.
        drop(self.sender.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take()
            && thread.join().is_err()
        {
            tracing::error!("the image flush thread panicked");
        }
    }
}

impl Pending {
    fn finish_one(&self) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = count.saturating_sub(1);
        if *count == 0 {
            self.idle.notify_all();
        }
    }
}

fn run(shared: &Shared, receiver: &Receiver<Digest>, pending: &Pending) {
    while let Ok(image) = receiver.recv() {
        if let Err(error) = flush_image(shared, image) {
            // The record stays unflushed: the next open of another boot verifies the image.
            tracing::warn!(%image, %error, "image not flushed to disk");
        }
        pending.finish_one();
    }
}

fn flush_image(shared: &Shared, image: Digest) -> std::io::Result<()> {
    let parts: Vec<Part> = match shared.state().records.get(&image) {
        Some(record) if !record.flushed => record.parts().collect(),
        _ => return Ok(()),
    };
    for part in parts {
        faults::step("flush: a part");
        match part {
            Part::Layer(diff_id) => {
                sync(&shared.paths.layer_data(diff_id))?;
                sync(&shared.paths.layer_tree(diff_id))?;
                sync(&shared.paths.layer(diff_id))?;
            }
            other => sync(&shared.paths.part(other))?,
        }
    }
    for directory in [shared.paths.blobs(), shared.paths.layers(), shared.paths.roots()] {
        sync(&directory)?;
    }
    let path: PathBuf = {
        let mut state = shared.state();
        let Some(record) = state.records.get_mut(&image) else { return Ok(()) };
        faults::step("flush: the record");
        record.flushed = true;
        let record = record.clone();
        shared.write_record(&record).map_err(std::io::Error::other)?;
        shared.paths.record(image)
    };
    sync(&path)?;
    sync(&shared.paths.records())
}

/// Syncs a file or directory; one that was removed meanwhile needs no syncing.
fn sync(path: &Path) -> std::io::Result<()> {
    match File::open(path) {
        Ok(file) => file.sync_all(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
