//! The service of a host with several users: a front door that runs as root and hands each connection to the service of its user.
//!
//! ```text
//!  msb (uid 1000) ─┐                                       ┌─► msbd as 1000, home /var/lib/msb/users/1000 ─► its VM processes
//!                  ├─► /run/msb/msbd.sock ─► front (root) ─┤     (door.sock, SCM_RIGHTS)
//!  msb (uid 1001) ─┘     0660, group msb                   └─► msbd as 1001, home /var/lib/msb/users/1001 ─► its VM processes
//! ```
//!
//! What a user asks for is done by a process of that user: files are opened with its rights, VM processes run as it, and nobody else's
//! sandboxes exist for it. The front door reads no request, opens no file of a user and holds no state; it may be restarted at any time. It
//! keeps the users' services (`keeper`): one that dies or hangs is replaced, as systemd does with the door itself. Where systemd runs, it also
//! makes a scope for each VM process (`scopes`), which only root can. A connection is handed over as it is, so that its other end is still the client, whose death an attached sandbox waits for.

pub mod behind;
pub mod front;
mod keeper;
mod scopes;

use std::io::{Error, ErrorKind, IoSlice, IoSliceMut, Result};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

/// The socket of a user's service on which only the front door (root) may hand connections over, beside its control socket.
pub const DOOR_SOCKET: &str = "door.sock";

/// What the front door says to a user's service, one byte each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    /// A connection comes with it.
    Connection,
    /// End; sandboxes go on.
    End,
    /// Say with one byte that all is well.
    Alive,
    /// Stop every sandbox with a flush, say so with one byte, and end.
    StopSandboxes,
}

impl Word {
    fn byte(self) -> u8 {
        match self {
            Self::Connection => b'c',
            Self::End => b'e',
            Self::Alive => b'a',
            Self::StopSandboxes => b's',
        }
    }
}

/// Sends a word, with a connection if there is one to hand over.
pub(crate) fn say(door: &UnixStream, word: Word, connection: Option<&UnixStream>) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = connection.iter().map(|connection| connection.as_fd()).collect();
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Error::other("no room for a descriptor"));
    }
    let sent = rustix::net::sendmsg(door, &[IoSlice::new(&[word.byte()])], &mut ancillary, SendFlags::NOSIGNAL)?;
    if sent == 1 { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
}

/// Receives a word; `None` when the front door has closed.
pub(crate) fn hear(door: &UnixStream) -> Result<Option<(Word, Option<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8];
    let read = rustix::net::recvmsg(door, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    if read.bytes == 0 {
        return Ok(None);
    }
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let word = match byte[0] {
        b'c' => Word::Connection,
        b'e' => Word::End,
        b'a' => Word::Alive,
        b's' => Word::StopSandboxes,
        _ => return Err(ErrorKind::InvalidData.into()),
    };
    Ok(Some((word, descriptor)))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_connection_arrives_as_it_is() {
        let (front, behind) = UnixStream::pair().unwrap();
        let (mut client, served) = UnixStream::pair().unwrap();
        say(&front, Word::Connection, Some(&served)).unwrap();
        say(&front, Word::End, None).unwrap();
        drop((front, served));
        let Some((Word::Connection, Some(handed))) = hear(&behind).unwrap() else { panic!() };
        client.write_all(b"hello").unwrap();
        let mut text = [0; 5];
        UnixStream::from(handed).read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");
        let Some((Word::End, None)) = hear(&behind).unwrap() else { panic!() };
        assert!(hear(&behind).unwrap().is_none());
    }

    #[test]
    fn what_is_no_word_is_refused() {
        let (mut front, behind) = UnixStream::pair().unwrap();
        front.write_all(b"x").unwrap();
        assert!(hear(&behind).is_err());
    }
}
