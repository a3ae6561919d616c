//! The back end's answers: what QEMU set up so far, and starting and stopping the device when it is complete.
//!
//! Messages arrive in the order of QEMU's `vhost_dev_start`: features, memory table, then per ring size, base, addresses, call and kick,
//! then enabling. The device is started when all rings it needs are there, and stopped as a whole as soon as one of them is.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::interrupt::CallLines;
use crate::devices::virtio::device::{
    Activation, ActiveQueue, DeviceMemory, DeviceType, FEATURE_EVENT_IDX, Interrupt, VirtioDevice,
};
use crate::devices::virtio::notifier::Notifier;

/// Longest configuration space QEMU may ask for (VHOST_USER_MAX_CONFIG_SIZE).
const CONFIG_BYTES_MAX: u32 = 256;

/// QEMU's virtio-mmio offers every guest rings of this size, whatever the device would like.
const RING_SIZE_MAX: u16 = 1024;

/// One memory region: where QEMU has it, where the guest has it.
struct Mapping {
    user_address: u64,
    guest_address: u64,
    size: u64,
}

/// One ring as set up so far.
struct Vring {
    queue: Queue,
    addressed: bool,
    enabled: bool,
    kick: Option<Notifier>,
}

impl Vring {
    fn is_ready(&self) -> bool {
        self.addressed && self.enabled && self.kick.is_some()
    }
}

/// A device and what QEMU said about it.
pub(super) struct Handler {
    device: Box<dyn VirtioDevice>,
    features: u64,
    memory: Option<DeviceMemory>,
    mappings: Vec<Mapping>,
    vrings: Vec<Vring>,
    calls: Arc<CallLines>,
    active: bool,
}

/// What is not part of our protocol features and therefore never asked for by a correct front end.
fn not_offered<T>() -> Result<T> {
    Err(Error::InvalidOperation("not offered by this back end"))
}

