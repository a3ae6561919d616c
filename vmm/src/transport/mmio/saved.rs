//! A device's registers and rings as they are written down when a machine is saved, and put back into another one.
//!
//! What is put back may come out of a file that somebody else made: it is checked as the words of a driver are, and refused in words.
//! Called by `engine/kvm/bus`, on machines that stand.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};

use super::registers::status;
use super::{CAUSES, MmioTransport};
use crate::devices::virtio::device::{FEATURE_VERSION_1, Interrupt};

/// Most rings of one device.
const QUEUES_MAX: usize = 16;

/// One ring: where it lies, how far both sides are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedQueue {
    /// Its number in the device.
    pub index: u16,
    /// The largest size it could have had.
    pub max_size: u16,
    /// Its size.
    pub size: u16,
    /// The next chain to be taken.
    pub next_avail: u16,
    /// The next place for a used chain.
    pub next_used: u16,
    /// Whether event indices are in use.
    pub event_idx: bool,
    /// Guest address of the descriptors.
    pub desc_table: u64,
    /// Guest address of the available ring.
    pub avail_ring: u64,
    /// Guest address of the used ring.
    pub used_ring: u64,
}

impl SavedQueue {
    /// Ring `index` as a worker has it; the last `given_back` chains count as not taken.
    pub fn of(index: u16, queue: &Queue, given_back: u16) -> Self {
        let QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            desc_table,
            avail_ring,
            used_ring,
            ..
        } = queue.state();
        let next_avail = next_avail.wrapping_sub(given_back);
        Self {
            index,
            max_size,
            size,
            next_avail,
            next_used,
            event_idx: event_idx_enabled,
            desc_table,
            avail_ring,
            used_ring,
        }
    }

    fn queue(&self) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: true,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        })
    }
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedTransport {
    /// Its virtio device id.
    pub device_type: u32,
    /// Its name, for messages.
    pub name: String,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    interrupt_causes: u32,
    config_generation: u32,
    queues: Vec<SavedQueue>,
}

impl MmioTransport {
    /// Writes the device down; `queues` are its worker's rings, none if it is not active.
    ///
    /// # Errors
    /// In words: the driver is in the middle of setting it up.
    pub fn save(&self, queues: Vec<SavedQueue>) -> Result<SavedTransport, String> {
        if !self.active && self.status & status::FEATURES_OK != 0 {
            return Err(format!("device {} is being set up", self.name()));
        }
        Ok(SavedTransport {
            device_type: self.device.device_type() as u32,
            name: self.name().to_owned(),
            status: self.status,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            interrupt_causes: self.interrupt.status(),
            config_generation: self.interrupt.config_generation(),
            queues,
        })
    }

