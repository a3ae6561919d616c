//! The inactive half of the vsock device: its CID, its listener, the ports a guest may reach, and starting and stopping the muxer.

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use virtio_queue::Queue;

use super::muxer::{Muxer, PortTable};
use crate::devices::virtio::counter::Counter;
use crate::devices::virtio::device::{
    ActivateError, Activation, DeviceType, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, FEATURE_VERSION_1, VirtioDevice,
    copy_config,
};
use crate::devices::virtio::event_loop::{LoopHandle, WorkerId};

/// Entries of the receive, transmit and event rings. Linux fills the receive ring with buffers of 4 KiB before it goes on, and each is a page
/// that the host has to find: 128 of them cost a boot some 10 ms less than 256 (exact lab), and bulk into the guest is as fast.
const QUEUE_SIZES: [u16; 3] = [128, 256, 64];
/// Receive and transmit; the event ring may stay with the transport (QEMU keeps it).
const QUEUES_NEEDED: usize = 2;

/// What the device counts.
#[derive(Debug, Default)]
pub struct VsockCounters {
    /// Bytes from the guest to host programs.
    pub guest_to_host_bytes: Counter,
    /// Bytes from host programs to the guest.
    pub host_to_guest_bytes: Counter,
    /// Streams that were opened, by either side.
    pub streams_opened: Counter,
    /// Packets that were dropped as malformed or misaddressed.
    pub packets_dropped: Counter,
}

/// A host port that the guest may connect to, once: `stream` is what it then talks to.
pub struct GuestPort {
    /// The vsock port.
    pub port: u32,
    /// Our end of the prepared stream.
    pub stream: UnixStream,
}

/// How the device is set up.
pub struct VsockOptions {
    /// The guest's CID.
    pub guest_cid: u64,
    /// Where host programs connect (`CONNECT <port>\n`).
    pub listener: UnixListener,
    /// What the guest may reach.
    pub guest_ports: Vec<GuestPort>,
    /// Whether the driver has streams of another machine, which this one was made of.
    pub has_strangers: bool,
    /// Called when the device is stopped, before its streams are closed: their ends then say nothing about the programs behind them.
    pub on_stop: Option<Arc<dyn Fn() + Send + Sync>>,
}

/// The vsock device.
pub struct Vsock {
    guest_cid: u64,
    listener: Arc<UnixListener>,
    ports: Arc<Mutex<PortTable>>,
    counters: Arc<VsockCounters>,
    on_stop: Option<Arc<dyn Fn() + Send + Sync>>,
    has_strangers: bool,
    event_loop: LoopHandle,
    worker: Option<WorkerId>,
}

impl Vsock {
    /// The device, to be served on `event_loop`.
    pub fn new(options: VsockOptions, event_loop: LoopHandle) -> std::io::Result<Self> {
        options.listener.set_nonblocking(true)?;
        for port in &options.guest_ports {
            port.stream.set_nonblocking(true)?;
        }
        let ports = options.guest_ports.into_iter().map(|port| (port.port, port.stream)).collect();
        Ok(Self {
            guest_cid: options.guest_cid,
            listener: Arc::new(options.listener),
            ports: Arc::new(Mutex::new(ports)),
            counters: Arc::default(),
            on_stop: options.on_stop,
            has_strangers: options.has_strangers,
            event_loop,
            worker: None,
        })
    }

    /// The device's counters, which outlive activations.
    pub fn counters(&self) -> Arc<VsockCounters> {
        Arc::clone(&self.counters)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn name(&self) -> &str {
        "vsock"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queues_needed(&self) -> usize {
        QUEUES_NEEDED
    }

    fn device_features(&self) -> u64 {
        FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC
    }

    fn acknowledge_features(&mut self, _features: u64) {
        // Nothing here depends on them: event-idx is set on the queues by the transport.
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let given = activation.queues.len();
        if given < QUEUES_NEEDED {
            return Err(ActivateError::MissingQueues { needed: QUEUES_NEEDED, given });
        }
        let muxer = Muxer::new(
            activation,
            self.guest_cid,
            Arc::clone(&self.listener),
            Arc::clone(&self.ports),
            Arc::clone(&self.counters),
            std::mem::take(&mut self.has_strangers),
        );
        self.worker = Some(self.event_loop.attach(Box::new(muxer))?);
        Ok(())
    }

    fn worker(&self) -> Option<(&LoopHandle, WorkerId)> {
        Some((&self.event_loop, self.worker?))
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let Some(worker) = self.worker.take() else { return Vec::new() };
        if let Some(on_stop) = &self.on_stop {
            on_stop();
        }
        match self.event_loop.detach(worker) {
            Ok(worker) => worker.into_queues(),
            Err(error) => {
                tracing::error!(%error, "vsock worker could not be stopped");
                Vec::new()
            }
        }
    }
}
