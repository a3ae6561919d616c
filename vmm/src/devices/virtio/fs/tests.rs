//! A hostile guest against a real directory: requests as bytes, straight to the server.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;

use super::Share;
use super::nodes::TOP;
use super::server::{Answer, Server};
use super::wire::{self, Header, Writer};

struct Guest {
    server: Server,
    uid: u32,
}

fn share(path: &Path, name: &str, read_only: bool) -> Share {
    let root: OwnedFd = std::fs::File::open(path).expect("open").into();
    Share::new(name.into(), root, read_only).expect("stat").root_owned(name == "root")
}

impl Guest {
    fn new(shares: Vec<Share>, files_max: usize) -> Self {
        let host = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self { server: Server::new(Arc::new(shares), host, files_max), uid: 0 }
    }

    fn ask(&mut self, opcode: u32, node: u64, arguments: &[u8]) -> Result<Vec<u8>, Errno> {
        let header = Header { opcode, unique: 7, node, uid: self.uid, gid: self.uid };
        match self.server.answer(&header, arguments, 128 << 10)? {
            Answer::Reply(reply) => Ok(reply),
            Answer::Silence => Ok(Vec::new()),
        }
    }

    fn look_up(&mut self, parent: u64, name: &str) -> Result<u64, Errno> {
        let reply = self.ask(wire::LOOKUP, parent, &text(name))?;
        Ok(u64::from_le_bytes(reply[..8].try_into().unwrap()))
    }

    fn make_directory(&mut self, parent: u64, name: &str) -> Result<u64, Errno> {
        let mut arguments = numbers(&[0o755, 0]);
        arguments.extend(text(name));
        let reply = self.ask(wire::MKDIR, parent, &arguments)?;
        Ok(u64::from_le_bytes(reply[..8].try_into().unwrap()))
    }

    fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(u64, u64), Errno> {
        let mut arguments = numbers(&[libc::O_RDWR as u32 | libc::O_CREAT as u32, mode, 0, 0]);
        arguments.extend(text(name));
        let reply = self.ask(wire::CREATE, parent, &arguments)?;
        let number = |at: usize| u64::from_le_bytes(reply[at..at + 8].try_into().unwrap());
        Ok((number(0), number(wire::ENTRY_BYTES)))
    }

    /// Mode, user and group as the guest sees them.
    fn stat(&mut self, node: u64) -> Result<(u32, u32, u32), Errno> {
        let reply = self.ask(wire::GETATTR, node, &[0; 16])?;
        let number = |at: usize| u32::from_le_bytes(reply[at..at + 4].try_into().unwrap());
        Ok((number(16 + 60), number(16 + 68), number(16 + 72)))
    }

    fn change(&mut self, node: u64, valid: u32, mode: u32, uid: u32) -> Result<Vec<u8>, Errno> {
        let mut arguments = numbers(&[valid, 0]);
        arguments.resize(68, 0);
        arguments.put_u32(mode);
        arguments.put_u32(0);
        arguments.put_u32(uid);
        arguments.put_u32(uid);
        arguments.put_u32(0);
        self.ask(wire::SETATTR, node, &arguments)
    }

    fn rename(&mut self, from: u64, old: &str, to: u64, new: &str) -> Result<Vec<u8>, Errno> {
        let mut arguments = to.to_le_bytes().to_vec();
        arguments.extend(text(old));
        arguments.extend(text(new));
        self.ask(wire::RENAME, from, &arguments)
    }
}

fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

