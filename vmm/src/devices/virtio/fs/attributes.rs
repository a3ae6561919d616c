//! Whose file it is. Files of the user who runs this process belong to the guest's user, whoever that is; what the guest changes with
//! chown, chmod and mknod beyond what the host's file can hold is kept in the extended attribute `user.msb.stat`, as text:
//! `uid:gid:mode:device`, the mode in octal with its type.
//!
//! The host's file gets permission bits only, and its owner always keeps reading and writing (and searching) it: the guest's root, which
//! needs no bits, is an ordinary user here. Neither set-id bits nor owners nor device numbers reach the host.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, XattrFlags};
use rustix::io::Errno;

use super::wire::Attributes;

/// The extended attribute.
pub(super) const STAT_NAME: &str = "user.msb.stat";
/// What extended attributes of ours begin with; the guest sees none of them.
pub(super) const OWN_PREFIX: &[u8] = b"user.msb.";
/// Its length at most: four numbers.
const STAT_LEN_MAX: usize = 64;
/// Owner of other users' files, as far as the guest is told (as NFS's nobody).
const NOBODY: u32 = 65_534;
const TYPE_MASK: u32 = 0o170_000;
const SET_USER_ID: u32 = 0o4000;
const SET_GROUP_ID: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o0010;

/// Who owns what, on both sides.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    /// The user of this process.
    pub(super) host: (u32, u32),
    /// The user of the guest to whom the caller's files belong.
    pub(super) guest: (u32, u32),
}

impl Owner {
    /// The owner that the guest sees. Root on the host reads every file, so it shows every owner.
    fn shown(&self, uid: u32, gid: u32) -> (u32, u32) {
        let map = |id: u32, host: u32, guest: u32| match id {
            id if id == host => guest,
            id if self.host.0 == 0 => id,
            _ => NOBODY,
        };
        (map(uid, self.host.0, self.guest.0), map(gid, self.host.1, self.guest.1))
    }
}

/// The parts of a file that the guest may change and the host's file may not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mode: u32,
    pub(super) device: u32,
}

impl Stat {
    fn to_text(self) -> String {
        format!("{}:{}:{:o}:{}", self.uid, self.gid, self.mode, self.device)
    }

    /// Whoever may write the directory on the host may write this text, so it is checked like any other.
    fn parse(text: &[u8]) -> Option<Self> {
        let mut parts = std::str::from_utf8(text).ok()?.split(':');
        let mut number = || parts.next()?.parse::<u32>().ok();
        let (uid, gid) = (number()?, number()?);
        let mode = u32::from_str_radix(parts.next()?, 8).ok().filter(|mode| *mode <= 0o177_777)?;
        let device = parts.next()?.parse().ok()?;
        parts.next().is_none().then_some(Self { uid, gid, mode, device })
    }
}

/// The path that means an open file, whatever it is called now.
pub(super) fn path_of(file: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// What the host says of a file.
pub(super) fn host_stat(file: BorrowedFd<'_>) -> Result<Statx, Errno> {
    rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)
}

/// The device and number of a file, which name it on this host.
pub(super) fn key_of(stat: &Statx) -> (u64, u64) {
    (rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino)
}

/// The type of a file on the host.
pub(super) fn type_of(stat: &Statx) -> FileType {
    FileType::from_raw_mode(u32::from(stat.stx_mode))
}

/// Whether a file of the host can hold extended attributes of a user.
fn holds_stat(kind: FileType) -> bool {
    matches!(kind, FileType::RegularFile | FileType::Directory)
}

/// What the extended attribute says, if there is one. Its type counts only on what a mknod of the guest made: a regular file.
fn kept_stat(file: BorrowedFd<'_>, kind: FileType) -> Option<Stat> {
    if !holds_stat(kind) {
        return None;
    }
    let mut text = [0; STAT_LEN_MAX];
    let len = rustix::fs::getxattr(path_of(file), STAT_NAME, &mut text).ok()?;
    let mut stat = Stat::parse(text.get(..len)?)?;
    let is_special = matches!(
        FileType::from_raw_mode(stat.mode),
        FileType::CharacterDevice | FileType::BlockDevice | FileType::Fifo | FileType::Socket
    );
    if !(kind == FileType::RegularFile && is_special) {
        stat.mode = stat.mode & !TYPE_MASK | kind.as_raw_mode();
        stat.device = 0;
    }
    Some(stat)
}

