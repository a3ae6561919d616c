//! One load under way: files of the archive become temporary blobs, and what looks like a layer is unpacked while it streams.
//!
//! Two threads: the caller's reads, hashes and stores the blob; a worker unpacks the same pieces ([`crate::intake`]).

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use crate::archive::input::Input;
use crate::archive::{LoadEvent, LoadOptions};
use crate::compression::{Compression, SNIFF_BYTES, sniff};
use crate::digest::Digest;
use crate::error::{ImageError, io_error};
use crate::intake::{Intake, PIECE_BYTES, ReadyLayer, unpack};
use crate::store::{Holds, Part, Store, read_bounded};
use crate::tar_stream::{BLOCK, EntryKind, TarError, TarReader};

/// Bytes between two progress events.
const PROGRESS_BYTES: u64 = 4 << 20;
/// Links in the archive followed for one name.
const LINK_HOPS: usize = 8;

/// A file of the archive, by content.
pub(super) struct FoundBlob {
    pub(super) bytes: u64,
    /// The temporary file; `None` when the store has it.
    pub(super) file: Option<PathBuf>,
    /// What unpacking it as a layer gave, if it looked like one.
    layer: Option<Result<ReadyLayer, ImageError>>,
}

/// What a name of the archive leads to.
enum Name {
    Blob(Digest),
    Link(Vec<u8>),
}

/// State of one load.
pub(super) struct Session<'a> {
    pub(super) store: &'a Store,
    pub(super) options: &'a LoadOptions,
    scratch: tempfile::TempDir,
    holds: Holds,
    names: HashMap<Vec<u8>, Name>,
    /// What a look ahead learned about files whose names promise no digest.
    hints: HashMap<Vec<u8>, Digest>,
    pub(super) blobs: HashMap<Digest, FoundBlob>,
    files_made: u64,
    bytes_seen: u64,
}

impl<'a> Session<'a> {
    pub(super) fn new(store: &'a Store, options: &'a LoadOptions) -> Result<Self, ImageError> {
        Ok(Self {
            store,
            options,
            scratch: store.temporary()?,
            holds: Holds::new(store),
            names: HashMap::new(),
            hints: HashMap::new(),
            blobs: HashMap::new(),
            files_made: 0,
            bytes_seen: 0,
        })
    }

