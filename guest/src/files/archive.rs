//! An archive session: a tree of the guest goes out as a tar stream, or comes in as one, in a thread that is the session's user already.
//! The tree itself is `msb_tree`'s business; here is the stream: output in frames, input within credit. Called by `run_archive`, by tests and
//! by the fuzzer.
//!
//! It waits for the host with nothing but a poll. A host that goes away ends it, and what was unfinished is taken away.

use std::ffi::CString;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;

use msb_protocol::error::ErrorCode;
use msb_protocol::files::{ArchiveAction, ArchivePack, ArchiveUnpack};
use msb_protocol::frame::DATA_LEN_MAX;
use msb_protocol::guest::{Exited, GuestBody, HostBody, OutputStream, Pong, StdinCredit};
use msb_tree::{Owner, PackOptions, Summary, TreeError, UnpackOptions};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use crate::failure::GuestError;
use crate::session::input::Credit;
use crate::session::stream::{FrameStream, PIECE_LEN};

/// Packs or unpacks as the calling thread's user, and tells the end.
pub fn serve(stream: &mut FrameStream, action: &ArchiveAction) {
    let mut warnings = Vec::new();
    let mut wire = Wire { stream, credit: Credit::default(), input: Vec::new(), read: 0, input_ended: false };
    // What was queued before, the opening, does not wait for the first piece.
    if wire.drain().is_err() {
        return;
    }
    let outcome = match action {
        ArchiveAction::Pack(pack) => pack_tree(&mut wire, pack, &mut warnings),
        ArchiveAction::Unpack(unpack) => unpack_tree(&mut wire, unpack, &mut warnings),
    };
    for warning in warnings {
        wire.warn(&warning);
    }
    wire.stream.send(match outcome {
        Ok(_) => GuestBody::Exited(Exited::default()),
        Err(error) => GuestBody::Refused(error.into_failure("")),
    });
    // What a host that went away does not read is nobody's.
    let _ = wire.drain();
}

fn pack_tree(wire: &mut Wire<'_>, pack: &ArchivePack, warnings: &mut Vec<String>) -> Result<Summary, GuestError> {
    let path = absolute(&pack.path)?;
    let options = PackOptions { path: &path, name: &pack.name, follow: pack.follow };
    msb_tree::pack(options, wire, &mut |warning| warnings.push(warning)).map_err(failed)
}

fn unpack_tree(wire: &mut Wire<'_>, unpack: &ArchiveUnpack, warnings: &mut Vec<String>) -> Result<Summary, GuestError> {
    let path = absolute(&unpack.directory)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat2(CWD, path.as_c_str(), flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS);
    let directory = directory.map_err(|errno| {
        failed(TreeError::File { what: "open the directory", path: msb_tree::shown(&unpack.directory), errno })
    })?;
    let owner = if unpack.keep_owner { Owner::Stream } else { Owner::Caller };
    let options = UnpackOptions { name: unpack.name.as_deref(), owner };
    msb_tree::unpack(directory.as_fd(), options, wire, &mut |warning| warnings.push(warning)).map_err(failed)
}

/// Relative paths begin at the root.
fn absolute(path: &[u8]) -> Result<CString, GuestError> {
    let path = if path.starts_with(b"/") { path.to_vec() } else { [b"/", path].concat() };
    CString::new(path).map_err(|_| GuestError::new(ErrorCode::InvalidConfig, "a path has a zero byte"))
}

fn failed(error: TreeError) -> GuestError {
    GuestError { code: error.code(), message: error.to_string(), errno: error.errno().unwrap_or(0) }
}

/// The stream as blocking bytes.
struct Wire<'a> {
    stream: &'a mut FrameStream,
    credit: Credit,
    /// The piece of input that is being read, and how much of it was.
    input: Vec<u8>,
    read: usize,
    input_ended: bool,
}

impl Wire<'_> {
    fn warn(&mut self, text: &str) {
        let line = format!("{text}\n");
        self.stream.send_output(OutputStream::Stderr, &line.as_bytes()[..line.len().min(DATA_LEN_MAX)]);
    }

    /// Writes all that waits.
    fn drain(&mut self) -> io::Result<()> {
        self.write_until(|stream| stream.backlog() == 0)
    }

    fn write_until(&mut self, enough: impl Fn(&FrameStream) -> bool) -> io::Result<()> {
        loop {
            self.stream.flush().map_err(io::Error::other)?;
            if enough(self.stream) {
                return Ok(());
            }
            let mut fds = [PollFd::from_borrowed_fd(self.stream.socket(), PollFlags::OUT)];
            // Interrupted or not, it is looked at again; a peer that is gone is an error of the next write.
            let _ = poll(&mut fds, None);
        }
    }

    /// Waits for the next piece of input. False at its end.
    fn refill(&mut self) -> io::Result<bool> {
        let consumed = self.input.len();
        self.input = Vec::new();
        self.read = 0;
        self.credit.consume(consumed);
        loop {
            match self.stream.next_message().map_err(io::Error::other)? {
                Some(HostBody::Stdin(data)) if !self.input_ended => {
                    self.credit.take(data.data.len()).map_err(io::Error::other)?;
                    if !data.data.is_empty() {
                        self.input = data.data;
                        self.give_credit(false)?;
                        return Ok(true);
                    }
                }
                Some(HostBody::StdinEof(_)) => {
                    self.input_ended = true;
                    return Ok(false);
                }
                Some(HostBody::Ping(ping)) => {
                    self.stream.send(GuestBody::Pong(Pong { token: ping.token }));
                    self.drain()?;
                }
                // A copy has no process that could get them.
                Some(HostBody::Signal(_) | HostBody::Resize(_)) => {}
                Some(_) => return Err(io::ErrorKind::InvalidData.into()),
                None => {
                    self.give_credit(true)?;
                    let mut fds = [PollFd::from_borrowed_fd(self.stream.socket(), PollFlags::IN)];
                    let _ = poll(&mut fds, None);
                    self.stream.receive().map_err(io::Error::other)?;
                }
            }
        }
    }

    fn give_credit(&mut self, idle: bool) -> io::Result<()> {
        let bytes = self.credit.grant(idle);
        if bytes > 0 {
            self.stream.send(GuestBody::StdinCredit(StdinCredit { bytes }));
            self.drain()?;
        }
        Ok(())
    }
}

impl Read for &mut Wire<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.read == self.input.len() && (self.input_ended || !self.refill()?) {
            return Ok(0);
        }
        let rest = &self.input[self.read..];
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        self.read += len;
        Ok(len)
    }
}

impl Write for &mut Wire<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let data = &data[..data.len().min(PIECE_LEN)];
        self.stream.send_output(OutputStream::Stdout, data);
        self.write_until(FrameStream::has_room)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.drain()
    }
}
