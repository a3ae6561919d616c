//! File sessions over socket pairs on the test machine's own root: what the daemon and SFTP see.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use msb_guest::agent::{Agent, connection};
use msb_guest::root::directory::RootDirectory;
use msb_guest::session::pump::OutputLog;
use msb_guest::session::workload::Host;
use msb_guest::session::{Guest, Sessions};
use msb_protocol::files::*;
use msb_protocol::frame::Decoder;
use msb_protocol::guest::{
    Assembler, Exited, GuestBody, GuestConfig, HostBody, Open, OpenKind, OutputStream, encode_host,
};

const BOOT_ID: &[u8] = b"0123456789abcdef";

struct Nobody;

impl OutputLog for Nobody {
    fn has_room(&self) -> bool {
        true
    }
    fn push(&self, _stream: OutputStream, _data: &[u8]) {}
}

impl Host for Nobody {
    fn main_started(&self, _pid: u32) {}
    fn main_exited(&self, _end: Exited) {}
    fn log(&self, _line: &str) {}
}

/// The host's end of a file session whose root is a directory of the test.
struct Session {
    socket: UnixStream,
    decoder: Decoder,
    assembler: Assembler,
    next: u32,
}

impl Session {
    /// Without privileges the root cannot be changed: then paths are the machine's own.
    fn open(root: &Path) -> Self {
        Self::open_kind(root, OpenKind::Files(OpenFiles { user: String::new(), at_home: false }))
    }

    fn open_kind(root: &Path, kind: OpenKind) -> Self {
        let guest = Guest {
            config: GuestConfig::default(),
            late_main: Default::default(),
            boot_id: BOOT_ID.to_vec(),
            root: RootDirectory::open(root).unwrap(),
            enter_root: rustix::process::geteuid().is_root(),
            null: std::fs::File::options().read(true).write(true).open("/dev/null").unwrap().into(),
            terminals: None,
            workload: None,
            security: msb_guest::security::Security::new(msb_protocol::security::SecurityProfile::Default).unwrap(),
            sessions: Sessions::default(),
        };
        let agent = Arc::new(Agent::new(guest, Arc::new(Nobody)).unwrap());
        let (ours, theirs) = UnixStream::pair().unwrap();
        connection::spawn(&agent, theirs.into());
        ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut session = Self { socket: ours, decoder: Decoder::new(), assembler: Assembler::new(), next: 0 };
        session.send(HostBody::Open(Open { generation: 2, boot_id: BOOT_ID.to_vec(), kind: Some(kind) }));
        assert!(matches!(session.next(), GuestBody::Opened(_)));
        session
    }

    fn send(&mut self, body: HostBody) {
        let mut wire = Vec::new();
        encode_host(body, &mut wire).unwrap();
        self.socket.write_all(&wire).unwrap();
    }

    fn next(&mut self) -> GuestBody {
        let mut scratch = vec![0; 64 << 10];
        loop {
            if let Some(body) = self.decoder.next_body().unwrap()
                && let Some(message) = self.assembler.guest(body).unwrap()
            {
                return message;
            }
            let len = self.socket.read(&mut scratch).unwrap();
            assert!(len > 0, "the session ended");
            self.decoder.push(&scratch[..len]);
        }
    }

    fn ask(&mut self, operation: FileOperation) -> u32 {
        self.next += 1;
        self.send(HostBody::File(FileRequest { id: self.next, operation: Some(operation) }));
        self.next
    }