fn numbers(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A directory beside another one that must stay untouched.
fn house() -> (tempfile::TempDir, std::path::PathBuf) {
    let house = tempfile::tempdir().expect("directory");
    let shared = house.path().join("shared");
    std::fs::create_dir(&shared).expect("directory");
    std::fs::write(house.path().join("secret"), "secret").expect("file");
    (house, shared)
}

#[test]
fn names_lead_nowhere_but_down() {
    let (house, shared) = house();
    symlink("../secret", shared.join("link")).unwrap();
    symlink(house.path(), shared.join("out")).unwrap();
    let mut guest = Guest::new(vec![share(&shared, "0", false)], 100);
    let root = guest.look_up(TOP, "0").unwrap();
    for name in ["..", ".", "", "../secret", "/etc/passwd", "a/b"] {
        assert_eq!(guest.look_up(root, name), Err(Errno::INVAL), "{name}");
        assert!(guest.create(root, name, 0o644).is_err(), "{name}");
        assert!(guest.make_directory(root, name).is_err(), "{name}");
        assert!(guest.rename(root, "link", root, name).is_err(), "{name}");
    }
    // A link is a link: it is neither followed nor opened, nor a directory to look in.
    let link = guest.look_up(root, "link").unwrap();
    assert_eq!(guest.ask(wire::READLINK, link, &[]).unwrap(), b"../secret");
    assert_eq!(guest.ask(wire::OPEN, link, &[0; 8]), Err(Errno::PERM));
    let out = guest.look_up(root, "out").unwrap();
    assert!(guest.look_up(out, "secret").is_err());
    assert!(guest.make_directory(out, "made").is_err());
    assert!(guest.ask(wire::OPENDIR, out, &[0; 8]).is_err());
    // Opening for creation through a link does not reach the other side.
    assert!(guest.create(root, "link", 0o644).is_err());
    assert_eq!(std::fs::read(house.path().join("secret")).unwrap(), b"secret");
    assert!(!house.path().join("made").exists());
    assert_eq!(guest.look_up(9_999, "x"), Err(Errno::STALE), "a number that nobody was told");
}

#[test]
fn a_directory_that_becomes_a_link_behind_the_guests_back_is_not_followed() {
    let (house, shared) = house();
    std::fs::create_dir(shared.join("dir")).unwrap();
    std::fs::write(shared.join("dir/secret"), "own").unwrap();
    // One descriptor only: everything is found again by its names.
    let mut guest = Guest::new(vec![share(&shared, "0", false)], 1);
    let root = guest.look_up(TOP, "0").unwrap();
    let directory = guest.look_up(root, "dir").unwrap();
    let secret = guest.look_up(directory, "secret").unwrap();
    let other = guest.create(root, "other", 0o644).unwrap().0;
    guest.stat(other).unwrap();
    assert_eq!(guest.stat(secret).unwrap().0, 0o100_644);
    guest.stat(other).unwrap();
    guest.stat(other).unwrap();
    std::fs::rename(shared.join("dir"), shared.join("moved")).unwrap();
    symlink(house.path(), shared.join("dir")).unwrap();
    assert_eq!(guest.stat(secret), Err(Errno::STALE));
    // What the guest itself renames it keeps.
    std::fs::create_dir(shared.join("a")).unwrap();
    std::fs::write(shared.join("a/file"), "x").unwrap();
    let a = guest.look_up(root, "a").unwrap();
    let file = guest.look_up(a, "file").unwrap();
    guest.rename(root, "a", root, "b").unwrap();
    guest.stat(other).unwrap();
    guest.stat(other).unwrap();
    assert!(guest.stat(file).is_ok());
}

#[test]
fn a_read_only_share_refuses_every_change() {
    let (_house, shared) = house();
    std::fs::write(shared.join("file"), "x").unwrap();
    let mut guest = Guest::new(vec![share(&shared, "0", true), share(&shared, "1", false)], 100);
    let root = guest.look_up(TOP, "0").unwrap();
    let file = guest.look_up(root, "file").unwrap();
    assert_eq!(guest.create(root, "new", 0o644), Err(Errno::ROFS));
    assert_eq!(guest.make_directory(root, "new"), Err(Errno::ROFS));
    assert_eq!(guest.ask(wire::UNLINK, root, &text("file")), Err(Errno::ROFS));
    assert_eq!(guest.rename(root, "file", root, "new"), Err(Errno::ROFS));
    assert_eq!(guest.change(file, 1, 0o777, 0), Err(Errno::ROFS));
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(guest.ask(wire::OPEN, file, &numbers(&[flags as u32, 0])), Err(Errno::ROFS));
    }
    assert!(guest.ask(wire::OPEN, file, &[0; 8]).is_ok());
    // Nor is it a source of names for a share that may be changed.
    let other = guest.look_up(TOP, "1").unwrap();
    let mut arguments = file.to_le_bytes().to_vec();
    arguments.extend(text("linked"));
    assert_eq!(guest.ask(wire::LINK, other, &arguments), Err(Errno::ROFS));
    assert_eq!(std::fs::read_dir(&shared).unwrap().count(), 1);
}

