//! One connection of a daemon: frames in, frames out, both bounded.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use msb_protocol::frame::{Decoder, FrameError, SPEC_LEN_MAX, decode_json, encode_json};
use msb_protocol::id::BootId;
use msb_protocol::network::PORTS_COUNT_MAX;
use msb_protocol::vmm::{Event, LAUNCH_DESCRIPTORS_MAX, Message, Request, RequestFrame, Sample, SampleEncoder, VmSpec};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

/// Bytes that may wait for a daemon that does not read; more than any sequence of answers needs.
const OUTGOING_BYTES_MAX: usize = 4 << 20;
/// Most descriptors that wait for the request they came with, beyond a launch.
const DESCRIPTORS_MAX: usize = 4;
/// Bytes per read.
const READ_BYTES: usize = 16 * 1024;
/// Reads in a row from one connection before others get their turn.
const READS_MAX: usize = 64;

/// A daemon's connection.
pub struct Connection {
    stream: UnixStream,
    decoder: Decoder,
    outgoing: Vec<u8>,
    /// Descriptors that go with the next bytes.
    outgoing_descriptors: Vec<OwnedFd>,
    /// Descriptors that came.
    descriptors: Vec<OwnedFd>,
    /// Whether something has arrived that was not read, or may have.
    pub(super) is_ready: bool,
    /// Whether events go here too; newer ones take over.
    pub(super) wants_events: bool,
    /// Whether the machine stands because it was asked to be written down here.
    pub(super) has_saved: bool,
    samples: Option<Subscription>,
}

/// The samples that a connection asked for.
#[derive(Debug)]
struct Subscription {
    /// Time between two.
    interval: Duration,
    /// When the next is due.
    due: Instant,
    /// Writes their compact form, if that is what was asked for.
    compact: Option<SampleEncoder>,
}

