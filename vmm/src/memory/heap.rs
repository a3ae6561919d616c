//! How the C library's allocator serves large blocks: each from a mapping of its own, which the kernel hands out as
//! zeros and takes back whole.
//!
//! Left to itself glibc does that only until the first such block is freed; from then on they come from its heap and
//! every byte that is to be zero is written. A TCP connection's buffers are half a megabyte of which most connections
//! touch a page: clearing them took a sixth of the network thread's time, and made all of it memory in use.
//!
//! Called by `main` alone, before there are other threads.
#![expect(unsafe_code, reason = "sets a parameter of the C library's allocator")]

/// Bytes from which a block has a mapping of its own: the smaller of a connection's buffers do not.
const OWN_MAPPING_BYTES: libc::c_int = 64 << 10;

/// Makes it so.
pub fn map_large_blocks() {
    // SAFETY: sets a number in the allocator; the caller is the only thread, so nobody allocates meanwhile.
    let done = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_MAPPING_BYTES) };
    if done == 0 {
        tracing::debug!("the allocator keeps its own rule for large blocks");
    }
}