    fn call(&mut self, operation: FileOperation) -> FileOutcome {
        let id = self.ask(operation);
        match self.next() {
            GuestBody::File(reply) if reply.id == id => reply.outcome.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn done(&mut self, operation: FileOperation) {
        let outcome = self.call(operation);
        assert!(matches!(outcome, FileOutcome::Done(_)), "{outcome:?}");
    }

    fn errno(&mut self, operation: FileOperation) -> i32 {
        match self.call(operation) {
            FileOutcome::Failed(failure) => failure.errno,
            other => panic!("{other:?}"),
        }
    }

    fn handle(&mut self, operation: FileOperation) -> u32 {
        match self.call(operation) {
            FileOutcome::Handle(handle) => handle.handle,
            other => panic!("{other:?}"),
        }
    }

    fn stat(&mut self, path: &str, no_follow: bool) -> FileAttributes {
        match self.call(FileOperation::Stat(FilePath { path: path.into(), no_follow })) {
            FileOutcome::Attributes(attributes) => attributes,
            other => panic!("{path}: {other:?}"),
        }
    }

    fn path(&mut self, operation: FileOperation) -> String {
        match self.call(operation) {
            FileOutcome::Path(path) => String::from_utf8(path).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

/// A directory and its path as the session sees it.
fn place() -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let seen =
        if rustix::process::geteuid().is_root() { String::new() } else { directory.path().display().to_string() };
    (directory, seen)
}

fn file(path: &str) -> FilePath {
    FilePath { path: path.into(), no_follow: false }
}

fn create(path: &str) -> FileOperation {
    FileOperation::Open(FileOpen {
        path: path.into(),
        read: true,
        write: true,
        create: true,
        exclusive: true,
        mode: Some(0o640),
        ..FileOpen::default()
    })
}

#[test]
fn files_are_written_read_and_changed_at_offsets_with_requests_under_way() {
    let (directory, at) = place();
    let mut session = Session::open(directory.path());
    let path = format!("{at}/data");
    let handle = session.handle(create(&path));
    let blocks = 24u64;
    let block = |number: u64| vec![number as u8; FILE_DATA_MAX];
    // All at once and out of order: answers come in order of the requests.
    let mut asked = Vec::new();
    for number in (0..blocks).rev() {
        let write = FileWrite { handle, offset: number * FILE_DATA_MAX as u64, data: block(number) };
        asked.push(session.ask(FileOperation::Write(write)));
    }
    for id in asked {
        assert!(
            matches!(session.next(), GuestBody::File(reply) if reply.id == id && matches!(reply.outcome, Some(FileOutcome::Done(_))))
        );
    }
    for number in 0..blocks {
        let read = FileRead { handle, offset: number * FILE_DATA_MAX as u64, len: u32::MAX };
        assert!(session.call(FileOperation::Read(read)) == FileOutcome::Data(block(number)));
    }
    let end = FileRead { handle, offset: blocks * FILE_DATA_MAX as u64, len: 10 };
    assert_eq!(session.call(FileOperation::Read(end)), FileOutcome::Data(Vec::new()));
    assert_eq!(session.stat(&path, false).mode, 0o100_640);
    let change = FileChange {
        mode: Some(0o4711),
        size: Some(3),
        modified: Some(FileTime { seconds: 1_000_000_000, nanoseconds: 5 }),
        ..FileChange::default()
    };
    session.done(FileOperation::SetStatHandle(FileSetStatHandle { handle, change: Some(change) }));
    let attributes = session.stat(&path, false);
    assert_eq!((attributes.mode & 0o7777, attributes.size), (0o4711, 3));
    assert_eq!(attributes.modified, FileTime { seconds: 1_000_000_000, nanoseconds: 5 });
    session.done(FileOperation::Sync(FileHandle { handle }));
    session.done(FileOperation::Close(FileHandle { handle }));
    assert_eq!(session.errno(FileOperation::Read(end)), libc::EBADF);
    assert_eq!(session.errno(create(&path)), libc::EEXIST);
}

#[test]
fn directories_links_and_trees_do_what_their_system_calls_do() {
    let (directory, at) = place();
    let mut session = Session::open(directory.path());
    let make = |path: String, parents| {
        FileOperation::MakeDirectory(FileMakeDirectory { path: path.into(), mode: None, parents })
    };
    session.done(make(format!("{at}/a/b/c"), true));
    session.done(make(format!("{at}/a/b/c"), true));
    assert_eq!(session.errno(make(format!("{at}/a"), false)), libc::EEXIST);
    assert_eq!(session.errno(make(format!("{at}/x/y"), false)), libc::ENOENT);
    let link = |target: &str, path: String| FileLink { target: target.into(), path: path.into() };
    session.done(FileOperation::Symlink(link("b", format!("{at}/a/link"))));
    std::fs::write(directory.path().join("a/file\nwith line"), "x").unwrap();
    assert!(session.stat(&format!("{at}/a/link"), true).is_symlink());
    assert!(session.stat(&format!("{at}/a/link"), false).is_directory());
    assert_eq!(session.path(FileOperation::ReadLink(file(&format!("{at}/a/link")))), "b");
    assert_eq!(
        session.path(FileOperation::RealPath(file(&format!("{at}/a/link/./c/../new")))),
        format!("{at}/a/b/new")
    );
    let handle = session.handle(FileOperation::OpenDirectory(file(&format!("{at}/a"))));
    let mut names = Vec::new();
    loop {
        match session.call(FileOperation::ReadDirectory(FileHandle { handle })) {
            FileOutcome::Entries(batch) if batch.entries.is_empty() => break,
            FileOutcome::Entries(batch) => {
                names.extend(batch.entries.into_iter().map(|entry| String::from_utf8(entry.name).unwrap()))
            }
            other => panic!("{other:?}"),
        }
    }
    names.sort();
    assert_eq!(names, ["b", "file\nwith line", "link"]);
    let rename = |no_replace| {
        FileOperation::Rename(FileRename {
            from: format!("{at}/a/link").into(),
            to: format!("{at}/a/b/c").into(),
            no_replace,
        })
    };
    assert_eq!(session.errno(rename(true)), libc::EEXIST);
    assert_eq!(session.errno(rename(false)), libc::EISDIR);
    let remove = |path: &str, kind: FileRemoveKind| {
        FileOperation::Remove(FileRemove { path: format!("{at}/{path}").into(), kind: kind.into() })
    };
    assert_eq!(session.errno(remove("a", FileRemoveKind::Directory)), libc::ENOTEMPTY);
    assert_eq!(session.errno(remove("a", FileRemoveKind::File)), libc::EISDIR);
    // A link to a directory outside the tree goes, what it leads to stays.
    std::fs::create_dir(directory.path().join("keep")).unwrap();
    std::fs::write(directory.path().join("keep/me"), "x").unwrap();
    std::os::unix::fs::symlink("../../keep", directory.path().join("a/b/out")).unwrap();
    session.done(remove("a", FileRemoveKind::Tree));
    assert!(!directory.path().join("a").exists() && directory.path().join("keep/me").exists());
}

#[test]
fn what_is_hostile_gets_an_errno_and_no_way_out() {
    let (directory, at) = place();
    let mut session = Session::open(directory.path());
    let open = |path: &str| FileOperation::Open(FileOpen { path: path.into(), read: true, ..FileOpen::default() });
    if rustix::process::geteuid().is_root() {
        // The root of the session is the directory: neither dots nor a link lead out of it.
        std::os::unix::fs::symlink("/etc/passwd", directory.path().join("passwd")).unwrap();
        assert_eq!(session.errno(open("/passwd")), libc::ENOENT);
        assert_eq!(session.errno(open("../../../../../../etc/passwd")), libc::ENOENT);
    }
    assert_eq!(session.errno(open("a\0b")), libc::EINVAL);
    assert_eq!(session.errno(open(&"x/".repeat(3000))), libc::ENAMETOOLONG);
    rustix::fs::mkfifoat(rustix::fs::CWD, directory.path().join("fifo"), rustix::fs::Mode::from_raw_mode(0o600))
        .unwrap();
    let fifo = session.handle(open(&format!("{at}/fifo")));
    assert_eq!(
        session.call(FileOperation::Read(FileRead { handle: fifo, offset: 0, len: 4 })),
        FileOutcome::Data(Vec::new())
    );
    let nobody = FileChange { uid: Some(u32::MAX), ..FileChange::default() };
    let set = FileSetStat { path: format!("{at}/fifo").into(), no_follow: false, change: Some(nobody) };
    assert_eq!(session.errno(FileOperation::SetStat(set)), libc::EINVAL);
    for _ in 1..FILE_HANDLES_MAX {
        session.handle(open(&format!("{at}/fifo")));
    }
    assert_eq!(session.errno(open(&format!("{at}/fifo"))), libc::EMFILE);
    session.done(FileOperation::Close(FileHandle { handle: fifo }));
    session.handle(open(&format!("{at}/fifo")));
}

#[test]
fn a_watch_tells_what_happens_in_directories_that_are_made_later_too() {
    let (directory, at) = place();
    let mut session = Session::open(directory.path());
    let top = if at.is_empty() { "/".to_owned() } else { at.clone() };
    session.done(FileOperation::Watch(FileWatch { path: top.into(), recursive: true }));
    let mut seen = Vec::new();
    let mut until = |session: &mut Session, kind: FileChangeKind, path: String| loop {
        if seen.contains(&(kind as i32, path.clone().into_bytes())) {
            return;
        }
        if let GuestBody::File(FileReply { outcome: Some(FileOutcome::Changes(changes)), .. }) = session.next() {
            seen.extend(changes.changes.into_iter().map(|change| (change.kind, change.path)));
        }
    };
    std::fs::create_dir(directory.path().join("sub")).unwrap();
    until(&mut session, FileChangeKind::Created, format!("{at}/sub"));
    std::fs::write(directory.path().join("sub/file"), "x").unwrap();
    until(&mut session, FileChangeKind::Written, format!("{at}/sub/file"));
    std::fs::remove_file(directory.path().join("sub/file")).unwrap();
    until(&mut session, FileChangeKind::Removed, format!("{at}/sub/file"));
}

/// Where a directory is for the session.
fn inside(root: &Path, name: &str) -> Vec<u8> {
    let path = if rustix::process::geteuid().is_root() { Path::new("/").join(name) } else { root.join(name) };
    path.into_os_string().into_encoded_bytes()
}

fn packing(root: &Path, name: &str) -> Session {
    let pack = ArchivePack { path: inside(root, name), name: b"x".to_vec(), follow: false };
    let open = OpenArchive { user: String::new(), action: Some(ArchiveAction::Pack(pack)) };
    Session::open_kind(root, OpenKind::Archive(open))
}

fn unpacking(root: &Path, directory: &str, name: Option<&str>) -> Session {
    let name = name.map(|name| name.as_bytes().to_vec());
    let unpack = ArchiveUnpack { directory: inside(root, directory), name, keep_owner: false };
    let open = OpenArchive { user: String::new(), action: Some(ArchiveAction::Unpack(unpack)) };
    Session::open_kind(root, OpenKind::Archive(open))
}

/// What a packing session sends: the stream, its warnings, and its end.
fn received(session: &mut Session) -> (Vec<u8>, String, GuestBody) {
    let (mut stream, mut warnings) = (Vec::new(), Vec::new());
    loop {
        match session.next() {
            GuestBody::Output(output) if output.stream == OutputStream::Stdout as i32 => stream.extend(output.data),
            GuestBody::Output(output) => warnings.extend(output.data),
            end => return (stream, String::from_utf8(warnings).unwrap(), end),
        }
    }
}

#[test]
fn a_tree_is_sent_and_made_again_within_credit() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path();
    std::fs::create_dir_all(root.join("tree/deep")).unwrap();
    std::fs::create_dir(root.join("to")).unwrap();
    let content: Vec<u8> = (0..3_000_000u32).map(|at| (at >> 7) as u8).collect();
    std::fs::write(root.join("tree/deep/file"), &content).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, root.join("tree/pipe"), rustix::fs::Mode::RUSR).unwrap();
    let (stream, warnings, end) = received(&mut packing(root, "tree"));
    assert!(matches!(end, GuestBody::Exited(_)), "{end:?}");
    assert_eq!(warnings, "left out 'x/pipe': it is a pipe\n");

    let mut session = unpacking(root, "to", Some("x"));
    let mut credit = msb_protocol::guest::STDIN_WINDOW as usize;
    let mut rest = stream.as_slice();
    let heard = |session: &mut Session, credit: &mut usize| match session.next() {
        GuestBody::StdinCredit(more) => *credit += more.bytes as usize,
        other => panic!("{other:?}"),
    };
    while !rest.is_empty() {
        while credit == 0 {
            heard(&mut session, &mut credit);
        }
        let (now, later) = rest.split_at(credit.min(rest.len()).min(60_000));
        session.send(HostBody::Stdin(msb_protocol::guest::Data { data: now.to_vec() }));
        (rest, credit) = (later, credit - now.len());
    }
    session.send(HostBody::StdinEof(msb_protocol::guest::StdinEof {}));
    let end = loop {
        match session.next() {
            GuestBody::StdinCredit(_) => {}
            end => break end,
        }
    };
    assert!(matches!(end, GuestBody::Exited(_)), "{end:?}");
    assert_eq!(std::fs::read(root.join("to/x/deep/file")).unwrap(), content);
    assert_eq!(std::fs::read_dir(root.join("to")).unwrap().count(), 1);
}

#[test]
fn what_goes_wrong_with_a_tree_is_told_with_its_code() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path();
    std::fs::create_dir(root.join("to")).unwrap();
    let code = |session: &mut Session| match received(session).2 {
        GuestBody::Refused(failure) => failure.code,
        other => panic!("{other:?}"),
    };
    assert_eq!(code(&mut packing(root, "nothing")), "path_not_found");
    assert_eq!(code(&mut unpacking(root, "nothing", None)), "path_not_found");
    let mut session = unpacking(root, "to", None);
    session.send(HostBody::Stdin(msb_protocol::guest::Data { data: vec![1; 600] }));
    assert_eq!(code(&mut session), "invalid_archive");
    // More than the credit, and a message that does not belong here.
    let mut session = unpacking(root, "to", None);
    session.send(HostBody::Stdin(msb_protocol::guest::Data { data: vec![0; 300_000] }));
    assert_eq!(code(&mut session), "exec_lost");
    let mut session = unpacking(root, "to", None);
    session.send(HostBody::GoodbyeAck(msb_protocol::guest::GoodbyeAck {}));
    assert_eq!(code(&mut session), "exec_lost");
    // A host that goes away in the middle of a file: nothing is left.
    let mut session = unpacking(root, "to", Some("x"));
    let mut header = vec![0; 512];
    header[..100].copy_from_slice(&{
        let mut name = [0; 100];
        name[0] = b'x';
        name
    });
    header[100..107].copy_from_slice(b"0000644");
    header[108..115].copy_from_slice(b"0000000");
    header[116..123].copy_from_slice(b"0000000");
    header[124..135].copy_from_slice(b"00001000000");
    header[136..147].copy_from_slice(b"00000000000");
    header[156] = b'0';
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum::<u32>() + 8 * 32;
    header[148..154].copy_from_slice(format!("{sum:06o}").as_bytes());
    header[155] = b' ';
    header.resize(40_000, 7);
    session.send(HostBody::Stdin(msb_protocol::guest::Data { data: header }));
    let names = || std::fs::read_dir(root.join("to")).unwrap().count();
    let begun = std::time::Instant::now();
    while names() == 0 {
        assert!(begun.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(session);
    while names() > 0 {
        assert!(begun.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }
}