    pub(super) fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// Takes the whole archive in.
    pub(super) fn read(&mut self, input: Input<'_>, progress: &mut dyn FnMut(LoadEvent)) -> Result<(), ImageError> {
        if let Some(preview) = input.preview() {
            self.hints = look_ahead(preview, &self.options.limits).unwrap_or_default();
        }
        let mut reader = TarReader::new(input);
        let mut entries = 0;
        while let Some(entry) = reader.next().map_err(outer_error)? {
            entries += 1;
            self.go_on()?;
            if entries > self.options.limits.archive_entries {
                let limit = self.options.limits.archive_entries;
                return Err(ImageError::Limit { what: "the archive".into(), limit, unit: " entries" });
            }
            let name = archive_name(&entry.path)?;
            let target = match entry.kind {
                EntryKind::Directory => continue,
                EntryKind::Regular if entry.sparse.is_some() => {
                    return Err(ImageError::Archive("it stores a blob as a sparse file".into()));
                }
                EntryKind::Regular => Name::Blob(self.take_in(&mut reader, &name, entry.size, progress)?),
                EntryKind::HardLink => Name::Link(archive_name(&entry.link)?),
                EntryKind::Symlink => Name::Link(link_name(&name, &entry.link)?),
                EntryKind::Character | EntryKind::Block | EntryKind::Fifo => {
                    return Err(ImageError::Archive(format!("{} is a device or pipe", shown(&name))));
                }
            };
            self.names.insert(name, target);
        }
        if entries == 0 {
            return Err(ImageError::Archive("it is empty or not a tar file".into()));
        }
        if !reader.saw_end_marker() {
            return Err(ImageError::Truncated("its end marker is missing".into()));
        }
        // A compressed archive is whole only if its stream ends well.
        let mut rest = [0; 8192];
        loop {
            match reader.source().read(&mut rest) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(outer_error(TarError::Source(error))),
            }
        }
    }

    /// Stores one file of the archive, or passes over it when the store has it.
    fn take_in(
        &mut self,
        reader: &mut TarReader<Input<'_>>,
        name: &[u8],
        bytes: u64,
        progress: &mut dyn FnMut(LoadEvent),
    ) -> Result<Digest, ImageError> {
        let limit = self.options.limits.blob_bytes;
        if bytes > limit {
            return Err(ImageError::Limit { what: format!("{} of the archive", shown(name)), limit, unit: " bytes" });
        }
        let label = shown(name);
        let promised = promised_digest(name);
        if let Some(digest) = promised.or_else(|| self.hints.get(name).copied())
            && self.reuse(digest, bytes)
        {
            self.bytes_seen += bytes;
            progress(LoadEvent::Progress { bytes: self.bytes_seen });
            if let Some(Ok(layer)) = self.blobs.get(&digest).and_then(|blob| blob.layer.as_ref()) {
                progress(LoadEvent::Layer { diff_id: layer.diff_id, known: true });
            }
            return Ok(digest);
        }
        let number = self.files_made;
        self.files_made += 1;
        let path = self.scratch.path().join(format!("blob-{number}"));
        let layer_directory = self.scratch.path().join(format!("layer-{number}"));
        let file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| io_error("create", &path, error))?;
        let limits = &self.options.limits;
        let seen = self.bytes_seen;
        let (digest, layer) = std::thread::scope(|scope| {
            let mut intake = Intake::new(file, &path);
            let mut worker = None;
            let mut done = 0;
            let mut next_report = PROGRESS_BYTES;
            while done < bytes {
                self.go_on()?;
                let mut piece = intake.empty_piece();
                let want = PIECE_BYTES.min(usize::try_from(bytes - done).unwrap_or(PIECE_BYTES));
                piece.resize(want, 0);
                // Whole pieces keep the worker's reads large even when a pipe delivers crumbs.
                reader.read_exact_data(&mut piece).map_err(outer_error)?;
                if done == 0
                    && let Some(compression) = layer_compression(&piece)
                {
                    let source = intake.start_worker();
                    let (directory, label) = (&layer_directory, &label);
                    worker = Some(scope.spawn(move || unpack(source, compression, directory, limits, label)));
                }
                done += want as u64;
                intake.put(piece)?;
                if done >= next_report && done < bytes {
                    progress(LoadEvent::Progress { bytes: seen + done });
                    next_report = done + PROGRESS_BYTES;
                }
            }
            let digest = intake.finish();
            // A panic of the worker is a defect of ours; it must fail this load and nothing else.
            let layer = worker.map(|worker| {
                worker.join().unwrap_or_else(|_| Err(ImageError::Corrupt("unpacking a layer panicked".into())))
            });
            Ok::<_, ImageError>((digest, layer))
        })?;
        if let Some(promised) = promised
            && name.starts_with(b"blobs/")
            && promised != digest
        {
            return Err(ImageError::Digest { what: label, expected: promised.to_string(), actual: digest.to_string() });
        }
        let layer = layer.map(|result| {
            result.map(|mut layer| {
                // An uncompressed layer was hashed once, as a blob.
                if layer.compression == Compression::None {
                    layer.diff_id = digest;
                }
                layer
            })
        });
        self.bytes_seen += bytes;
        progress(LoadEvent::Progress { bytes: self.bytes_seen });
        if let Some(Ok(layer)) = &layer {
            progress(LoadEvent::Layer { diff_id: layer.diff_id, known: false });
        }
        // The same content twice is one blob.
        self.blobs.entry(digest).or_insert(FoundBlob { bytes, file: Some(path), layer });
        Ok(digest)
    }

    /// Ends a load for which nobody waits.
    fn go_on(&self) -> Result<(), ImageError> {
        if self.options.given_up.load(Ordering::Relaxed) {
            return Err(ImageError::Source(io::Error::new(io::ErrorKind::BrokenPipe, "nobody waits for this load")));
        }
        Ok(())
    }

    /// Whether the store has a blob of this digest and length with everything that was made of it; holds it if so.
    fn reuse(&mut self, digest: Digest, bytes: u64) -> bool {
        if self.blobs.contains_key(&digest) {
            return self.blobs[&digest].bytes == bytes;
        }
        if self.store.blob_length(digest) != Some(bytes) {
            return false;
        }
        let layer = if let Some((record, dropped)) = self.store.known_layer(digest) {
            if !Store::hold_layer(&mut self.holds, &record) {
                return false;
            }
            Some(Ok(ReadyLayer::of_store(&record, dropped)))
        } else if self.store.known_document(digest) && self.holds.take(Part::Blob(digest)) {
            None
        } else {
            return false;
        };
        self.blobs.insert(digest, FoundBlob { bytes, file: None, layer });
        true
    }

    /// The blob that a name of the archive leads to, through links of the archive.
    pub(super) fn blob_named(&self, name: &[u8]) -> Option<Digest> {
        let mut name = name;
        for _ in 0..=LINK_HOPS {
            match self.names.get(name)? {
                Name::Blob(digest) => return Some(*digest),
                Name::Link(target) => name = target,
            }
        }
        None
    }

    /// A manifest, index or configuration of the archive.
    pub(super) fn document(&self, digest: Digest) -> Result<Vec<u8>, ImageError> {
        let limit = self.options.limits.metadata_bytes;
        match self.blobs.get(&digest) {
            Some(FoundBlob { bytes, .. }) if *bytes > limit => {
                Err(ImageError::Limit { what: "a manifest or configuration".into(), limit, unit: " bytes" })
            }
            Some(FoundBlob { file: Some(path), .. }) => read_bounded(path, limit),
            Some(FoundBlob { file: None, .. }) => self.store.read_small_blob(digest),
            None => Err(ImageError::Archive(format!("it lacks blob {digest}"))),
        }
    }

    /// The layer that a blob of the archive is.
    pub(super) fn layer(&mut self, digest: Digest, name: &str) -> Result<ReadyLayer, ImageError> {
        let Some(blob) = self.blobs.get_mut(&digest) else {
            return Err(ImageError::Archive(format!("it lacks layer {name}")));
        };
        if blob.layer.is_none() {
            // It did not look like a layer (a tar of version 7 has no magic), or its layer files are to be made again.
            let path = blob.file.clone().unwrap_or_else(|| self.store.paths().blob(digest));
            let mut source = BufReader::with_capacity(
                PIECE_BYTES,
                File::open(&path).map_err(|error| io_error("read", &path, error))?,
            );
            let head = source.fill_buf().map_err(|error| io_error("read", &path, error))?;
            let compression = sniff(&head[..head.len().min(SNIFF_BYTES)]).map_err(|other| ImageError::Layer {
                layer: name.to_string(),
                reason: format!("it is compressed with {other}, which OCI layers are not"),
            })?;
            let directory = self.scratch.path().join(format!("layer-again-{}", digest.hex()));
            let mut layer = unpack(source, compression, &directory, &self.options.limits, name)?;
            if compression == Compression::None {
                layer.diff_id = digest;
            }
            blob.layer = Some(Ok(layer));
        }
        match blob.layer.take() {
            Some(Ok(layer)) => {
                blob.layer = Some(Ok(layer.clone()));
                Ok(layer)
            }
            Some(Err(error)) => Err(error),
            None => Err(ImageError::Archive(format!("layer {name} is not a layer"))),
        }
    }
}

