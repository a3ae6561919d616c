//! The bytes of FUSE (linux/fuse.h): little readers of requests and writers of replies. Bounded, total, no meaning.

use rustix::io::Errno;

/// Length of a request's header.
pub(super) const IN_HEADER_BYTES: usize = 40;
/// Length of a reply's header.
pub(super) const OUT_HEADER_BYTES: usize = 16;
/// Length of what precedes the data of a write.
pub(super) const WRITE_IN_BYTES: usize = 40;
/// Longest name of a directory entry (NAME_MAX).
pub(super) const NAME_LEN_MAX: usize = 255;

/// What a request's header says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; IN_HEADER_BYTES]) -> Self {
        let mut reader = Reader(bytes);
        let mut next_u32 = || reader.u32().unwrap_or_default();
        let (_len, opcode) = (next_u32(), next_u32());
        let (unique, node) = (reader.u64().unwrap_or_default(), reader.u64().unwrap_or_default());
        let (uid, gid) = (reader.u32().unwrap_or_default(), reader.u32().unwrap_or_default());
        Self { opcode, unique, node, uid, gid }
    }
}

/// A reply's header.
pub(super) fn out_header(unique: u64, payload_len: usize, error: i32) -> [u8; OUT_HEADER_BYTES] {
    let mut bytes = [0; OUT_HEADER_BYTES];
    let len = u32::try_from(OUT_HEADER_BYTES + payload_len).unwrap_or(u32::MAX);
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes[4..8].copy_from_slice(&(-error).to_le_bytes());
    bytes[8..].copy_from_slice(&unique.to_le_bytes());
    bytes
}

/// The arguments of a request. Too few bytes are EINVAL, whatever was wanted.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*head)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        self.take().map(u64::from_le_bytes)
    }

    pub(super) fn skip(&mut self, count: usize) -> Result<(), Errno> {
        self.0 = self.0.get(count..).ok_or(Errno::INVAL)?;
        Ok(())
    }

    /// A text that ends with a zero byte.
    pub(super) fn text(&mut self) -> Result<&'a [u8], Errno> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(Errno::INVAL)?;
        let (text, rest) = self.0.split_at(end);
        self.0 = &rest[1..];
        Ok(text)
    }

    /// The name of a directory entry: one component that leads nowhere but down.
    pub(super) fn name(&mut self) -> Result<&'a [u8], Errno> {
        let name = self.text()?;
        match name {
            b"" | b"." | b".." => Err(Errno::INVAL),
            name if name.contains(&b'/') => Err(Errno::INVAL),
            name if name.len() > NAME_LEN_MAX => Err(Errno::NAMETOOLONG),
            name => Ok(name),
        }
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        self.0
    }
}

/// Appends numbers to a reply.
pub(super) trait Writer {
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
}

impl Writer for Vec<u8> {
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }
    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }
    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }
}

/// What the guest is told of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) inode: u64,
    pub(super) size: u64,
    pub(super) blocks: u64,
    /// Access, modification, change: seconds and nanoseconds.
    pub(super) times: [(i64, u32); 3],
    pub(super) mode: u32,
    pub(super) links: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) device: u32,
    pub(super) block_len: u32,
}

impl Attributes {
    /// `struct fuse_attr`.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        out.put_u64(self.inode);
        out.put_u64(self.size);
        out.put_u64(self.blocks);
        for (seconds, _) in self.times {
            out.put_u64(seconds.cast_unsigned());
        }
        for (_, nanoseconds) in self.times {
            out.put_u32(nanoseconds);
        }
        for value in [self.mode, self.links, self.uid, self.gid, self.device, self.block_len, 0] {
            out.put_u32(value);
        }
    }
}

/// Time the guest may keep what it was told, in seconds: what others change on the host is seen after it.
const VALID_SECONDS: u64 = 1;

/// `struct fuse_entry_out`. Node 0: nothing is there.
pub(super) fn put_entry(out: &mut Vec<u8>, node: u64, attributes: &Attributes) {
    out.put_u64(node);
    out.put_u64(0);
    out.put_u64(VALID_SECONDS);
    out.put_u64(VALID_SECONDS);
    out.put_u64(0);
    attributes.put(out);
}

/// `struct fuse_attr_out`.
pub(super) fn put_attributes(out: &mut Vec<u8>, attributes: &Attributes) {
    out.put_u64(VALID_SECONDS);
    out.put_u64(0);
    attributes.put(out);
}

/// `struct fuse_open_out`.
pub(super) fn put_open(out: &mut Vec<u8>, handle: u64) {
    out.put_u64(handle);
    out.put_u64(0);
}

/// Length of `struct fuse_entry_out`.
pub(super) const ENTRY_BYTES: usize = 128;

/// Length of a directory entry with its padding.
pub(super) fn dirent_len(name: &[u8]) -> usize {
    (24 + name.len()).next_multiple_of(8)
}

/// `struct fuse_dirent`. `offset` is where the next one begins.
pub(super) fn put_dirent(out: &mut Vec<u8>, inode: u64, offset: u64, kind: u32, name: &[u8]) {
    let end = out.len() + dirent_len(name);
    out.put_u64(inode);
    out.put_u64(offset);
    out.put_u32(u32::try_from(name.len()).unwrap_or_default());
    out.put_u32(kind);
    out.extend_from_slice(name);
    out.resize(end, 0);
}

macro_rules! opcodes {
    ($($name:ident $value:literal)*) => { $(pub(super) const $name: u32 = $value;)* };
}

opcodes! {
    LOOKUP 1 FORGET 2 GETATTR 3 SETATTR 4 READLINK 5 SYMLINK 6 MKNOD 8 MKDIR 9 UNLINK 10 RMDIR 11 RENAME 12 LINK 13 OPEN 14 READ 15
    WRITE 16 STATFS 17 RELEASE 18 FSYNC 20 SETXATTR 21 GETXATTR 22 LISTXATTR 23 REMOVEXATTR 24 INIT 26 OPENDIR 27 READDIR 28
    RELEASEDIR 29 FSYNCDIR 30 CREATE 35 INTERRUPT 36 DESTROY 38 BATCH_FORGET 42 FALLOCATE 43 READDIRPLUS 44 RENAME2 45 LSEEK 46
}
