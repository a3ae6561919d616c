//! Images: references, archives, registries, the content store, and the root disks made of them (design: ARCHITECTURE.md, "Images and root disks").
//!
//! Used by `actors` (the image actor), by `xtask` ([`pack_template`]) and by nothing else. Everything blocks: call it from a thread that
//! may. Input is hostile: names from an image never reach the host's file system, every count and size is bounded by [`limits`], and
//! what does not agree with its digest never gets its final name.
//!
//! # The store
//! ```text
//!  <home>/images/                    0700, files 0600; one process writes (the daemon)
//!    lock                            flock, exclusive, for as long as the store is open
//!    format                          "1"; a later number is refused
//!    tmp/                            work under way; emptied when the store opens
//!    partial/<hex>                   downloads that are not finished
//!    blobs/sha256/<hex>              original bytes: manifests, configurations, layers as they came
//!    layers/v1/<diff_id>/{data,tree} a layer taken apart: contents in 4 KiB blocks, and everything else
//!    roots/v1/<chain>                merged EROFS metadata of a chain of layers
//!    records/<manifest digest>.json  one image with its tags        ◄── the only roots
//!    templates/<hex>                 unpacked template of writable disks
//! ```
//! **Roots.** A record keeps its manifest, configuration, layer blobs, layer files and merged metadata. Beside records, *holds* keep what
//! a running load or pull relies on, *leases* keep images that something is being made from, and the caller says which images sandboxes use.
//!
//! **Locks.** `lock` against other processes; inside, one mutex over records, holds and leases. It is held while parts are renamed
//! into place and the record is written, and while a sweep renames parts away, so each sees all of the other or nothing. It is never held
//! while a stream is read, a layer unpacked, trees merged, files unlinked or anything synced.
//!
//! **Crash order.** Temporary file, rename, then record: a part without a record is swept at the next open, a record without a part cannot
//! happen. After a `kill -9` that is all there is to say, because the page cache outlives the process. For a power cut each image is
//! synced in the background after its load; until then its record says `flushed: false` with the host's boot id, and an open under another
//! boot id verifies such an image against its digests, byte by byte, and drops it if it fails.
//!
//! Layer files and merged metadata are caches of the blobs: where they are missing or of another version they are made again.

#![forbid(unsafe_code)]

mod archive;
mod compression;
mod config;
mod crc32c;
mod digest;
mod erofs;
mod error;
mod faults;
mod intake;
mod layer;
pub mod limits;
mod reference;
pub mod registry;
pub mod snapshot;
mod store;
mod tar_stream;
mod upper;

pub use archive::{LoadEvent, LoadOptions, LoadSource, LoadedImage, Platform, SaveFormat, TagRule};
pub use compression::Compression;
pub use config::{HistoryStep, ImageConfig};
pub use digest::{Digest, DigestError};
pub use error::ImageError;
pub use layer::Dropped;
pub use limits::Limits;
pub use reference::ImageReference;
pub use store::{
    CheckDepth, CheckReport, ImageDetails, ImageLease, ImageSummary, LayerDetails, PartUsage, PruneOptions,
    PruneReport, PrunedImage, RemoveOutcome, RootImage, Store, StoreUsage,
};
pub use upper::{MKE2FS_ARGUMENTS, TEMPLATE_BYTES, pack_template};
