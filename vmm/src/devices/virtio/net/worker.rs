//! The active half of the network card: turns of the stack, one for each thing that happened.
//!
//! A turn takes at most one ring's worth of the guest's frames, then lets the stack do what it can, then says when it wants the next
//! turn: at once (by an eventfd of its own, so that others on the loop are not starved), at a time, or when the guest makes room.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use msb_network::stack::FrameSink;
use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;
use virtio_queue::Queue;

use super::device::Shared;
use super::receive::{Receive, read_frame};
use crate::devices::virtio::device::{Activation, DeviceMemory};
use crate::devices::virtio::event_loop::Worker;
use crate::devices::virtio::notifier::Notifier;
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::timer::Timer;
use crate::transport::mmio::saved::SavedQueue;

const RECEIVE_KICK: u32 = 0;
const TRANSMIT_KICK: u32 = 1;
const HOST: u32 = 2;
const TIMER: u32 = 3;
const AGAIN: u32 = 4;

/// Serves both rings.
pub(super) struct NetWorker {
    shared: Arc<Shared>,
    memory: DeviceMemory,
    receive: Receive,
    transmit: Ring,
    frame_bytes_max: usize,
    /// The frame of the guest that is being looked at.
    frame: Vec<u8>,
    /// The stack's epoll descriptor: readable when any of its sockets is ready.
    host: OwnedFd,
    timer: Timer,
    again: Notifier,
}

impl NetWorker {
    pub(super) fn new(
        shared: Arc<Shared>,
        activation: Activation,
        mergeable: bool,
        frame_bytes_max: usize,
    ) -> io::Result<Self> {
        let Activation { memory, features, queues, interrupt } = activation;
        let mut rings = queues.into_iter().map(|queue| Ring::new(queue, Arc::clone(&memory), Arc::clone(&interrupt)));
        let (Some(receive), Some(transmit)) = (rings.next(), rings.next()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let checksums_trusted = features & (1 << VIRTIO_NET_F_GUEST_CSUM) != 0;
        let host = shared.stack().host().as_fd().try_clone_to_owned()?;
        Ok(Self {
            receive: Receive::new(receive, Arc::clone(&memory), mergeable, checksums_trusted, frame_bytes_max),
            transmit,
            memory,
            frame_bytes_max,
            frame: Vec::new(),
            host,
            timer: Timer::new()?,
            again: Notifier::new()?,
            shared,
        })
    }

    /// One turn.
    fn turn(&mut self) {
        let shared = Arc::clone(&self.shared);
        let mut stack = shared.stack();
        let now = shared.now();
        self.receive.ring().suppress_kicks();
        self.transmit.suppress_kicks();
        let mut budget = self.transmit.size();
        let mut more = false;
        loop {
            if budget == 0 {
                more = true;
                break;
            }
            budget -= 1;
            if let Some(chain) = self.transmit.pop() {
                let head = chain.head_index();
                if read_frame(chain, &self.memory, self.frame_bytes_max, &mut self.frame) {
                    stack.ingress(now, &self.frame, &mut self.receive);
                }
                self.transmit.push_used(head, 0);
            } else if !self.transmit.request_kicks() {
                break;
            }
        }
        stack.poll(now, &mut self.receive);
        while let Some(record) = stack.take_record() {
            (shared.on_decision)(record.line(shared.started_ns()));
        }
        // A guest whose buffers are all taken and still too small will not make more room.
        if stack.wants_room() && !self.receive.has_room() && self.receive.may_take() {
            more |= self.receive.ring().request_kicks();
        }
        match stack.deadline() {
            Some(at) if at <= now => more = true,
            Some(at) => self.timer.arm(at - now),
            None => {}
        }
        drop(stack);
        shared.unfit.add(std::mem::take(&mut self.receive.unfit));
        if more {
            let _ = self.again.notify();
        }
        self.transmit.signal();
        self.receive.ring().signal();
    }
}

impl MutEventSubscriber for NetWorker {
    fn init(&mut self, operations: &mut EventOps) {
        let events = [
            Events::with_data(self.receive.ring().kick(), RECEIVE_KICK, EventSet::IN),
            Events::with_data(self.transmit.kick(), TRANSMIT_KICK, EventSet::IN),
            Events::with_data(&self.host.as_raw_fd(), HOST, EventSet::IN),
            Events::with_data(&self.timer, TIMER, EventSet::IN),
            Events::with_data(&self.again, AGAIN, EventSet::IN),
        ];
        for event in events {
            if let Err(error) = operations.add(event) {
                tracing::error!(%error, "network card cannot watch its events");
            }
        }
        // Frames may have been made available before the kick was watched.
        self.turn();
    }

    fn process(&mut self, events: Events, _operations: &mut EventOps) {
        match events.data() {
            RECEIVE_KICK => drop(self.receive.ring().kick().drain()),
            TRANSMIT_KICK => drop(self.transmit.kick().drain()),
            TIMER => drop(self.timer.drain()),
            AGAIN => drop(self.again.drain()),
            // The stack empties it.
            _ => {}
        }
        self.turn();
    }
}

impl Worker for NetWorker {
    fn positions(&self) -> Result<Vec<SavedQueue>, String> {
        Ok(vec![self.receive.position(), self.transmit.position(0)])
    }

    fn into_queues(self: Box<Self>) -> Vec<Queue> {
        let Self { receive, transmit, .. } = *self;
        vec![receive.into_queue(), transmit.into_queue()]
    }
}