fn host_device(stat: &Statx) -> u32 {
    // new_encode_dev of the kernel: what fuse_attr.rdev holds.
    let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// What the guest is shown without the extended attribute.
fn plain_stat(stat: &Statx, owner: &Owner) -> Stat {
    let (uid, gid) = owner.shown(stat.stx_uid, stat.stx_gid);
    Stat { uid, gid, mode: u32::from(stat.stx_mode), device: host_device(stat) }
}

/// Everything the guest is told of a file.
pub(super) fn attributes(file: BorrowedFd<'_>, stat: &Statx, owner: &Owner) -> Attributes {
    told(stat, kept_stat(file, type_of(stat)).unwrap_or_else(|| plain_stat(stat, owner)))
}

/// The same where it is known what the guest is shown.
pub(super) fn told(stat: &Statx, shown: Stat) -> Attributes {
    let time = |time: &rustix::fs::StatxTimestamp| (time.tv_sec, time.tv_nsec);
    Attributes {
        inode: stat.stx_ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        times: [time(&stat.stx_atime), time(&stat.stx_mtime), time(&stat.stx_ctime)],
        mode: shown.mode,
        links: stat.stx_nlink,
        uid: shown.uid,
        gid: shown.gid,
        device: shown.device,
        block_len: stat.stx_blksize,
    }
}

/// The permission bits that a file of the host gets for a mode of the guest.
pub(super) fn host_mode(mode: u32, is_directory: bool) -> u32 {
    mode & 0o777 | if is_directory { 0o700 } else { 0o600 }
}

/// Keeps what the host's file does not say by itself; takes the attribute away when it says it all.
fn keep(file: BorrowedFd<'_>, wanted: Stat, stat: &Statx, owner: &Owner) -> Result<(), Errno> {
    if wanted == plain_stat(stat, owner) {
        return match rustix::fs::removexattr(path_of(file), STAT_NAME) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => Err(errno),
        };
    }
    remember(file, wanted)
}

fn remember(file: BorrowedFd<'_>, wanted: Stat) -> Result<(), Errno> {
    match rustix::fs::setxattr(path_of(file), STAT_NAME, wanted.to_text().as_bytes(), XattrFlags::empty()) {
        // What the file system cannot remember is refused as a server without that right refuses it.
        Err(Errno::OPNOTSUPP | Errno::NOSPC | Errno::DQUOT) => Err(Errno::PERM),
        outcome => outcome,
    }
}

/// What a chmod or chown asks for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Change {
    pub(super) mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
}

/// Carries a chmod or chown out; what the file is on the host then, and what the guest is shown.
pub(super) fn change(file: BorrowedFd<'_>, change: Change, owner: &Owner) -> Result<(Statx, Stat), Errno> {
    let mut stat = host_stat(file)?;
    let kind = type_of(&stat);
    if !holds_stat(kind) {
        // A link has no mode, and its owner decides nothing: whoever unpacks an archive as root should not fail on it.
        return if change.mode.is_some() { Err(Errno::OPNOTSUPP) } else { Ok((stat, plain_stat(&stat, owner))) };
    }
    let kept = kept_stat(file, kind);
    let mut wanted = kept.unwrap_or_else(|| plain_stat(&stat, owner));
    if (change.uid.is_some() || change.gid.is_some()) && kind == FileType::RegularFile {
        wanted.mode = without_set_id(wanted.mode);
    }
    wanted.uid = change.uid.unwrap_or(wanted.uid);
    wanted.gid = change.gid.unwrap_or(wanted.gid);
    if let Some(mode) = change.mode {
        wanted.mode = wanted.mode & TYPE_MASK | mode & 0o7777;
        let real = host_mode(mode, kind == FileType::Directory);
        if u32::from(stat.stx_mode) & 0o7777 != real {
            let mode = rustix::fs::Mode::from_raw_mode(real);
            rustix::fs::chmodat(rustix::fs::CWD, path_of(file), mode, AtFlags::empty())?;
            stat = host_stat(file)?;
        }
    }
    if kept.is_none() && wanted == plain_stat(&stat, owner) {
        // Nothing is kept, and nothing need be.
        return Ok((stat, wanted));
    }
    keep(file, wanted, &stat, owner)?;
    Ok((host_stat(file)?, wanted))
}

