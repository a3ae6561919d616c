//! The active half: takes requests from the rings and puts replies back. File contents never pass through a buffer of ours.

use std::os::fd::AsFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::io::Errno;
use virtio_queue::Queue;

use super::attributes;
use super::server::{Answer, DATA_BYTES_MAX, Server, WRITE_KILLS_SET_ID};
use super::wire::{self, Header, IN_HEADER_BYTES, OUT_HEADER_BYTES, Reader, WRITE_IN_BYTES, Writer};
use crate::devices::virtio::device::{ActiveQueue, DeviceMemory, Interrupt};
use crate::devices::virtio::event_loop::Worker;
use crate::devices::virtio::ring::{Chain, Ring};
use crate::devices::virtio::slices::SliceList;
use crate::memory::transfer;

/// Pieces of memory per request: the pages of the largest one, header and arguments, with room for pieces over two regions.
const PIECES_MAX: usize = DATA_BYTES_MAX as usize / 4096 + 16;
/// Bytes of a request's arguments at most: an extended attribute's value with its name, or a long list of forgotten files.
const ARGUMENTS_BYTES_MAX: usize = 128 << 10;

type Slices<'memory> = SliceList<'memory, PIECES_MAX>;

/// Serves the rings: the first carries what must not wait (forgotten files), the second everything else.
pub(super) struct FsWorker {
    memory: DeviceMemory,
    rings: Vec<Ring>,
    server: Server,
}

impl FsWorker {
    pub(super) fn new(
        queues: Vec<ActiveQueue>,
        memory: DeviceMemory,
        interrupt: &Arc<dyn Interrupt>,
        server: Server,
    ) -> Self {
        let ring = |queue| Ring::new(queue, Arc::clone(&memory), Arc::clone(interrupt));
        Self { rings: queues.into_iter().map(ring).collect(), memory, server }
    }

    /// Serves at most one ring's worth, then yields.
    fn serve(&mut self, index: usize) {
        let Some(ring) = self.rings.get_mut(index) else { return };
        ring.suppress_kicks();
        let mut budget = ring.size();
        loop {
            while budget > 0 {
                let Some(chain) = ring.pop() else { break };
                budget -= 1;
                let head = chain.head_index();
                let length = handle(&mut self.server, &self.memory, chain);
                ring.push_used(head, length);
                // One at a time waits for its reply more often than not: the guest need not wait for a batch.
                ring.signal();
            }
            if budget == 0 {
                let _ = ring.kick().notify();
                break;
            }
            if !ring.request_kicks() {
                break;
            }
            ring.suppress_kicks();
            budget -= 1;
        }
        ring.signal();
    }
}

/// Carries one request out; gives the bytes that were written into the chain.
fn handle(server: &mut Server, memory: &DeviceMemory, chain: Chain) -> u32 {
    let (mut request, mut reply) = (Slices::new(), Slices::new());
    for descriptor in chain {
        let list = if descriptor.is_write_only() { &mut reply } else { &mut request };
        if list.push_descriptor(memory, &descriptor).is_err() {
            return 0;
        }
    }
    let mut header = [0; IN_HEADER_BYTES];
    if !request.read_front(&mut header) {
        return 0;
    }
    let header = Header::parse(&header);
    let answer = match header.opcode {
        wire::READ => match read(server, &mut request, &reply) {
            // The contents are in place: the header comes before them.
            Ok(len) => {
                reply.write_front(&wire::out_header(header.unique, len, 0));
                return u32::try_from(OUT_HEADER_BYTES + len).unwrap_or(0);
            }
            Err(errno) => Err(errno),
        },
        wire::WRITE => write(server, &mut request).map(Answer::Reply),
        _ => {
            let mut arguments = vec![0; request.len().min(ARGUMENTS_BYTES_MAX)];
            request.read_front(&mut arguments);
            server.answer(&header, &arguments, reply.len().saturating_sub(OUT_HEADER_BYTES))
        }
    };
    let (payload, error) = match answer {
        Ok(Answer::Silence) => return 0,
        Ok(Answer::Reply(payload)) => (payload, 0),
        Err(errno) => (Vec::new(), errno.raw_os_error()),
    };
    if reply.len() < OUT_HEADER_BYTES + payload.len() {
        return 0;
    }
    reply.write_front(&wire::out_header(header.unique, payload.len(), error));
    reply.write_front(&payload);
    u32::try_from(OUT_HEADER_BYTES + payload.len()).unwrap_or(0)
}