/// Whether a file that starts like this could be a layer, and how it is compressed.
fn layer_compression(head: &[u8]) -> Option<Compression> {
    match sniff(head) {
        Ok(Compression::None) => {
            let is_tar = head.get(257..262) == Some(b"ustar");
            // A layer without entries is nothing but zeros.
            let is_empty_tar = head.len() >= BLOCK && head[..BLOCK].iter().all(|byte| *byte == 0);
            (is_tar || is_empty_tar).then_some(Compression::None)
        }
        Ok(compression) => Some(compression),
        Err(_) => None,
    }
}

/// Learns from the documents of an old docker archive which layer each `ID/layer.tar` is, by passing over everything else.
///
/// Only a hint: it decides whether the store's own copy is taken in place of the file, and the configuration's diff_ids are compared with
/// what was taken in any case. So anything that is not as expected just means no hint.
fn look_ahead(input: Input<'_>, limits: &crate::limits::Limits) -> Option<HashMap<Vec<u8>, Digest>> {
    /// Larger documents than these are not worth a look ahead.
    const DOCUMENT_BYTES: u64 = 1 << 20;
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Image {
        config: String,
        layers: Vec<String>,
    }
    let mut reader = TarReader::new(input);
    let mut documents: HashMap<Vec<u8>, Vec<u8>> = HashMap::new();
    let mut kept = 0;
    let mut entries = 0;
    while let Some(entry) = reader.next().ok()? {
        entries += 1;
        if entries > limits.archive_entries {
            return None;
        }
        let is_document = entry.path.ends_with(b".json") || promised_digest(&entry.path).is_some();
        if entry.kind == EntryKind::Regular && is_document && entry.size <= DOCUMENT_BYTES {
            kept += entry.size;
            if kept > limits.metadata_bytes {
                return None;
            }
            let mut bytes = vec![0; usize::try_from(entry.size).ok()?];
            reader.read_exact_data(&mut bytes).ok()?;
            documents.insert(archive_name(&entry.path).ok()?, bytes);
        }
    }
    let images: Vec<Image> = serde_json::from_slice(documents.get(&b"manifest.json"[..])?).ok()?;
    let mut hints = HashMap::new();
    for image in images {
        let config = crate::config::ImageConfig::parse(documents.get(image.config.as_bytes())?).ok()?;
        hints.extend(image.layers.into_iter().map(String::into_bytes).zip(config.diff_ids));
    }
    Some(hints)
}