    /// Puts registers and rings back into a fresh device and starts it. Guest memory must be what it was.
    ///
    /// # Errors
    /// In words: another device, or nothing that a driver could have brought about.
    pub fn restore(&mut self, saved: SavedTransport) -> Result<(), String> {
        let name = self.name().to_owned();
        let wrong = |what: &str| Err(format!("the saved device {} {what}", saved.name));
        if saved.device_type != self.device.device_type() as u32 || self.active {
            return wrong(&format!("is not what stands in its place ({name})"));
        }
        let runs = saved.status & status::DRIVER_OK != 0;
        if saved.status & !status::DRIVER_BITS != 0
            || saved.interrupt_causes & !CAUSES != 0
            || (saved.status & status::FEATURES_OK != 0) != runs
            || saved.queues.len() > QUEUES_MAX
        {
            return wrong("has a state that no driver brings about");
        }
        if runs
            && (saved.driver_features & !self.device.device_features() != 0
                || saved.driver_features & FEATURE_VERSION_1 == 0)
        {
            return wrong("uses features that are not on offer here");
        }
        let sizes = self.device.queue_sizes().to_vec();
        for ring in &saved.queues {
            let place = self.queues.get_mut(usize::from(ring.index));
            let (Some(place), Ok(queue)) = (place, ring.queue()) else { return wrong("has rings that cannot be") };
            if !runs
                || sizes.get(usize::from(ring.index)) != Some(&ring.max_size)
                || !queue.is_valid(self.memory.as_ref())
            {
                return wrong("has rings that lie nowhere");
            }
            *place = queue;
        }
        self.device_features_select = saved.device_features_select;
        self.driver_features_select = saved.driver_features_select;
        self.driver_features = saved.driver_features;
        self.queue_select = saved.queue_select;
        self.status = saved.status;
        if !runs {
            return Ok(());
        }
        self.device.acknowledge_features(saved.driver_features);
        self.interrupt.restore(saved.interrupt_causes, saved.config_generation);
        self.activate();
        if !self.active {
            return wrong("did not start again");
        }
        // An interrupt may have been on its way when the machine was saved. One too many costs a look.
        self.interrupt.signal_queue(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::devices::virtio::event_loop::LoopHandle;
    use crate::devices::virtio::notifier::Notifier;
    use crate::devices::virtio::rng::Rng;
    use crate::testing::guest_memory;

    fn transport() -> MmioTransport {
        let event_loop = LoopHandle::start("test-saved").expect("a loop");
        MmioTransport::new(Box::new(Rng::new(event_loop)), guest_memory(1), Notifier::new().expect("eventfd"))
            .expect("a transport")
    }

    fn saved() -> SavedTransport {
        SavedTransport {
            device_type: 4,
            name: "rng".into(),
            status: 0xf,
            device_features_select: 0,
            driver_features_select: 1,
            driver_features: FEATURE_VERSION_1,
            queue_select: 0,
            interrupt_causes: 0,
            config_generation: 3,
            queues: vec![SavedQueue {
                index: 0,
                max_size: 64,
                size: 16,
                next_avail: 7,
                next_used: 7,
                event_idx: false,
                desc_table: 0x1000,
                avail_ring: 0x2000,
                used_ring: 0x3000,
            }],
        }
    }

    #[test]
    fn a_device_that_is_put_back_is_what_was_saved() {
        let mut fresh = transport();
        // What the ring says of itself must agree with its position: seven chains were made available and used.
        let memory = Arc::clone(&fresh.memory);
        vm_memory::Bytes::write_obj(&*memory, 7u16, vm_memory::GuestAddress(0x2002)).expect("index");
        fresh.restore(saved()).expect("restored");
        assert!(fresh.is_active());
        let worker = fresh.device.worker().expect("a worker");
        let frozen = worker.0.freeze(vec![worker.1]).expect("frozen");
        let queues = frozen.positions().remove(0).expect("positions");
        let again = fresh.save(queues).expect("saved");
        assert_eq!((&again.queues, again.status, again.config_generation), (&saved().queues, 0xf, 3));
        drop(frozen);
        fresh.reset();
        assert_eq!(fresh.save(Vec::new()).expect("saved").status, 0);
    }

    #[test]
    fn what_no_driver_brings_about_is_refused() {
        let change: [fn(&mut SavedTransport); 9] = [
            |saved| saved.device_type = 1,
            |saved| saved.status = 0x1ff,
            |saved| saved.status = 0x4,
            |saved| saved.driver_features |= 1 << 40,
            |saved| saved.driver_features = 0,
            |saved| saved.queues[0].index = 1,
            |saved| saved.queues[0].size = 3,
            |saved| saved.queues[0].desc_table = 0xffff_ffff_f000,
            |saved| saved.queues[0].max_size = 1024,
        ];
        for (number, change) in change.iter().enumerate() {
            let mut damaged = saved();
            change(&mut damaged);
            assert!(transport().restore(damaged).is_err(), "change {number}");
        }
        assert!(serde_json::from_str::<SavedTransport>("{}").is_err());
    }
}