impl Connection {
    /// Takes a connected socket.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            decoder: Decoder::with_limit(SPEC_LEN_MAX),
            outgoing: Vec::new(),
            outgoing_descriptors: Vec::new(),
            descriptors: Vec::new(),
            is_ready: true,
            wants_events: false,
            has_saved: false,
            samples: None,
        })
    }

    /// The descriptors that came with the launch, or with the request that was just taken.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.descriptors)
    }

    /// The last of the descriptors that came with the launch.
    pub fn take_last_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop()
    }

    /// Sends duplicates of `descriptors` along with the next bytes (SCM_RIGHTS, unix(7)).
    pub(super) fn attach(&mut self, descriptors: &[OwnedFd]) {
        for descriptor in descriptors {
            match descriptor.try_clone() {
                Ok(copy) => self.outgoing_descriptors.push(copy),
                Err(error) => tracing::error!(%error, "a descriptor cannot be given to the daemon"),
            }
        }
    }

    /// Reads bytes and the descriptors that come with them.
    fn receive_bytes(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(LAUNCH_DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&self.stream, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        Ok(received.bytes)
    }

    /// Begins samples at this interval, the first at once, or ends them.
    pub(super) fn subscribe(&mut self, interval: Option<Duration>, is_compact: bool, now: Instant) {
        let compact = is_compact.then(SampleEncoder::default);
        self.samples = interval.map(|interval| Subscription { interval, due: now, compact });
    }

    /// When the next sample is due.
    pub(super) fn next_sample(&self) -> Option<Instant> {
        self.samples.as_ref().map(|samples| samples.due)
    }

    /// Whether a sample is due by now; if so, the next one is an interval later.
    pub(super) fn take_due_sample(&mut self, now: Instant) -> bool {
        let Some(samples) = self.samples.as_mut().filter(|samples| samples.due <= now) else { return false };
        // A process that was stopped meanwhile does not catch up.
        samples.due = (samples.due + samples.interval).max(now);
        true
    }

    /// As [`Self::send`], a sample in the form that was asked for.
    pub(super) fn send_sample(&mut self, boot_id: BootId, sample: &Sample) -> bool {
        let compact = self.samples.as_mut().and_then(|samples| samples.compact.as_mut());
        let Some(encoder) = compact else {
            return self.send(&Message::Event { event: Event::Sampled { boot_id, sample: Box::new(sample.clone()) } });
        };
        let encoded = encoder.encode(boot_id, sample, &mut self.outgoing);
        self.queued(encoded)
    }

    /// Reads what has arrived; false once the peer is gone.
    pub(super) fn receive(&mut self) -> bool {
        let mut buffer = [0u8; READ_BYTES];
        for _ in 0..READS_MAX {
            match self.receive_bytes(&mut buffer) {
                Ok(0) => return false,
                // No request takes so many: a peer that sends more means nothing by them.
                Ok(_) if self.descriptors.len() > DESCRIPTORS_MAX => return false,
                Ok(count) => self.decoder.push(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// The next request that has arrived whole.
    ///
    /// # Errors
    /// The peer does not speak this protocol; nothing more can be read from it.
    pub(super) fn next_request(&mut self) -> Result<Option<RequestFrame>, FrameError> {
        match self.decoder.next_body()? {
            Some(body) => decode_json(body).map(Some),
            None => Ok(None),
        }
    }

    /// Queues a message and sends what the socket takes; false if the peer is gone or has stopped reading.
    pub fn send(&mut self, message: &Message) -> bool {
        let encoded = encode_json(message, &mut self.outgoing);
        self.queued(encoded)
    }

    /// Sends what the socket takes of what was just appended; nothing was if it could not be encoded.
    fn queued(&mut self, encoded: Result<(), FrameError>) -> bool {
        if let Err(error) = encoded {
            // Only a reply of ours can be too long, and none is.
            tracing::error!(%error, "message to the daemon could not be encoded");
            return true;
        }
        self.outgoing.len() <= OUTGOING_BYTES_MAX && self.flush()
    }

    /// Sends what the socket takes; false if the peer is gone.
    pub(super) fn flush(&mut self) -> bool {
        while !self.outgoing.is_empty() {
            match self.write_outgoing() {
                Ok(0) => return false,
                Ok(count) => {
                    self.outgoing.drain(..count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }

    fn write_outgoing(&mut self) -> io::Result<usize> {
        if self.outgoing_descriptors.is_empty() {
            return self.stream.write(&self.outgoing);
        }
        let borrowed: Vec<BorrowedFd<'_>> = self.outgoing_descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PORTS_COUNT_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(io::Error::other("too many descriptors for one message"));
        }
        let sent = sendmsg(&self.stream, &[IoSlice::new(&self.outgoing)], &mut control, SendFlags::NOSIGNAL)?;
        self.outgoing_descriptors.clear();
        Ok(sent)
    }

    /// Whether something waits to be sent.
    pub(super) fn has_outgoing(&self) -> bool {
        !self.outgoing.is_empty()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// What begins the first connection.
pub enum First {
    /// Boot this.
    Launch(Box<VmSpec>),
    /// Stand by with this; the launch follows when somebody takes it.
    StandBy(Box<VmSpec>),
    /// Begin what every machine needs; another of these follows.
    MakeVm,
}

/// Waits for the request that begins the first connection; gives its id too.
///
/// # Errors
/// The daemon is gone, too slow, or says something else.
pub fn receive_first(connection: &mut Connection, timeout: Duration) -> io::Result<(u64, First)> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(frame) = connection.next_request().map_err(io::Error::other)? {
            return match frame.request {
                Request::Launch { spec } => {
                    connection.wants_events = true;
                    Ok((frame.id, First::Launch(spec)))
                }
                Request::StandBy(spec) => Ok((frame.id, First::StandBy(spec))),
                Request::MakeVm => Ok((frame.id, First::MakeVm)),
                _ => Err(io::Error::other("the first request is not a launch")),
            };
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        connection.stream.set_nonblocking(false)?;
        connection.stream.set_read_timeout(Some(left))?;
        let mut buffer = [0u8; READ_BYTES];
        let read = connection.receive_bytes(&mut buffer);
        connection.stream.set_nonblocking(true)?;
        match read {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => connection.decoder.push(&buffer[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_due_at_their_interval_and_never_caught_up() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let mut connection = Connection::new(ours).expect("a connection");
        let (begin, second) = (Instant::now(), Duration::from_secs(1));
        assert!(!connection.take_due_sample(begin) && connection.next_sample().is_none());
        connection.subscribe(Some(second), true, begin);
        assert!(connection.take_due_sample(begin), "the first at once");
        assert!(!connection.take_due_sample(begin + second / 2));
        assert_eq!(connection.next_sample(), Some(begin + second));
        assert!(connection.take_due_sample(begin + 10 * second), "late");
        assert_eq!(connection.next_sample(), Some(begin + 10 * second));
        connection.subscribe(None, false, begin);
        assert!(!connection.take_due_sample(begin + 60 * second));
    }
}
