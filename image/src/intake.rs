//! A blob on its way in: one thread reads, hashes and stores it, a worker unpacks the same pieces as a layer meanwhile.
//!
//! Used by archive loads and by registry downloads. Between the two threads at most [`PIECES_QUEUED`] pieces wait, so memory stays
//! the same whatever the blob's size. It never decides what the blob is for.

use std::fs::{self, File};
use std::io::{self, BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::compression::Compression;
use crate::digest::{Digest, Hasher};
use crate::error::{ImageError, io_error};
use crate::faults;
use crate::layer::{Dropped, Hashing, import_layer};
use crate::limits::Limits;
use crate::store::LayerRecord;

/// Bytes that go to the worker at a time.
pub(crate) const PIECE_BYTES: usize = 256 << 10;
/// Pieces that may wait for the worker.
const PIECES_QUEUED: usize = 8;

/// A layer's two files in a scratch directory, or in the store.
#[derive(Clone, Debug)]
pub(crate) struct ReadyLayer {
    pub(crate) diff_id: Digest,
    pub(crate) compression: Compression,
    pub(crate) tar_bytes: u64,
    pub(crate) data_bytes: u64,
    pub(crate) dropped: Dropped,
    /// `None` when the store has it.
    pub(crate) files: Option<PathBuf>,
}

impl ReadyLayer {
    pub(crate) fn of_store(record: &LayerRecord, dropped: Dropped) -> Self {
        Self {
            diff_id: record.diff_id,
            compression: record.compression,
            tar_bytes: record.tar_bytes,
            data_bytes: record.data_bytes,
            dropped,
            files: None,
        }
    }
}

/// Takes a layer apart into `directory`, which is made.
pub(crate) fn unpack(
    source: impl BufRead,
    compression: Compression,
    directory: &Path,
    limits: &Limits,
    name: &str,
) -> Result<ReadyLayer, ImageError> {
    faults::step("layer: make");
    fs::create_dir(directory).map_err(|error| io_error("create", directory, error))?;
    let hashing = if compression == Compression::None { Hashing::Caller } else { Hashing::Here };
    let imported = import_layer(source, compression, directory, limits, name, hashing)?;
    Ok(ReadyLayer {
        // Where the caller hashes, the caller sets it.
        diff_id: imported.diff_id.unwrap_or(Digest::of(b"")),
        compression,
        tar_bytes: imported.tree.tar_bytes,
        data_bytes: imported.tree.data_bytes,
        dropped: imported.tree.dropped,
        files: Some(directory.to_path_buf()),
    })
}

/// Pieces to the worker, and empty ones back from it.
type WorkerEnd = (SyncSender<Vec<u8>>, Receiver<Vec<u8>>);

/// The reading side's half of a blob.
pub(crate) struct Intake<'p> {
    file: File,
    path: &'p Path,
    hasher: Hasher,
    worker: Option<WorkerEnd>,
}

impl<'p> Intake<'p> {
    pub(crate) fn new(file: File, path: &'p Path) -> Self {
        Self { file, path, hasher: Hasher::default(), worker: None }
    }

    /// What a worker reads from: everything that is put from now on.
    pub(crate) fn start_worker(&mut self) -> Pieces {
        let (sender, receiver) = sync_channel(PIECES_QUEUED);
        let (give_back, spares) = sync_channel(PIECES_QUEUED + 1);
        self.worker = Some((sender, spares));
        Pieces { receiver, give_back, current: Vec::new(), position: 0 }
    }

    /// A piece that came back from the worker, or a new one.
    pub(crate) fn empty_piece(&self) -> Vec<u8> {
        self.worker
            .as_ref()
            .and_then(|(_, spares)| spares.try_recv().ok())
            .unwrap_or_else(|| Vec::with_capacity(PIECE_BYTES))
    }

    /// Takes a piece that came.
    pub(crate) fn put(&mut self, piece: Vec<u8>) -> Result<(), ImageError> {
        faults::step("blob: a piece");
        self.file.write_all(&piece).map_err(|error| io_error("write", self.path, error))?;
        self.replay(piece);
        Ok(())
    }

    /// Takes a piece that the file has already.
    pub(crate) fn replay(&mut self, piece: Vec<u8>) {
        self.hasher.update(&piece);
        if let Some((sender, _)) = &self.worker
            && sender.send(piece).is_err()
        {
            // The worker gave up: its error counts only if the blob turns out to be a whole layer.
            self.worker = None;
        }
    }

    pub(crate) fn finish(self) -> Digest {
        drop(self.worker);
        self.hasher.finish()
    }
}

/// The worker's half: pieces in order, then the end.
pub(crate) struct Pieces {
    receiver: Receiver<Vec<u8>>,
    give_back: SyncSender<Vec<u8>>,
    current: Vec<u8>,
    position: usize,
}

impl BufRead for Pieces {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.position == self.current.len()
            && let Ok(next) = self.receiver.recv()
        {
            let mut old = std::mem::replace(&mut self.current, next);
            self.position = 0;
            if old.capacity() > 0 {
                old.clear();
                // A full channel or a reader that is done: the piece is simply freed.
                let _ = self.give_back.try_send(old);
            }
        }
        Ok(&self.current[self.position..])
    }

    fn consume(&mut self, amount: usize) {
        self.position = (self.position + amount).min(self.current.len());
    }
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(buffer.len());
        buffer[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}