/// The digest that a file's name promises: `blobs/sha256/HEX`, `HEX.tar`, `HEX.json`.
fn promised_digest(name: &[u8]) -> Option<Digest> {
    let name = std::str::from_utf8(name).ok()?;
    let hex = name
        .strip_prefix("blobs/sha256/")
        .or_else(|| name.strip_suffix(".tar"))
        .or_else(|| name.strip_suffix(".json"))?;
    Digest::from_hex(hex)
}

/// A name in the archive, cleaned; the archive's own names may neither be absolute nor climb.
fn archive_name(path: &[u8]) -> Result<Vec<u8>, ImageError> {
    let names = crate::layer::entry_components(path)
        .map_err(|error| ImageError::Archive(format!("entry {}: {error}", shown(path))))?;
    Ok(names.join(&b'/'))
}

/// What a symbolic link in the archive means, as text: it never touches a file system.
fn link_name(from: &[u8], target: &[u8]) -> Result<Vec<u8>, ImageError> {
    let escapes = || ImageError::Archive(format!("link {} leads out of the archive", shown(from)));
    if target.starts_with(b"/") {
        return Err(escapes());
    }
    let mut names: Vec<&[u8]> = from.split(|byte| *byte == b'/').collect();
    names.pop();
    for name in target.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => {
                names.pop().ok_or_else(escapes)?;
            }
            name => names.push(name),
        }
    }
    Ok(names.join(&b'/'))
}

/// A name for people: digests shortened.
pub(super) fn shown(name: &[u8]) -> String {
    let text = crate::layer::for_people(name);
    match text.rsplit('/').next().and_then(Digest::from_hex) {
        Some(digest) => digest.short(),
        None => text,
    }
}

fn outer_error(error: TarError) -> ImageError {
    match error {
        TarError::Truncated(what) => ImageError::Truncated(format!("it ends inside {what}")),
        TarError::Format(reason) => ImageError::Archive(format!("it has {reason}")),
        TarError::HeaderSize(limit) => {
            ImageError::Limit { what: "a tar header of the archive".into(), limit, unit: " bytes" }
        }
        TarError::Source(error) => match error.kind() {
            io::ErrorKind::UnexpectedEof => ImageError::Truncated("its compressed stream ends early".into()),
            io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData | io::ErrorKind::Other => {
                ImageError::Archive(format!("it cannot be unpacked: {error}"))
            }
            _ => ImageError::Source(error),
        },
    }
}
