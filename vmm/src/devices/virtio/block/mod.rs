//! virtio-blk (VIRTIO 1.2, section 5.2): the two disks of a sandbox.
//!
//! * the read-only root: the *concatenation* of an image's metadata file and its layers' data files ([`storage::Concatenation`]);
//! * the writable disk: one sparse file where DISCARD and WRITE_ZEROES punch holes and FLUSH is `fdatasync`
//!   ([`storage::SparseFile`]).
//!
//! One ring, served synchronously on the device's own event loop. A guest finds a disk by its serial (GET_ID), never by its name.
//!
//! ```text
//!  request ──execute──► used, OK/IOERR/UNSUPP
//!     │  host disk full                           retried each second
//!     └──────────────► held ─────────────────────────┐
//!                       ▲ still full and in time ◄───┤ room: used, OK
//!                       │                            └ timed out: used, IOERR
//! ```

pub mod device;
pub mod request;
pub mod storage;
mod worker;

#[cfg(test)]
mod tests;

pub use device::{Block, BlockCounters, BlockOptions, DiskFullObserver};