/// Gives a file that was just made to its maker; what it is on the host, and what the guest is shown. What cannot be
/// remembered is the guest's user's.
pub(super) fn adopt(file: BorrowedFd<'_>, wanted: Stat, owner: &Owner) -> Result<(Statx, Stat), Errno> {
    let mut stat = host_stat(file)?;
    let kind = type_of(&stat);
    let special = wanted.mode & TYPE_MASK != kind.as_raw_mode();
    let real = host_mode(wanted.mode, kind == FileType::Directory);
    if holds_stat(kind) && u32::from(stat.stx_mode) & 0o777 != real {
        // A mask of this process that could not be cleared (`LoopHandle::clear_mode_mask`), or bits that the owner must
        // keep.
        rustix::fs::chmodat(rustix::fs::CWD, path_of(file), rustix::fs::Mode::from_raw_mode(real), AtFlags::empty())?;
        stat = host_stat(file)?;
    }
    let plain = plain_stat(&stat, owner);
    if wanted == plain {
        // It was just made: there is no attribute to take away.
        return Ok((stat, plain));
    }
    match remember(file, wanted) {
        Ok(()) => Ok((host_stat(file)?, wanted)),
        Err(errno) if special => Err(errno),
        Err(_) => Ok((stat, plain)),
    }
}

fn without_set_id(mode: u32) -> u32 {
    let mode = mode & !SET_USER_ID;
    if mode & GROUP_EXECUTE != 0 { mode & !SET_GROUP_ID } else { mode }
}

/// Takes set-id bits away, as a write by somebody else must.
pub(super) fn strip_set_id(file: BorrowedFd<'_>, owner: &Owner) {
    if let Ok(stat) = host_stat(file)
        && let Some(kept) = kept_stat(file, type_of(&stat))
        && without_set_id(kept.mode) != kept.mode
    {
        // It fails only where it could not have been kept either.
        let _ = keep(file, Stat { mode: without_set_id(kept.mode), ..kept }, &stat, owner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stats_are_texts_and_nothing_else_is_one() {
        let stat = Stat { uid: 1, gid: 2, mode: 0o104_755, device: 0 };
        assert_eq!(stat.to_text(), "1:2:104755:0");
        assert_eq!(Stat::parse(b"1:2:104755:0"), Some(stat));
        for bad in [&b""[..], b"1:2:3", b"1:2:9:0", b"1:2:755:0:1", b"-1:2:755:0", b"1:2:7777777:0", b"\xff"] {
            assert_eq!(Stat::parse(bad), None);
        }
    }

    #[test]
    fn owners_are_mapped_both_ways() {
        let user = Owner { host: (1000, 1000), guest: (0, 0) };
        assert_eq!(user.shown(1000, 1000), (0, 0));
        assert_eq!(user.shown(0, 1001), (NOBODY, NOBODY));
        let root = Owner { host: (0, 0), guest: (33, 33) };
        assert_eq!(root.shown(0, 0), (33, 33));
        assert_eq!(root.shown(1000, 100), (1000, 100));
    }

    #[test]
    fn the_host_gets_permission_bits_only_and_its_owner_keeps_his() {
        assert_eq!(host_mode(0o4755, false), 0o755);
        assert_eq!(host_mode(0o000, false), 0o600);
        assert_eq!(host_mode(0o1777, true), 0o777);
        assert_eq!(without_set_id(0o106_755), 0o100_755);
        assert_eq!(without_set_id(0o102_644), 0o102_644);
    }
}
