//! The content store: one writer, one lock, parts by digest, records that make parts live.
//!
//! Called by the daemon (from blocking threads) and by `msb doctor --store` when no daemon runs. All I/O is synchronous. Nothing in it
//! waits for another process, and the one mutex is never held while a stream is read or a layer unpacked.

mod check;
mod flights;
mod flush;
mod partial;
mod paths;
mod prune;
mod publish;
mod query;
mod record;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::error::{ImageError, io_error};
use crate::faults;
use crate::layer::LayerTree;
use crate::limits::Limits;

pub use check::{CheckDepth, CheckReport};
pub(crate) use flights::{Claim, Flight, Flights};
pub(crate) use paths::{Part, Paths};
pub use prune::{PartUsage, PruneOptions, PruneReport, PrunedImage, StoreUsage};
pub(crate) use publish::{NewImage, NewLayer};
pub use query::{ImageDetails, ImageSummary, LayerDetails, RemoveOutcome};
pub(crate) use record::{ImageRecord, LayerRecord, TagRecord};

/// Version of the directory layout. A store of a later version is refused, never guessed at.
const STORE_FORMAT: u32 = 1;

/// A handle on the store; clones share it.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    flusher: flush::Flusher,
    flights: Flights,
}

/// What the flusher thread sees too.
struct Shared {
    paths: Paths,
    boot_id: String,
    state: Mutex<State>,
    /// Held for as long as the store is open.
    _lock: File,
}

#[derive(Default)]
struct State {
    records: BTreeMap<Digest, ImageRecord>,
    /// Parts that a load relies on although no record names them yet.
    holds: HashMap<Part, u32>,
    /// Images that a creation relies on although no sandbox names them yet.
    leases: HashMap<Digest, u32>,
}

/// The files of an image's root disk, in the order of the concatenation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootImage {
    /// The merged EROFS metadata.
    pub metadata: PathBuf,
    /// Its length in bytes, a multiple of 4 KiB.
    pub metadata_len: u64,
    /// Data files with their lengths in bytes, multiples of 4 KiB, none empty.
    pub data: Vec<(PathBuf, u64)>,
}

/// Keeps an image from being removed while something is made from it. Released when dropped.
pub struct ImageLease {
    store: Store,
    digest: Digest,
    config: ImageConfig,
    root: RootImage,
    name: String,
}

impl ImageLease {
    /// Digest of the image's manifest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The image's name for people: its first tag, else its digest.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The image's configuration.
    #[must_use]
    pub fn config(&self) -> &ImageConfig {
        &self.config
    }

    /// The files that make the sandbox's read-only disk.
    #[must_use]
    pub fn root(&self) -> &RootImage {
        &self.root
    }
}

impl Drop for ImageLease {
    fn drop(&mut self) {
        release(&mut self.store.state().leases, &self.digest);
    }
}

impl std::fmt::Debug for ImageLease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageLease").field("digest", &self.digest).field("name", &self.name).finish_non_exhaustive()
    }
}

/// Keeps parts from being swept while a load relies on them. Released when dropped.
pub(crate) struct Holds {
    store: Store,
    parts: Vec<Part>,
}

impl Holds {
    pub(crate) fn new(store: &Store) -> Self {
        Self { store: store.clone(), parts: Vec::new() }
    }

    /// Holds `part` whether the store has it yet or not.
    pub(crate) fn reserve(&mut self, part: Part) {
        *self.store.state().holds.entry(part).or_default() += 1;
        self.parts.push(part);
    }

    /// Holds `part` if the store has it.
    pub(crate) fn take(&mut self, part: Part) -> bool {
        let mut state = self.store.state();
        if !self.store.shared().paths.part(part).exists() {
            return false;
        }
        *state.holds.entry(part).or_default() += 1;
        self.parts.push(part);
        true
    }
}

impl Drop for Holds {
    fn drop(&mut self) {
        let mut state = self.store.state();
        for part in &self.parts {
            release(&mut state.holds, part);
        }
    }
}

fn release<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, u32>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

