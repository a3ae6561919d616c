//! The inactive half of the network card: its address, its offer of features, and the stack that outlives resets.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use msb_network::policy::explain::{Explanation, Question};
use msb_network::stack::frame::{DropReason, ETHERNET_HEADER_LEN};
use msb_network::stack::system::{Listener, SystemHost};
use msb_network::stack::{Counters, Stack, StackConfig};
use msb_protocol::network::{PortTransport, VmNetwork};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_queue::Queue;

use super::worker::NetWorker;
use crate::devices::virtio::counter::Counter;
use crate::devices::virtio::device::{
    ActivateError, Activation, DeviceType, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, FEATURE_VERSION_1, VirtioDevice,
    copy_config,
};
use crate::devices::virtio::event_loop::{LoopHandle, WorkerId};
use crate::run::realtime_ns;

/// Entries of the receive and transmit rings. Linux puts pages into the receive ring: a frame of 64 KiB takes up to 44 of them.
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Takes each line of the decision log.
pub(super) type DecisionSink = Arc<dyn Fn(String) + Send + Sync>;

/// How the device is set up.
pub struct NetOptions {
    /// The network as the daemon gave it.
    pub network: VmNetwork,
    /// Listeners of its published ports, in their order.
    pub listeners: Vec<OwnedFd>,
    /// Takes each line of the decision log; must not wait.
    pub on_decision: DecisionSink,
}

/// What outlives activations.
pub(super) struct Shared {
    stack: Mutex<Stack<SystemHost>>,
    started: Instant,
    started_ns: u64,
    pub(super) on_decision: DecisionSink,
    /// Frames for which the guest's buffers were too small.
    pub(super) unfit: Counter,
}

impl Shared {
    /// The stack, for one turn of its worker or one question.
    pub(super) fn stack(&self) -> MutexGuard<'_, Stack<SystemHost>> {
        self.stack.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stack's time.
    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Wall time at which the stack's time was 0, in nanoseconds since 1970.
    pub(super) fn started_ns(&self) -> u64 {
        self.started_ns
    }
}

/// A way to ask the network from other threads.
#[derive(Clone)]
pub struct NetHandle(Arc<Shared>);

impl NetHandle {
    /// What was counted so far, and how many connections and flows through published ports are open.
    pub fn counters(&self) -> (Counters, u64) {
        let stack = self.0.stack();
        let mut counters = stack.counters().clone();
        let unfit = self.0.unfit.get();
        if unfit > 0 {
            *counters.dropped.entry(DropReason::GuestSlow).or_default() += unfit;
        }
        (counters, stack.inbound_open() as u64)
    }

    /// What policy would say about a target.
    pub fn explain(&self, question: &Question) -> Explanation {
        self.0.stack().explain(self.0.now(), question)
    }
}

/// The network card.
pub struct Net {
    mac: [u8; 6],
    frame_bytes_max: usize,
    features: u64,
    shared: Arc<Shared>,
    event_loop: LoopHandle,
    worker: Option<WorkerId>,
}

impl Net {
    /// The card, to be served on `event_loop`, which carries nothing else.
    ///
    /// # Errors
    /// Listeners that do not fit the published ports, or what epoll says of them.
    pub fn new(options: NetOptions, event_loop: LoopHandle) -> io::Result<Self> {
        let NetOptions { network, listeners, on_decision } = options;
        let ports = &network.spec.ports;
        if listeners.len() != ports.len() {
            let message = format!("{} listeners came for {} published ports", listeners.len(), ports.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let listeners = ports.iter().zip(listeners).map(|(port, listener)| match port.transport {
            PortTransport::Tcp => Listener::Tcp(listener.into()),
            PortTransport::Udp => Listener::Udp(listener.into()),
        });
        let host = SystemHost::new(listeners.collect())?;
        let mut seed = [0u8; 8];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
        let link = network.addresses;
        let stack = Stack::new(StackConfig { network, seed: u64::from_ne_bytes(seed), checksums: true }, host);
        Ok(Self {
            mac: link.guest_mac.0,
            frame_bytes_max: usize::from(link.mtu_bytes) + ETHERNET_HEADER_LEN,
            features: 0,
            shared: Arc::new(Shared {
                stack: Mutex::new(stack),
                started: Instant::now(),
                started_ns: realtime_ns(),
                on_decision,
                unfit: Counter::default(),
            }),
            event_loop,
            worker: None,
        })
    }

    /// A way to ask it from other threads.
    pub fn handle(&self) -> NetHandle {
        NetHandle(Arc::clone(&self.shared))
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn name(&self) -> &str {
        "net"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn device_features(&self) -> u64 {
        FEATURE_VERSION_1
            | FEATURE_EVENT_IDX
            | FEATURE_INDIRECT_DESC
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_GUEST_CSUM
            | 1 << VIRTIO_NET_F_MRG_RXBUF
    }

    fn acknowledge_features(&mut self, features: u64) {
        self.features = features;
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.mac, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let given = activation.queues.len();
        if given < QUEUE_SIZES.len() {
            return Err(ActivateError::MissingQueues { needed: QUEUE_SIZES.len(), given });
        }
        let has = |feature: u32| activation.features & (1 << feature) != 0;
        self.shared.stack().set_checksums(!has(VIRTIO_NET_F_GUEST_CSUM));
        let mergeable = has(VIRTIO_NET_F_MRG_RXBUF);
        let worker = NetWorker::new(Arc::clone(&self.shared), activation, mergeable, self.frame_bytes_max)?;
        self.worker = Some(self.event_loop.attach(Box::new(worker))?);
        Ok(())
    }

    fn worker(&self) -> Option<(&LoopHandle, WorkerId)> {
        Some((&self.event_loop, self.worker?))
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let Some(worker) = self.worker.take() else { return Vec::new() };
        match self.event_loop.detach(worker) {
            Ok(worker) => worker.into_queues(),
            Err(error) => {
                tracing::error!(%error, "network worker could not be stopped");
                Vec::new()
            }
        }
    }
}
