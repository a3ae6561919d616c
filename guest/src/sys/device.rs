//! Single ioctls and calls: entropy, growing ext4, the loopback interface, signals of any number, slewing the clock.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

/// Largest seed that one call takes, in bytes.
const SEED_LEN_MAX: usize = 512;

/// The argument of RNDADDENTROPY (linux/random.h: rand_pool_info).
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    seed_len: i32,
    seed: [u8; SEED_LEN_MAX],
}

nix::ioctl_write_ptr_bad!(rnd_add_entropy, nix::request_code_write!(b'R', 0x03, size_of::<[i32; 2]>()), PoolInfo);
nix::ioctl_none!(rnd_reseed, b'R', 0x07);
nix::ioctl_write_ptr!(ext4_resize, b'f', 16, u64);
nix::ioctl_readwrite!(file_system_trim, b'X', 121, TrimRange);

/// The argument of FITRIM (linux/fs.h: fstrim_range).
#[repr(C)]
struct TrimRange {
    start: u64,
    len: u64,
    min_len: u64,
}

/// Tells the device of a mounted file system which of its blocks are free.
///
/// # Errors
/// As ioctl(2).
pub fn trim(mount: impl AsFd) -> Result<(), Errno> {
    let mut range = TrimRange { start: 0, len: u64::MAX, min_len: 0 };
    // SAFETY: `range` is laid out as the kernel reads and writes it, and is valid for the call.
    unsafe { file_system_trim(mount.as_fd().as_raw_fd(), &raw mut range) }.map(drop)
}

/// Mixes a seed into the entropy pool and credits all of it.
///
/// # Errors
/// As ioctl(2).
pub fn add_entropy(random: impl AsFd, seed: &[u8]) -> Result<(), Errno> {
    for piece in seed.chunks(SEED_LEN_MAX) {
        let len = i32::try_from(piece.len()).map_err(|_| Errno::EINVAL)?;
        let mut info = PoolInfo { entropy_bits: len * 8, seed_len: len, seed: [0; SEED_LEN_MAX] };
        info.seed[..piece.len()].copy_from_slice(piece);
        // SAFETY: `info` is laid out as the kernel reads it and holds at least the `seed_len` bytes it announces.
        unsafe { rnd_add_entropy(random.as_fd().as_raw_fd(), &raw const info) }?;
    }
    Ok(())
}

/// Makes the kernel's generator take a new key from its pool now: what it gives from here on has the seeds of before in it.
///
/// # Errors
/// As ioctl(2).
pub fn reseed_entropy(random: impl AsFd) -> Result<(), Errno> {
    // SAFETY: this request has no argument.
    unsafe { rnd_reseed(random.as_fd().as_raw_fd()) }.map(drop)
}

/// Grows a mounted ext4 to a number of blocks.
///
/// # Errors
/// As ioctl(2).
pub fn grow_ext4(mount: impl AsFd, blocks: u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads one u64 from the pointer, which is valid for the call.
    unsafe { ext4_resize(mount.as_fd().as_raw_fd(), &raw const blocks) }.map(drop)
}

/// Sets the interface `lo` up.
///
/// # Errors
/// As socket(2) and netdevice(7).
pub fn bring_loopback_up() -> Result<(), Errno> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: a zeroed ifreq is valid; the kernel reads and writes only it, and the flags are the union's live member after SIOCGIFFLAGS.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l'.cast_signed();
        request.ifr_name[1] = b'o'.cast_signed();
        Errno::result(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request))?;
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        Errno::result(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request)).map(drop)
    }
}

/// Sends a signal of any number, real-time ones too, to one process.
///
/// # Errors
/// As pidfd_send_signal(2).
pub fn signal_pidfd(pidfd: impl AsFd, signal: i32) -> Result<(), Errno> {
    let information: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: a null siginfo asks the kernel to fill in its own; there are no other pointers.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_fd().as_raw_fd(), signal, information, 0) };
    Errno::result(result).map(drop)
}

/// Sends a signal of any number to a process group.
///
/// # Errors
/// As kill(2); EINVAL for ids that do not name one group.
pub fn kill_group(group: u32, signal: i32) -> Result<(), Errno> {
    let group = i32::try_from(group).ok().filter(|group| *group > 1).ok_or(Errno::EINVAL)?;
    // SAFETY: kill takes no pointers.
    Errno::result(unsafe { libc::kill(-group, signal) }).map(drop)
}

/// Lets the wall clock run a little faster or slower until it has moved by `offset_us` microseconds.
///
/// # Errors
/// As adjtime(3).
pub fn slew_clock(offset_us: i32) -> Result<(), Errno> {
    let delta = libc::timeval { tv_sec: i64::from(offset_us / 1_000_000), tv_usec: i64::from(offset_us % 1_000_000) };
    // SAFETY: `delta` is valid for the call and the old value is not asked for.
    Errno::result(unsafe { libc::adjtime(&raw const delta, std::ptr::null_mut()) }).map(drop)
}