impl Store {
    /// Opens the store under `home`, making it if there is none, and cleans up after whatever ended the last writer.
    ///
    /// # Errors
    /// `Busy` when another process has it open, `Format` when a later msb made it, `Io` when the directory cannot be used.
    pub fn open(home: &Path) -> Result<Self, ImageError> {
        let paths = Paths::new(home);
        make_directory(paths.top())?;
        let metadata = fs::metadata(paths.top()).map_err(|error| io_error("read", paths.top(), error))?;
        if metadata.uid() != rustix::process::geteuid().as_raw() {
            let error = std::io::Error::new(ErrorKind::PermissionDenied, "it belongs to another user");
            return Err(io_error("use", paths.top(), error));
        }
        let lock = open_lock(&paths)?;
        check_format(&paths)?;
        for directory in paths.all() {
            make_directory(&directory)?;
        }
        clear_directory(&paths.temporary())?;
        let shared = Arc::new(Shared { paths, boot_id: boot_id(), state: Mutex::default(), _lock: lock });
        let flusher = flush::Flusher::start(Arc::clone(&shared))?;
        let store = Self { inner: Arc::new(Inner { shared, flusher, flights: Flights::default() }) };
        store.read_records()?;
        store.keep_orphan_blobs()?;
        store.sweep_orphans()?;
        store.drop_old_partials()?;
        Ok(store)
    }

    fn shared(&self) -> &Shared {
        &self.inner.shared
    }

    pub(crate) fn paths(&self) -> &Paths {
        &self.inner.shared.paths
    }

    pub(crate) fn flights(&self) -> &Flights {
        &self.inner.flights
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.shared.state()
    }

    /// A fresh directory for work under way; removed with everything in it when dropped, or when the store opens next.
    pub(crate) fn temporary(&self) -> Result<tempfile::TempDir, ImageError> {
        let directory = self.paths().temporary();
        tempfile::Builder::new()
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(&directory)
            .map_err(|error| io_error("create a directory in", &directory, error))
    }

    /// Waits until everything published so far is on disk.
    pub fn flush(&self) {
        self.inner.flusher.wait_idle();
    }

    /// Takes a lease on the image that `query` names; its files stay until the lease is dropped.
    ///
    /// Parts that another version of msb left behind, or that were lost, are made again from the kept blobs.
    ///
    /// # Errors
    /// `InvalidReference`, `NotFound`, `Ambiguous`, or `Corrupt` when the parts are lost for good.
    pub fn lease(&self, query: &str) -> Result<ImageLease, ImageError> {
        let (digest, name) = {
            let mut state = self.state();
            let record = state.find(query)?;
            let found = (record.digest, record.name());
            *state.leases.entry(found.0).or_default() += 1;
            found
        };
        // From here on the lease must be released on every path.
        let mut lease = ImageLease {
            store: self.clone(),
            digest,
            config: ImageConfig::default(),
            root: RootImage { metadata: PathBuf::new(), metadata_len: 0, data: Vec::new() },
            name,
        };
        lease.config = self.config(digest)?;
        lease.root = self.root_image(digest)?;
        let now = now_ms();
        let mut state = self.state();
        if let Some(record) = state.records.get_mut(&digest) {
            record.used_ms = now;
            let record = record.clone();
            // The time of use only orders a later prune: a failure to note it must not fail a create.
            if let Err(error) = self.shared().write_record(&record) {
                tracing::warn!(%error, image = %digest, "time of use not recorded");
            }
        }
        drop(state);
        Ok(lease)
    }

    /// The configuration of an image.
    ///
    /// # Errors
    /// `NotFound`, or `Corrupt` when the kept blob is lost or changed.
    pub fn config(&self, digest: Digest) -> Result<ImageConfig, ImageError> {
        let config = {
            let state = self.state();
            state.by_digest(digest)?.config
        };
        ImageConfig::parse(&self.read_small_blob(config)?)
    }

    /// The files of an image's root disk. Prefer [`lease`](Self::lease): without one a prune may take them away.
    ///
    /// # Errors
    /// `NotFound`, or `Corrupt` when a part is lost and cannot be made again.
    pub fn root_image(&self, digest: Digest) -> Result<RootImage, ImageError> {
        let record = self.state().by_digest(digest)?.clone();
        for layer in &record.layers {
            if !self.layer_is_whole(layer) {
                self.rebuild_layer(layer)?;
            }
        }
        let metadata = self.paths().root(record.chain());
        if !metadata.exists() {
            self.rebuild_root(&record)?;
        }
        let metadata_len = fs::metadata(&metadata).map_err(|error| io_error("read", &metadata, error))?.len();
        let data = record
            .layers
            .iter()
            .filter(|layer| layer.data_bytes > 0)
            .map(|layer| (self.paths().layer_data(layer.diff_id), layer.data_bytes))
            .collect();
        Ok(RootImage { metadata, metadata_len, data })
    }