#[test]
fn the_guests_owners_and_modes_are_remembered_and_the_hosts_stay_its_own() {
    let (_house, shared) = house();
    std::fs::write(shared.join("mine"), "x").unwrap();
    let mut guest = Guest::new(vec![share(&shared, "0", false), share(&shared, "root", true)], 100);
    let mut owner = numbers(&[5, 0]);
    owner.extend(text("user.msb.owner"));
    owner.extend(b"33:34");
    guest.ask(wire::SETXATTR, TOP, &owner).unwrap();
    assert_eq!(guest.ask(wire::SETXATTR, TOP, &owner), Err(Errno::PERM), "once");
    // What a sandbox's root is made of is root's there.
    let root = guest.look_up(TOP, "root").unwrap();
    let mine = guest.look_up(root, "mine").unwrap();
    assert_eq!(guest.stat(mine).unwrap(), (0o100_644, 0, 0));
    let root = guest.look_up(TOP, "0").unwrap();
    let mine = guest.look_up(root, "mine").unwrap();
    assert_eq!(guest.stat(mine).unwrap(), (0o100_644, 33, 34));
    let (made, _) = guest.create(root, "made", 0o4755).unwrap();
    let host = || std::fs::metadata(shared.join("made")).unwrap();
    assert_eq!(host().permissions().mode() & 0o7777, 0o755, "no set-id bit on the host");
    if rustix::fs::setxattr(shared.join("mine"), "user.probe", b"", rustix::fs::XattrFlags::empty()).is_err() {
        return; // This file system remembers nothing; `chown` is refused then.
    }
    assert_eq!(guest.stat(made).unwrap(), (0o104_755, 0, 0));
    guest.change(made, 0b110, 0, 1234).unwrap();
    assert_eq!(guest.stat(made).unwrap(), (0o100_755, 1234, 1234), "chown takes set-id bits");
    guest.change(made, 1, 0o000, 0).unwrap();
    assert_eq!(guest.stat(made).unwrap(), (0o100_000, 1234, 1234));
    assert_eq!((host().permissions().mode() & 0o777, host().uid()), (0o600, rustix::process::geteuid().as_raw()));
    // Special files are the guest's idea.
    let mut node = numbers(&[libc::S_IFCHR | 0o666, 0x0103, 0, 0]);
    node.extend(text("device"));
    guest.ask(wire::MKNOD, root, &node).unwrap();
    let device = guest.look_up(root, "device").unwrap();
    assert_eq!(guest.stat(device).unwrap().0, 0o020_666);
    assert!(std::fs::metadata(shared.join("device")).unwrap().is_file());
    // Our attributes are out of its sight and reach.
    let mut get = numbers(&[64, 0]);
    get.extend(text("user.msb.stat"));
    assert!(guest.ask(wire::GETXATTR, made, &get).is_err());
    assert_eq!(guest.ask(wire::LISTXATTR, made, &numbers(&[4096, 0])).unwrap(), b"");
}

