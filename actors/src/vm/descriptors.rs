//! Descriptors over a Unix socket (SCM_RIGHTS, unix(7)): to a VM process the listeners of published ports and the files of a snapshot, from
//! it the listeners again and what is left of its machine; to a client the stream to its agent. Called by `vm::process` and `vm::driver`, and by the service's
//! API, which hands streams over.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use msb_protocol::network::PORTS_COUNT_MAX;
use msb_protocol::vmm::LAUNCH_DESCRIPTORS_MAX;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;

/// Sends bytes, and descriptors with the first of them if there are any.
///
/// # Errors
/// As sendmsg(2).
pub async fn send(link: &mut UnixStream, bytes: &[u8], descriptors: &[Arc<OwnedFd>]) -> io::Result<()> {
    if descriptors.is_empty() {
        return link.write_all(bytes).await;
    }
    let (first, rest) = bytes.split_at(bytes.len().min(1));
    send_first(link, first, descriptors).await?;
    link.write_all(rest).await
}

async fn send_first(link: &UnixStream, bytes: &[u8], descriptors: &[Arc<OwnedFd>]) -> io::Result<()> {
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(|descriptor| descriptor.as_fd()).collect();
    link.async_io(Interest::WRITABLE, || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(LAUNCH_DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(io::Error::other("too many descriptors for one message"));
        }
        let sent = sendmsg(link, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    })
    .await
}

/// Receives bytes into `buffer`, and the descriptors that come with them; 0 is the end of the link.
///
/// # Errors
/// As recvmsg(2).
pub(super) async fn receive(link: &UnixStream, buffer: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
    link.async_io(Interest::READABLE, || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PORTS_COUNT_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(link, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(came) = message {
                descriptors.extend(came);
            }
        }
        Ok(received.bytes)
    })
    .await
}