    fn layer_is_whole(&self, layer: &LayerRecord) -> bool {
        let length = |path: PathBuf| fs::metadata(path).map(|metadata| metadata.len()).ok();
        length(self.paths().layer_data(layer.diff_id)) == Some(layer.data_bytes)
            && length(self.paths().layer_tree(layer.diff_id)).is_some()
    }

    /// Reads a manifest or configuration and checks its digest.
    pub(crate) fn read_small_blob(&self, digest: Digest) -> Result<Vec<u8>, ImageError> {
        let path = self.paths().blob(digest);
        let bytes = read_bounded(&path, Limits::default().metadata_bytes)?;
        if Digest::of(&bytes) != digest {
            return Err(ImageError::Corrupt(format!("blob {digest} has other content")));
        }
        Ok(bytes)
    }

    pub(crate) fn read_tree(&self, diff_id: Digest) -> Result<LayerTree, ImageError> {
        let path = self.paths().layer_tree(diff_id);
        LayerTree::decode(&fs::read(&path).map_err(|error| io_error("read", &path, error))?)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the maps consistent: each change is one insert or remove after its file operation.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a record under its final name in one step.
    fn write_record(&self, record: &ImageRecord) -> Result<(), ImageError> {
        let path = self.paths.record(record.digest);
        let bytes = serde_json::to_vec_pretty(record)
            .map_err(|error| ImageError::Corrupt(format!("a record cannot be written: {error}")))?;
        let directory = self.paths.temporary();
        faults::step("record: write");
        let mut file = tempfile::Builder::new()
            .permissions(Permissions::from_mode(0o600))
            .tempfile_in(&directory)
            .map_err(|error| io_error("create a file in", &directory, error))?;
        file.write_all(&bytes).map_err(|error| io_error("write", &path, error))?;
        faults::step("record: name");
        file.persist(&path).map_err(|error| io_error("create", &path, error.error))?;
        Ok(())
    }
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|text| text.trim().to_string()).unwrap_or_default()
}

fn make_directory(path: &Path) -> Result<(), ImageError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| io_error("create", path, error))
}

/// Reads a file that must not be larger than `limit`.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, ImageError> {
    let file = File::open(path).map_err(|error| io_error("read", path, error))?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|error| io_error("read", path, error))?;
    if bytes.len() as u64 > limit {
        return Err(ImageError::Limit { what: "a manifest or configuration".into(), limit, unit: " bytes" });
    }
    Ok(bytes)
}

/// Removes everything inside a directory. Names there are ours or a crashed self's.
fn clear_directory(path: &Path) -> Result<(), ImageError> {
    for entry in fs::read_dir(path).map_err(|error| io_error("read", path, error))? {
        let entry = entry.map_err(|error| io_error("read", path, error))?;
        remove_any(&entry.path())?;
    }
    Ok(())
}

/// Removes a file or a directory tree; one that is gone already is fine.
fn remove_any(path: &Path) -> Result<(), ImageError> {
    let is_directory = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
    let result = if is_directory { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match result {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(io_error("remove", path, error)),
        _ => Ok(()),
    }
}

fn open_lock(paths: &Paths) -> Result<File, ImageError> {
    let path = paths.lock();
    let lock = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(|error| io_error("open", &path, error))?;
    match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ImageError::Busy(paths.top().to_path_buf())),
        Err(error) => Err(io_error("lock", &path, error.into())),
    }
}

fn check_format(paths: &Paths) -> Result<(), ImageError> {
    let path = paths.format();
    match fs::read_to_string(&path) {
        Ok(text) if text.trim() == STORE_FORMAT.to_string() => Ok(()),
        // A crash right after creation can leave it empty; nothing else is in the store then.
        Ok(text) if text.is_empty() => {
            fs::write(&path, STORE_FORMAT.to_string()).map_err(|error| io_error("write", &path, error))
        }
        Ok(text) => Err(ImageError::Format {
            path: paths.top().to_path_buf(),
            found: text.trim().chars().take(20).collect(),
            known: STORE_FORMAT,
        }),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            fs::write(&path, STORE_FORMAT.to_string()).map_err(|error| io_error("write", &path, error))
        }
        Err(error) => Err(io_error("read", &path, error)),
    }
}
