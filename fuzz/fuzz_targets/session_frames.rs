//! Any bytes as what a host sends on a session stream of the agent: frames, parts, credit, input in any order and size. The session is
//! the agent's own code for an archive, on a socket pair: it ends by itself, keeps to its memory, answers in whole messages, and the
//! last of them is its end.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use msb_guest::files::serve_archive;
use msb_guest::session::stream::FrameStream;
use msb_protocol::files::{ArchiveAction, ArchivePack, ArchiveUnpack};
use msb_protocol::frame::Decoder;
use msb_protocol::guest::{Assembler, GuestBody, STDIN_WINDOW};

/// One tree for all inputs that pack.
fn tree() -> &'static tempfile::TempDir {
    static TREE: OnceLock<tempfile::TempDir> = OnceLock::new();
    TREE.get_or_init(|| {
        let tree = tempfile::tempdir().expect("a tree");
        std::fs::write(tree.path().join("file"), [7; 3000]).expect("a file");
        tree
    })
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, data)) = data.split_first() else { return };
    let home = tempfile::tempdir().expect("home");
    let action = if choice % 4 == 0 {
        let path = tree().path().as_os_str().as_encoded_bytes().to_vec();
        ArchiveAction::Pack(ArchivePack { path, name: b"x".to_vec(), follow: false })
    } else {
        ArchiveAction::Unpack(ArchiveUnpack {
            directory: home.path().as_os_str().as_encoded_bytes().to_vec(),
            name: (choice % 4 == 1).then(|| b"a".to_vec()),
            keep_owner: choice % 4 == 2,
        })
    };
    let (ours, mut host) = UnixStream::pair().expect("a socket pair");
    // An input is shorter than what a socket keeps, so one thread is enough.
    host.write_all(data).expect("room for the input");
    host.shutdown(Shutdown::Write).expect("an end");
    host.set_read_timeout(Some(Duration::from_secs(5))).expect("a limit");
    let mut stream = FrameStream::new(ours.into()).expect("a stream");
    serve_archive(&mut stream, &action);
    drop(stream);
    let mut answer = Vec::new();
    // What the agent did not read is told as a reset, after all that it wrote.
    let _ = host.read_to_end(&mut answer);
    let (mut decoder, mut assembler) = (Decoder::new(), Assembler::new());
    decoder.push(&answer);
    let (mut ended, mut credit) = (false, u64::from(STDIN_WINDOW));
    while let Ok(Some(body)) = decoder.next_body() {
        match assembler.guest(body).expect("the agent's own message") {
            Some(GuestBody::Exited(_) | GuestBody::Refused(_)) => ended = true,
            Some(GuestBody::StdinCredit(more)) => {
                assert!(!ended);
                credit += u64::from(more.bytes);
            }
            _ => assert!(!ended, "nothing follows the end"),
        }
    }
    assert!(credit <= u64::from(STDIN_WINDOW) + data.len() as u64, "credit for what never came");
});