#[test]
fn nothing_but_files_and_directories_is_opened() {
    let (_house, shared) = house();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        shared.join("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o666),
        0,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(shared.join("socket")).unwrap();
    let mut guest = Guest::new(vec![share(&shared, "0", false)], 100);
    let root = guest.look_up(TOP, "0").unwrap();
    for name in ["fifo", "socket"] {
        let node = guest.look_up(root, name).unwrap();
        assert_eq!(guest.ask(wire::OPEN, node, &numbers(&[libc::O_RDWR as u32, 0])), Err(Errno::PERM), "{name}");
        assert_eq!(guest.create(root, name, 0o644), Err(Errno::PERM), "{name}");
    }
}

#[test]
fn what_the_guest_knows_is_bounded_and_forgotten() {
    let (_house, shared) = house();
    for number in 0..50 {
        std::fs::write(shared.join(format!("f{number}")), "x").unwrap();
    }
    let mut guest = Guest::new(vec![share(&shared, "0", false)], 8);
    let root = guest.look_up(TOP, "0").unwrap();
    let nodes: Vec<u64> = (0..50).map(|number| guest.look_up(root, &format!("f{number}")).unwrap()).collect();
    assert!(nodes.iter().all(|node| guest.stat(*node).is_ok()), "every one is found again");
    assert!(guest.server.nodes.counts().1 <= 9, "{:?}", guest.server.nodes.counts());
    for node in &nodes {
        guest.ask(wire::FORGET, *node, &1u64.to_le_bytes()).unwrap();
    }
    assert_eq!(guest.server.nodes.counts().0, 1);
    guest.ask(wire::FORGET, root, &u64::MAX.to_le_bytes()).unwrap();
    assert!(guest.stat(root).is_ok(), "a share's root stays");
    let (file, _) = guest.create(root, "many", 0o644).unwrap();
    let opened = (0..20).filter(|_| guest.ask(wire::OPEN, file, &[0; 8]).is_ok()).count();
    assert!(opened <= 8, "{opened}");
}

#[test]
fn directories_are_read_in_pieces_that_fit() {
    let (_house, shared) = house();
    for number in 0..100 {
        std::fs::write(shared.join(format!("file-{number:03}")), "x").unwrap();
    }
    let mut guest = Guest::new(vec![share(&shared, "0", false)], 1000);
    let root = guest.look_up(TOP, "0").unwrap();
    for (opcode, prefix) in [(wire::READDIR, 0), (wire::READDIRPLUS, wire::ENTRY_BYTES)] {
        let handle = guest.ask(wire::OPENDIR, root, &[0; 8]).unwrap();
        let handle = u64::from_le_bytes(handle[..8].try_into().unwrap());
        let (mut offset, mut names) = (0u64, std::collections::BTreeSet::new());
        loop {
            let mut arguments = handle.to_le_bytes().to_vec();
            arguments.put_u64(offset);
            arguments.put_u32(600);
            let reply = guest.ask(opcode, root, &arguments).unwrap();
            assert!(reply.len() <= 600);
            if reply.is_empty() {
                break;
            }
            let mut at = 0;
            while at < reply.len() {
                let entry = &reply[at + prefix..];
                offset = u64::from_le_bytes(entry[8..16].try_into().unwrap());
                let len = u32::from_le_bytes(entry[16..20].try_into().unwrap()) as usize;
                assert!(names.insert(String::from_utf8(entry[24..24 + len].to_vec()).unwrap()), "twice");
                at += prefix + wire::dirent_len(&entry[24..24 + len]);
            }
        }
        assert_eq!(names.len(), 102, "100 files and the two dots");
    }
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_answered_and_nothing_outside_changes(
        requests in proptest::collection::vec(
            (0u32..60, 0u64..8, proptest::collection::vec(proptest::num::u8::ANY, 0..120)),
            1..40,
        ),
    ) {
        let (house, shared) = house();
        std::fs::write(shared.join("file"), "x").unwrap();
        let mut guest = Guest::new(vec![share(&shared, "0", false)], 4);
        for (opcode, node, arguments) in requests {
            let _ = guest.ask(opcode, node, &arguments);
        }
        proptest::prop_assert_eq!(std::fs::read(house.path().join("secret")).unwrap(), b"secret");
        proptest::prop_assert_eq!(std::fs::read_dir(house.path()).unwrap().count(), 2);
    }
}

#[test]
fn a_quota_bounds_what_is_written_and_gives_room_back() {
    let (_house, shared) = house();
    let quota = share(&shared, "0", false).quota(Some(1 << 20));
    let mut guest = Guest::new(vec![quota, share(&shared, "1", false)], 100);
    let allocate = |handle: u64, len: u64| {
        let mut arguments = [handle, 0, len].map(u64::to_le_bytes).concat();
        arguments.extend([0; 8]);
        arguments
    };
    let free = |guest: &mut Guest, root: u64| {
        let reply = guest.ask(wire::STATFS, root, &[]).unwrap();
        let number = |at: usize| u64::from_le_bytes(reply[at..at + 8].try_into().unwrap());
        let block = u64::from(u32::from_le_bytes(reply[40..44].try_into().unwrap()));
        (number(0) * block, number(16) * block)
    };
    let root = guest.look_up(TOP, "0").unwrap();
    let (file, handle) = guest.create(root, "file", 0o644).unwrap();
    guest.ask(wire::FALLOCATE, file, &allocate(handle, 900 << 10)).unwrap();
    assert_eq!(guest.ask(wire::FALLOCATE, file, &allocate(handle, 1 << 20)), Err(Errno::NOSPC));
    let (size, left) = free(&mut guest, root);
    assert!(size == 1 << 20 && left < 200 << 10, "{size} {left}");
    // Over what is there it writes on, beyond it not.
    assert!(guest.server.room_to_write(handle, 0, 900 << 10).unwrap().is_some());
    assert_eq!(guest.server.room_to_write(handle, 900 << 10, 200 << 10), Err(Errno::NOSPC));
    // A deleted file takes its room until nobody has it open.
    guest.ask(wire::UNLINK, root, &text("file")).unwrap();
    let (other, second) = guest.create(root, "other", 0o644).unwrap();
    assert_eq!(guest.ask(wire::FALLOCATE, other, &allocate(second, 900 << 10)), Err(Errno::NOSPC));
    guest.ask(wire::RELEASE, file, &handle.to_le_bytes()).unwrap();
    guest.ask(wire::FALLOCATE, other, &allocate(second, 900 << 10)).unwrap();
    // Without a quota there is none.
    let plain = guest.look_up(TOP, "1").unwrap();
    let (more, third) = guest.create(plain, "more", 0o644).unwrap();
    guest.ask(wire::FALLOCATE, more, &allocate(third, 4 << 20)).unwrap();
    assert!(free(&mut guest, plain).0 > 1 << 20);
    // Others filled it meanwhile: that is seen when room is looked for.
    assert_eq!(guest.create(root, "again", 0o644).map(drop), Ok(()));
    assert_eq!(guest.ask(wire::FALLOCATE, other, &allocate(second, 950 << 10)), Err(Errno::NOSPC));
}

#[test]
fn what_is_told_with_a_change_is_what_is_told_when_asked() {
    let (_house, shared) = house();
    let mut guest = Guest::new(vec![share(&shared, "0", false)], 100);
    let root = guest.look_up(TOP, "0").unwrap();
    for (uid, mode) in [(0, 0o644), (7, 0o4755), (0, 0o400)] {
        guest.uid = uid;
        let mut arguments = numbers(&[libc::O_RDWR as u32 | libc::O_CREAT as u32, mode, 0, 0]);
        arguments.extend(text(&format!("{uid}-{mode}")));
        let made = guest.ask(wire::CREATE, root, &arguments).unwrap();
        let node = u64::from_le_bytes(made[..8].try_into().unwrap());
        // The attributes are the last 88 bytes of an entry and of an answer about attributes.
        let told = |reply: &[u8], end: usize| reply[end - 88..end].to_vec();
        let asked = guest.ask(wire::GETATTR, node, &[0; 16]).unwrap();
        assert_eq!(told(&made, wire::ENTRY_BYTES), told(&asked, 104), "made by {uid} with {mode:o}");
        assert_eq!(guest.stat(node).unwrap(), (0o100_000 | mode, uid, uid));
        // Owner alone, mode alone, both, and back to what the host's file says by itself.
        for (valid, mode, uid) in [(6, 0, 0), (1, 0o640, 0), (7, 0o2750, 9), (7, 0o600, 0)] {
            let changed = guest.change(node, valid, mode, uid).unwrap();
            let asked = guest.ask(wire::GETATTR, node, &[0; 16]).unwrap();
            assert_eq!(told(&changed, 104), told(&asked, 104), "{valid} {mode:o} {uid}");
        }
        assert_eq!(guest.stat(node).unwrap(), (0o100_600, 0, 0));
    }
    let made = guest.ask(wire::SYMLINK, root, &[text("link"), text("target")].concat()).unwrap();
    let link = u64::from_le_bytes(made[..8].try_into().unwrap());
    let changed = guest.change(link, 6, 0, 9).unwrap();
    assert_eq!(changed, guest.ask(wire::GETATTR, link, &[0; 16]).unwrap());
}
