//! A file tree as rows that can be compared: from a directory, from a mounted image, from an image read by an independent library.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use msb_image::Digest;

/// Everything about one path that a container can see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub kind: char,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, i64),
    pub links: u64,
    /// Size and hash of a regular file.
    pub content: Option<(u64, Digest)>,
    pub target: Option<Vec<u8>>,
    pub device: Option<(u32, u32)>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same inode.
    pub same_as: Option<Vec<u8>>,
}

pub type Rows = BTreeMap<Vec<u8>, Row>;

/// Describes what is below `root`, itself included as the empty path.
pub fn of_directory(root: &Path) -> Rows {
    let mut paths = vec![Vec::new()];
    let mut all = Vec::new();
    while let Some(path) = paths.pop() {
        let full = root.join(OsStr::from_bytes(&path));
        if std::fs::symlink_metadata(&full).unwrap().is_dir() {
            for entry in std::fs::read_dir(&full).unwrap() {
                let name = entry.unwrap().file_name().into_vec();
                paths.push(if path.is_empty() { name } else { [&path[..], b"/", &name].concat() });
            }
        }
        all.push(path);
    }
    all.sort();
    let mut first = HashMap::new();
    let mut rows = Rows::new();
    for path in all {
        let full = if path.is_empty() { root.to_path_buf() } else { root.join(OsStr::from_bytes(&path)) };
        let metadata = std::fs::symlink_metadata(&full).unwrap();
        let file_type = metadata.file_type();
        let kind = match () {
            () if file_type.is_dir() => 'd',
            () if file_type.is_file() => '-',
            () if file_type.is_symlink() => 'l',
            () if file_type.is_char_device() => 'c',
            () if file_type.is_block_device() => 'b',
            () if file_type.is_fifo() => 'p',
            () => '?',
        };
        let content = (kind == '-').then(|| (metadata.len(), Digest::of(&std::fs::read(&full).unwrap())));
        let xattrs = xattr::list(&full)
            .unwrap()
            .map(|name| {
                let value = xattr::get(&full, &name).unwrap().unwrap_or_default();
                (name.into_vec(), value)
            })
            .collect();
        let rdev = metadata.rdev();
        let same_as = first.entry(metadata.ino()).or_insert_with(|| path.clone()).clone();
        let row = Row {
            kind,
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            links: metadata.nlink(),
            content,
            target: (kind == 'l').then(|| std::fs::read_link(&full).unwrap().into_os_string().into_vec()),
            device: matches!(kind, 'c' | 'b').then(|| (rustix::fs::major(rdev), rustix::fs::minor(rdev))),
            xattrs,
            same_as: (same_as != path).then_some(same_as),
        };
        rows.insert(path, row);
    }
    rows
}

/// Describes an EROFS image, read by a library that shares no code with the writer.
pub fn of_erofs(image: &[u8]) -> Rows {
    use erofs_rs::backend::SliceImage;
    let erofs = erofs_rs::EroFS::new(SliceImage::new(image)).unwrap();
    let mut found = Vec::new();
    let root = erofs.get_inode(erofs.super_block().root_inode_id()).unwrap();
    found.push((Vec::new(), root));
    for entry in erofs.walk_dir("/").unwrap() {
        let entry = entry.unwrap();
        let path = entry.dir_entry.path().as_bytes().to_vec();
        found.push((path.strip_prefix(b"/").unwrap_or(&path).to_vec(), entry.inode));
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    let mut first = HashMap::new();
    let mut rows = Rows::new();
    for (path, inode) in found {
        let (major_minor, kind) = (inode.device(), inode.file_type());
        let kind = match format!("{kind:?}").as_str() {
            "Directory" => 'd',
            "RegularFile" => '-',
            "Symlink" => 'l',
            "CharacterDevice" | "CharDevice" => 'c',
            "BlockDevice" => 'b',
            "Fifo" | "NamedPipe" => 'p',
            other => panic!("{other}"),
        };
        let content = (kind == '-').then(|| {
            let mut bytes = Vec::new();
            erofs.open_inode_file(inode).unwrap().read_to_end(&mut bytes).unwrap();
            (bytes.len() as u64, Digest::of(&bytes))
        });
        let same_as = first.entry(inode.id()).or_insert_with(|| path.clone()).clone();
        let (seconds, nanoseconds) = inode.modified_unix();
        let row = Row {
            kind,
            mode: {
                use std::os::unix::fs::PermissionsExt as _;
                inode.permissions().mode() & 0o7777
            },
            uid: inode.uid(),
            gid: inode.gid(),
            mtime: (seconds, i64::from(nanoseconds)),
            links: u64::from(inode.nlink()),
            content,
            target: (kind == 'l').then(|| erofs.read_link_inode(inode).unwrap().as_bytes().to_vec()),
            device: major_minor.filter(|_| matches!(kind, 'c' | 'b')),
            xattrs: erofs.xattrs_inode(inode).unwrap(),
            same_as: (same_as != path).then_some(same_as),
        };
        rows.insert(path, row);
    }
    rows
}

/// Fails with the paths that differ, not with two whole trees.
pub fn assert_same(expected: &Rows, actual: &Rows, what: &str) {
    let mut differences = Vec::new();
    for (path, row) in expected {
        match actual.get(path) {
            None => differences.push(format!("{} is missing", path.escape_ascii())),
            Some(other) if other != row => {
                differences.push(format!("{}:\n   expected {row:?}\n   got      {other:?}", path.escape_ascii()));
            }
            Some(_) => {}
        }
    }
    for path in actual.keys().filter(|path| !expected.contains_key(*path)) {
        differences.push(format!("{} should not be there", path.escape_ascii()));
    }
    assert!(differences.is_empty(), "{what}: {} differences\n{}", differences.len(), differences.join("\n"));
}
