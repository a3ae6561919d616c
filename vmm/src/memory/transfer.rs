//! Moves bytes straight between guest memory and a file or socket: one system call per descriptor chain, no copy through us.
//!
//! Exists because the safe wrappers of nix and rustix want `&[u8]`, which must never point at memory a guest writes at the same
//! time, and vm-memory's own transfer works on one slice and the file's own position only. Used by the block and vsock workers.
//! A transfer may be short; callers loop. Interrupted calls are retried here.
#![expect(unsafe_code, reason = "passes guest memory to vectored system calls without making references to it")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Slices taken per call; longer lists are transferred in part (the callers loop anyway).
pub const SLICES_MAX: usize = 256;

/// An iovec array over the first [`SLICES_MAX`] slices.
struct IoVectors {
    entries: Vec<libc::iovec>,
}

impl IoVectors {
    fn new<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>]) -> Self {
        let vector = |slice: &VolatileSlice<'_, B>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        Self { entries: slices.iter().take(SLICES_MAX).map(vector).collect() }
    }

    fn count(&self) -> libc::c_int {
        libc::c_int::try_from(self.entries.len()).expect("at most SLICES_MAX")
    }
}

/// Runs a system call until it is not interrupted and turns its result into `io::Result`.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(transferred) = usize::try_from(call()) {
            return Ok(transferred);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// The kernel's offset type; nothing we open reaches 2^63 bytes.
fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Reads from `file` at `offset` into `slices`; 0 means end of file.
pub fn read_at<B: BitmapSlice>(
    file: BorrowedFd<'_>,
    slices: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<usize> {
    let vectors = IoVectors::new(slices);
    let offset = file_offset(offset)?;
    // SAFETY: every entry covers exactly one volatile slice, which is mapped for its lifetime and outlives the call; the kernel may
    // write it while the guest does, which volatile memory allows.
    retry(|| unsafe { libc::preadv(file.as_raw_fd(), vectors.entries.as_ptr(), vectors.count(), offset) })
}

/// Writes `slices` to `file` at `offset`.
pub fn write_at<B: BitmapSlice>(
    file: BorrowedFd<'_>,
    slices: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<usize> {
    let vectors = IoVectors::new(slices);
    let offset = file_offset(offset)?;
    // SAFETY: as in `read_at`; the kernel only reads here.
    retry(|| unsafe { libc::pwritev(file.as_raw_fd(), vectors.entries.as_ptr(), vectors.count(), offset) })
}

/// Receives from a socket or pipe into `slices` without waiting; 0 means the peer has shut down its side.
pub fn receive<B: BitmapSlice>(socket: BorrowedFd<'_>, slices: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
    let vectors = IoVectors::new(slices);
    // SAFETY: as in `read_at`. The socket is non-blocking by its owner's choice.
    retry(|| unsafe { libc::readv(socket.as_raw_fd(), vectors.entries.as_ptr(), vectors.count()) })
}

/// Sends `slices` to a socket without waiting and without SIGPIPE.
pub fn send<B: BitmapSlice>(socket: BorrowedFd<'_>, slices: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
    let mut vectors = IoVectors::new(slices);
    // SAFETY: msghdr is plain data for which all zeroes means "no name, no control data".
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.entries.as_mut_ptr();
    message.msg_iovlen = vectors.entries.len();
    // SAFETY: `message` points at `vectors`, which outlives the call; entries as in `read_at`, only read.
    retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    use super::*;

    #[test]
    fn sockets_and_files_take_scattered_slices() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).expect("memory");
        let first = memory.get_slice(GuestAddress(0x10), 3).expect("slice");
        let second = memory.get_slice(GuestAddress(0x2000), 4).expect("slice");
        first.copy_from(b"abc");
        second.copy_from(b"defg");

        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        assert_eq!(send(ours.as_fd(), &[first, second]).expect("send"), 7);
        let mut got = [0u8; 7];
        theirs.read_exact(&mut got).expect("read");
        assert_eq!(&got, b"abcdefg");
        theirs.write_all(b"1234567").expect("write");
        assert_eq!(receive(ours.as_fd(), &[second, first]).expect("receive"), 7);
        let mut byte = [0u8; 3];
        first.copy_to(&mut byte);
        assert_eq!(&byte, b"567");

        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(std::env::temp_dir().join(format!("msb-transfer-{}", std::process::id())))
            .expect("file");
        assert_eq!(write_at(file.as_fd(), &[first, second], 100).expect("write"), 7);
        assert_eq!(read_at(file.as_fd(), &[second], 103).expect("read"), 4);
        assert_eq!(read_at(file.as_fd(), &[second], 200).expect("end of file"), 0);
        std::fs::remove_file(std::env::temp_dir().join(format!("msb-transfer-{}", std::process::id())))
            .expect("remove");
    }
}