impl Handler {
    pub(super) fn new(device: Box<dyn VirtioDevice>) -> std::result::Result<Self, virtio_queue::Error> {
        let vrings = device
            .queue_sizes()
            .iter()
            .map(|size| {
                let queue = Queue::new(RING_SIZE_MAX.max(*size))?;
                Ok(Vring { queue, addressed: false, enabled: false, kick: None })
            })
            .collect::<std::result::Result<Vec<_>, virtio_queue::Error>>()?;
        let calls = Arc::new(CallLines::new(vrings.len()));
        Ok(Self { device, features: 0, memory: None, mappings: Vec::new(), vrings, calls, active: false })
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    /// Starts the device if everything it needs is there.
    fn start_if_ready(&mut self) {
        let needed = self.device.queues_needed();
        let (false, Some(memory)) = (self.active, &self.memory) else { return };
        if !self.vrings.iter().take(needed).all(Vring::is_ready) {
            return;
        }
        let mut queues = Vec::new();
        for (index, vring) in self.vrings.iter_mut().enumerate().take_while(|(_, vring)| vring.is_ready()) {
            let Some(Ok(kick)) = vring.kick.as_ref().map(Notifier::try_clone) else { return };
            let queue = &mut vring.queue;
            queue.set_event_idx(self.features & FEATURE_EVENT_IDX != 0);
            queue.set_ready(true);
            if !queue.is_valid(&**memory) {
                tracing::warn!(device = self.device.name(), ring = index, "guest set up a ring outside of its memory");
                return;
            }
            let state = queue.state();
            let Ok(queue) = Queue::try_from(state) else { return };
            queues.push(ActiveQueue { index: u16::try_from(index).expect("few rings"), queue, kick });
        }
        let interrupt: Arc<dyn Interrupt> = Arc::<CallLines>::clone(&self.calls);
        let activation = Activation { memory: Arc::clone(memory), features: self.features, queues, interrupt };
        match self.device.activate(activation) {
            Ok(()) => self.active = true,
            Err(error) => tracing::error!(device = self.device.name(), %error, "device could not be started"),
        }
    }

    /// Stops the device and takes the rings' positions over.
    pub(super) fn stop(&mut self) {
        if !self.active {
            return;
        }
        self.active = false;
        for (vring, queue) in self.vrings.iter_mut().zip(self.device.deactivate()) {
            vring.queue.set_next_avail(queue.next_avail());
            vring.queue.set_next_used(queue.next_used());
        }
    }

    fn to_guest_address(&self, user_address: u64) -> Result<GuestAddress> {
        self.mappings
            .iter()
            .find_map(|mapping| {
                let offset = user_address.checked_sub(mapping.user_address)?;
                (offset < mapping.size).then(|| GuestAddress(mapping.guest_address + offset))
            })
            .ok_or(Error::InvalidParam)
    }
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop();
        for vring in &mut self.vrings {
            vring.queue.reset();
            vring.addressed = false;
            vring.enabled = false;
            vring.kick = None;
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.device_features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        // QEMU also passes on bits that its own half of the device offered to the guest (RING_RESET, NOTIFY_ON_EMPTY): not ours.
        self.features = features & self.device.device_features();
        if !self.active {
            self.device.acknowledge_features(self.features);
        }
        if features & protocol == 0 || self.device.device_type() == DeviceType::Net {
            // Without protocol features there is no enabling: rings are born enabled (vhost-user, "Ring states"). QEMU enables those of
            // a network device before it has agreed on any features, which is dropped, and not again before they are to work.
            self.vrings.iter_mut().for_each(|vring| vring.enabled = true);
            self.start_if_ready();
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        // New memory under a running device would leave it with the old one.
        self.stop();
        let mut mapped = Vec::new();
        let mut mappings = Vec::new();
        for (region, file) in regions.iter().zip(files) {
            let host = region.mmap_region(file)?;
            let guest = GuestRegionMmap::new(host, GuestAddress(region.guest_phys_addr)).ok_or(Error::InvalidParam)?;
            mapped.push(guest);
            mappings.push(Mapping {
                user_address: region.user_addr,
                guest_address: region.guest_phys_addr,
                size: region.memory_size,
            });
        }
        let memory =
            GuestMemoryMmap::from_regions(mapped).map_err(|error| Error::ReqHandlerError(io::Error::other(error)))?;
        self.memory = Some(Arc::new(memory));
        self.mappings = mappings;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        let vring = self.vring(index)?;
        let size = u16::try_from(size).map_err(|_| Error::InvalidParam)?;
        vring.queue.try_set_size(size).map_err(|_| Error::InvalidParam)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let descriptors = self.to_guest_address(descriptors)?;
        let used = self.to_guest_address(used)?;
        let available = self.to_guest_address(available)?;
        let memory = self.memory.clone().ok_or(Error::InvalidParam)?;
        let vring = self.vring(index)?;
        let invalid = |_| Error::InvalidParam;
        vring.queue.try_set_desc_table_address(descriptors).map_err(invalid)?;
        vring.queue.try_set_used_ring_address(used).map_err(invalid)?;
        vring.queue.try_set_avail_ring_address(available).map_err(invalid)?;
        // The used index is only in the ring: it is where the driver expects us to go on.
        let used_index = vring.queue.used_idx(&*memory, Ordering::Acquire).map_err(invalid)?;
        vring.queue.set_next_used(used_index.0);
        vring.addressed = true;
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base & 0xffff).expect("masked");
        self.vring(index)?.queue.set_next_avail(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.stop();
        let vring = self.vring(index)?;
        vring.kick = None;
        vring.addressed = false;
        let base = u32::from(vring.queue.next_avail());
        self.calls.set(index as usize, None);
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.vring(u32::from(index))?.kick = file.map(Notifier::from);
        self.start_if_ready();
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.vring(u32::from(index))?;
        self.calls.set(usize::from(index), file.map(Notifier::from));
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _file: Option<File>) -> Result<()> {
        // A broken ring is logged here; QEMU could do nothing but log it too.
        self.vring(u32::from(index)).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let features = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        // QEMU complains about a configuration space it has no use for.
        Ok(match self.device.device_type() {
            DeviceType::Rng | DeviceType::Net => features,
            _ => features | VhostUserProtocolFeatures::CONFIG,
        })
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.enabled = enable;
        if enable {
            self.start_if_ready();
        } else {
            self.stop();
        }
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        if size > CONFIG_BYTES_MAX {
            return Err(Error::InvalidParam);
        }
        let mut config = vec![0; size as usize];
        self.device.read_config(u64::from(offset), &mut config);
        Ok(config)
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.device.write_config(u64::from(offset), bytes);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> Result<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        not_offered()
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        not_offered()
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        not_offered()
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        not_offered()
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        not_offered()
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        not_offered()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        not_offered()
    }

    fn check_device_state(&mut self) -> Result<()> {
        not_offered()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        not_offered()
    }
}
