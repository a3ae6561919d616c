//! One layer from a registry: resumed where an earlier try ended, hashed, written and unpacked in the same pass.
//!
//! The bytes go to `partial/<hex>`, which outlives a failed pull and a killed daemon. Only when the digest agrees do blob and layer get
//! their final names. A transfer that was damaged on its way is thrown away and fetched once more from the start.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::compression::{Compression, SNIFF_BYTES, sniff};
use crate::error::{ImageError, io_error};
use crate::faults;
use crate::intake::{Intake, PIECE_BYTES, ReadyLayer, unpack};
use crate::limits::Limits;
use crate::registry::manifest::Blob;
use crate::registry::wire::{Attempt, Waiter, Wire};

/// Times that a blob which came damaged is fetched from its start again.
const FRESH_STARTS: u32 = 2;

/// What a download tells its pull.
pub(super) trait Watcher {
    /// So many bytes of the blob are here.
    fn at(&self, bytes: u64);
    /// A try failed and there will be another.
    fn retry(&self, reason: &str, wait: std::time::Duration);
}

/// Fetches a layer from the first of `wires` that gives it: its blob is then the partial file, its files are in `scratch`.
pub(super) fn fetch(
    wires: &[&Wire],
    waiter: &Waiter,
    blob: &Blob,
    partial: &Path,
    scratch: &Path,
    limits: &Limits,
    watcher: &dyn Watcher,
) -> Result<ReadyLayer, ImageError> {
    let mut last = None;
    for wire in wires {
        for start in 0..=FRESH_STARTS {
            let directory = scratch.join(format!("layer-{}", blob.digest.hex()));
            // An earlier start may have left one.
            let _ = fs::remove_dir_all(&directory);
            match fetch_from(wire, waiter, blob, partial, &directory, limits, watcher) {
                Ok(layer) => return Ok(layer),
                Err(error @ (ImageError::Digest { .. } | ImageError::Size { .. })) => {
                    // What is in the file is of no use to anybody.
                    let _ = fs::remove_file(partial);
                    if start < FRESH_STARTS {
                        watcher.retry(&error.to_string(), std::time::Duration::ZERO);
                    }
                    last = Some(error);
                }
                Err(error @ (ImageError::Layer { .. } | ImageError::Limit { .. })) => {
                    // As it was meant to be, and of no use.
                    let _ = fs::remove_file(partial);
                    return Err(error);
                }
                Err(
                    error @ (ImageError::Registry { .. }
                    | ImageError::RegistryDenied { .. }
                    | ImageError::RegistryNotFound { .. }),
                ) => {
                    last = Some(error);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
    }
    Err(last.unwrap_or(ImageError::Cancelled))
}

fn fetch_from(
    wire: &Wire,
    waiter: &Waiter,
    blob: &Blob,
    partial: &Path,
    directory: &Path,
    limits: &Limits,
    watcher: &dyn Watcher,
) -> Result<ReadyLayer, ImageError> {
    let label = blob.digest.short();
    let file = open_partial(partial, blob.bytes)?;
    let replay = file.try_clone().map_err(|error| io_error("read", partial, error))?;
    let (digest, layer) = std::thread::scope(|scope| {
        let mut worker = None;
        let mut intake = Intake::new(file, partial);
        // The first piece tells how the layer is packed, and starts the worker.
        let mut take = |piece: Vec<u8>, kept: bool| -> Result<(), ImageError> {
            if worker.is_none() {
                let head = &piece[..piece.len().min(SNIFF_BYTES)];
                let compression = sniff(head).map_err(|other| ImageError::Layer {
                    layer: label.clone(),
                    reason: format!("it is compressed with {other}, which OCI layers are not"),
                })?;
                let source = intake.start_worker();
                let label = &label;
                worker = Some(scope.spawn(move || unpack(source, compression, directory, limits, label)));
            }
            if kept {
                intake.replay(piece);
                Ok(())
            } else {
                intake.put(piece)
            }
        };
        let mut here = replay_kept(replay, partial, &mut take)?;
        watcher.at(here);
        let mut failures = 0;
        while here < blob.bytes {
            let before = here;
            let outcome = stream(wire, blob, &mut here, &mut take, watcher);
            if here > before {
                failures = 0;
            }
            match outcome {
                Ok(()) => {}
                Err(Attempt::Final(error)) => return Err(error),
                Err(Attempt::Again { reason, after }) => {
                    failures += 1;
                    let wait = waiter.retry.wait(failures, after, chance()).ok_or_else(|| ImageError::Registry {
                        registry: wire.host.clone(),
                        reason: match after {
                            Some(after) if after > waiter.retry.longest_asked => {
                                format!("{reason} and asks to wait {} s", after.as_secs())
                            }
                            _ => reason.clone(),
                        },
                    })?;
                    watcher.retry(&reason, wait);
                    waiter.pause(wait)?;
                }
            }
        }
        if blob.bytes == 0 {
            take(Vec::new(), true)?;
        }
        let digest = intake.finish();
        // A panic of the worker is a defect of ours; it must fail this pull and nothing else.
        let layer = worker.map(|worker| {
            worker.join().unwrap_or_else(|_| Err(ImageError::Corrupt("unpacking a layer panicked".into())))
        });
        Ok::<_, ImageError>((digest, layer))
    })?;
    // A damaged transfer can look like a damaged layer, so the digest is looked at first.
    if digest != blob.digest {
        return Err(ImageError::Digest {
            what: format!("layer {label}"),
            expected: blob.digest.to_string(),
            actual: digest.to_string(),
        });
    }
    let mut layer = layer.unwrap_or_else(|| Err(ImageError::Corrupt("a layer that nobody unpacked".into())))?;
    // An uncompressed layer was hashed once, as a blob.
    if layer.compression == Compression::None {
        layer.diff_id = digest;
    }
    Ok(layer)
}

/// Opens the unfinished file. One that is longer than the blob is of another blob or another mind.
fn open_partial(path: &Path, bytes: u64) -> Result<File, ImageError> {
    faults::step("blob: open");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| io_error("create", path, error))?;
    let length = file.metadata().map_err(|error| io_error("read", path, error))?.len();
    // One that is shorter than the magic bytes does not tell how the layer is packed.
    if length > bytes || length < SNIFF_BYTES as u64 {
        file.set_len(0).map_err(|error| io_error("write", path, error))?;
    }
    Ok(file)
}

/// Takes in what an earlier try has left. The two handles share one position, so what follows is appended.
fn replay_kept(
    mut file: File,
    path: &Path,
    take: &mut dyn FnMut(Vec<u8>, bool) -> Result<(), ImageError>,
) -> Result<u64, ImageError> {
    let mut here = 0;
    loop {
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        let read = (&mut file).take(PIECE_BYTES as u64).read_to_end(&mut piece);
        let count = read.map_err(|error| io_error("read", path, error))?;
        if count == 0 {
            return Ok(here);
        }
        here += count as u64;
        take(piece, true)?;
    }
}

/// One request: takes what comes until the blob is whole or the connection fails.
fn stream(
    wire: &Wire,
    blob: &Blob,
    here: &mut u64,
    take: &mut dyn FnMut(Vec<u8>, bool) -> Result<(), ImageError>,
    watcher: &dyn Watcher,
) -> Result<(), Attempt> {
    let mut answer = wire.blob(blob.digest, *here)?;
    // Where a registry cannot begin in the middle, what is here already is passed over.
    let mut pass_over = here.saturating_sub(answer.begins);
    let mut piece = Vec::with_capacity(PIECE_BYTES);
    let outcome = loop {
        let bytes = match answer.next() {
            Ok(Some(bytes)) => bytes,
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        };
        let skipped = usize::try_from(pass_over).unwrap_or(usize::MAX).min(bytes.len());
        pass_over -= skipped as u64;
        piece.extend_from_slice(&bytes[skipped..]);
        let arrived = *here + piece.len() as u64;
        if arrived > blob.bytes {
            return Err(Attempt::Final(ImageError::Size {
                what: format!("layer {}", blob.digest.short()),
                expected: blob.bytes,
                actual: arrived,
            }));
        }
        watcher.at(arrived);
        if piece.len() >= PIECE_BYTES || arrived == blob.bytes {
            let full = std::mem::replace(&mut piece, Vec::with_capacity(PIECE_BYTES));
            take(full, false)?;
            *here = arrived;
        }
    };
    // What came before the cut is kept; a first crumb is not enough to tell how the layer is packed.
    if !piece.is_empty() && (*here > 0 || piece.len() >= SNIFF_BYTES) {
        *here += piece.len() as u64;
        take(piece, false)?;
    }
    match outcome {
        Ok(()) if *here < blob.bytes => Err(Attempt::Again { reason: "the answer ended early".into(), after: None }),
        outcome => outcome,
    }
}

/// A number in 0..1 that differs from process to process and moment to moment; nothing secret depends on it.
pub(super) fn chance() -> f64 {
    use std::hash::{BuildHasher, Hasher};
    let seed = std::collections::hash_map::RandomState::new().build_hasher().finish();
    (seed >> 11) as f64 / (1_u64 << 53) as f64
}