/// Reads a file's contents into the reply, behind the place of its header.
fn read(server: &Server, request: &mut Slices<'_>, reply: &Slices<'_>) -> Result<usize, Errno> {
    let mut arguments = [0; 24];
    if !request.read_front(&mut arguments) || reply.len() < OUT_HEADER_BYTES {
        return Err(Errno::INVAL);
    }
    let mut reader = Reader(&arguments);
    let (handle, offset, size) = (reader.u64()?, reader.u64()?, reader.u32()?);
    let file = &server.handle(handle)?.file;
    let mut room = reply.clone();
    room.advance(OUT_HEADER_BYTES);
    room.truncate(size.min(DATA_BYTES_MAX) as usize);
    let mut done = 0;
    while !room.is_empty() {
        let at = offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
        match transfer::read_at(file.as_fd(), room.as_slices(), at) {
            Ok(0) => break,
            Ok(count) => {
                room.advance(count);
                done += count;
            }
            Err(_) if done > 0 => break,
            Err(error) => return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
        }
    }
    Ok(done)
}

/// Writes the request's data to a file.
fn write(server: &mut Server, request: &mut Slices<'_>) -> Result<Vec<u8>, Errno> {
    let mut arguments = [0; WRITE_IN_BYTES];
    if !request.read_front(&mut arguments) {
        return Err(Errno::INVAL);
    }
    let mut reader = Reader(&arguments);
    let (handle, offset, size, flags) = (reader.u64()?, reader.u64()?, reader.u32()?, reader.u32()?);
    let (share, number) = (server.handle(handle)?.share, handle);
    if server.is_read_only(share) {
        return Err(Errno::ROFS);
    }
    request.truncate(size.min(DATA_BYTES_MAX) as usize);
    let before = server.room_to_write(number, offset, request.len() as u64)?;
    let handle = server.handle(number)?;
    let mut done = 0;
    while !request.is_empty() {
        let at = offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
        match transfer::write_at(handle.file.as_fd(), request.as_slices(), at) {
            Ok(0) => break,
            Ok(count) => {
                request.advance(count);
                done += count;
            }
            Err(_) if done > 0 => break,
            Err(error) => return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
        }
    }
    if flags & WRITE_KILLS_SET_ID != 0 {
        attributes::strip_set_id(handle.file.as_fd(), &server.owner);
    }
    if let Some(before) = before {
        server.wrote(number, before)?;
    }
    let mut out = Vec::with_capacity(8);
    out.put_u32(u32::try_from(done).unwrap_or(0));
    out.put_u32(0);
    Ok(out)
}

impl MutEventSubscriber for FsWorker {
    fn init(&mut self, operations: &mut EventOps) {
        for (index, ring) in self.rings.iter().enumerate() {
            let number = u32::try_from(index).unwrap_or(u32::MAX);
            if let Err(error) = operations.add(Events::with_data(ring.kick(), number, EventSet::IN)) {
                tracing::error!(%error, "shared file system cannot watch its rings");
            }
        }
        for index in 0..self.rings.len() {
            self.serve(index);
        }
    }

    fn process(&mut self, events: Events, _operations: &mut EventOps) {
        let index = events.data() as usize;
        if let Some(ring) = self.rings.get(index) {
            ring.kick().drain();
            self.serve(index);
        }
    }
}

impl Worker for FsWorker {
    fn into_queues(self: Box<Self>) -> Vec<Queue> {
        self.rings.into_iter().map(Ring::into_queue).collect()
    }
}
