//! Downloads that are not finished: `partial/<hex>` holds the first bytes of a blob, whatever ended the pull.
//!
//! Nothing in it is believed: a pull hashes it again before it goes on. A file that is being written belongs to its flight; the others go in
//! a prune, or after a week.

use std::fs;
use std::io::ErrorKind;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::digest::Digest;
use crate::error::{ImageError, io_error};
use crate::store::prune::allocated_bytes;
use crate::store::{Part, PartUsage, Store};

/// Age at which an unfinished download is given up.
const KEPT: Duration = Duration::from_secs(7 * 24 * 3_600);
/// Blobs below this are fetched again sooner than found again.
const WORTH_KEEPING_BYTES: u64 = 64 << 10;

impl Store {
    /// Blobs that no image needs are layers of a pull that failed or was killed: the next pull goes on with them.
    pub(super) fn keep_orphan_blobs(&self) -> Result<(), ImageError> {
        let state = self.state();
        for part in self.dead_parts(&state, &std::collections::BTreeSet::new())? {
            let Part::Blob(digest) = part else { continue };
            let path = self.paths().blob(digest);
            if fs::metadata(&path).is_ok_and(|file| file.len() >= WORTH_KEEPING_BYTES) {
                fs::rename(&path, self.paths().partial(digest)).map_err(|error| io_error("keep", &path, error))?;
            }
        }
        Ok(())
    }

    /// After a pull that failed: layers that had their names already and that nobody needs are downloads to go on with again.
    pub(crate) fn give_back(&self) {
        if let Err(error) = self.keep_orphan_blobs().and_then(|()| self.sweep_orphans()) {
            tracing::warn!(%error, "parts of a pull that failed stay until the store opens next");
        }
    }

    pub(super) fn drop_old_partials(&self) -> Result<(), ImageError> {
        let limit = SystemTime::now().checked_sub(KEPT).unwrap_or(UNIX_EPOCH);
        self.remove_partials(false, |age| age < limit).map(drop)
    }

    /// Removes what the caller's rule says of the time of the last byte, or only counts it. Returns what there is, and how many went.
    pub(super) fn remove_partials(
        &self,
        dry_run: bool,
        goes: impl Fn(SystemTime) -> bool,
    ) -> Result<(PartUsage, u64), ImageError> {
        let directory = self.paths().partials();
        let (mut usage, mut gone) = (PartUsage::default(), 0);
        for entry in fs::read_dir(&directory).map_err(|error| io_error("read", &directory, error))? {
            let entry = entry.map_err(|error| io_error("read", &directory, error))?;
            let path = entry.path();
            let Ok(metadata) = entry.metadata() else { continue };
            let bytes = allocated_bytes(&path);
            usage.count += 1;
            usage.bytes += bytes;
            let in_use = entry
                .file_name()
                .to_str()
                .and_then(Digest::from_hex)
                .is_some_and(|digest| self.flights().is_under_way(digest));
            if in_use || !goes(metadata.modified().unwrap_or(UNIX_EPOCH)) {
                usage.active += u64::from(in_use);
                continue;
            }
            usage.reclaimable_bytes += bytes;
            gone += 1;
            if !dry_run {
                match fs::remove_file(&path) {
                    Err(error) if error.kind() != ErrorKind::NotFound => {
                        return Err(io_error("remove", &path, error));
                    }
                    _ => {}
                }
            }
        }
        Ok((usage, gone))
    }
}
