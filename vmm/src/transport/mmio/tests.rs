//! Drives a device through its registers as a driver would, and as an enemy would.

use std::sync::Mutex;

use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::registers::status;
use super::*;
use crate::devices::virtio::device::{ActivateError, DeviceType, Interrupt, copy_config};

const OFFERED: u64 = FEATURE_VERSION_1 | FEATURE_EVENT_IDX | 0b101;

/// What happened to the device, seen from outside.
#[derive(Default)]
struct Seen {
    features: u64,
    active_queues: Vec<(u16, u16)>,
    activations: u32,
    deactivations: u32,
    interrupt: Option<Arc<dyn Interrupt>>,
    written: Vec<(u64, Vec<u8>)>,
}

struct Fake {
    seen: Arc<Mutex<Seen>>,
    refuse: bool,
    active: bool,
}

impl VirtioDevice for Fake {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }
    fn name(&self) -> &str {
        "fake"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn device_features(&self) -> u64 {
        OFFERED
    }
    fn acknowledge_features(&mut self, features: u64) {
        assert!(!self.active);
        self.seen.lock().unwrap().features = features;
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(b"configuration", offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut seen = self.seen.lock().unwrap();
        if seen.written.len() < 8 {
            seen.written.push((offset, data.to_vec()));
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert!(!self.active, "activated twice");
        let mut seen = self.seen.lock().unwrap();
        if self.refuse {
            return Err(ActivateError::MissingQueues { needed: 2, given: 0 });
        }
        for queue in &activation.queues {
            assert!(queue.queue.is_valid(activation.memory.as_ref()), "only valid rings get here");
        }
        seen.active_queues = activation.queues.iter().map(|queue| (queue.index, queue.queue.size())).collect();
        seen.interrupt = Some(activation.interrupt);
        seen.activations += 1;
        self.active = true;
        Ok(())
    }
    fn deactivate(&mut self) -> Vec<Queue> {
        assert!(self.active, "deactivated while inactive");
        self.active = false;
        self.seen.lock().unwrap().deactivations += 1;
        Vec::new()
    }
}

struct Rig {
    transport: MmioTransport,
    seen: Arc<Mutex<Seen>>,
    line: Notifier,
}

impl Rig {
    fn new(refuse: bool) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let device = Box::new(Fake { seen: Arc::clone(&seen), refuse, active: false });
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let line = Notifier::new().unwrap();
        let transport = MmioTransport::new(device, memory, line.try_clone().unwrap()).unwrap();
        Self { transport, seen, line }
    }

    fn read(&self, register: Register) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register as u64, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, register: Register, value: u32) {
        self.transport.write(register as u64, &value.to_le_bytes());
    }

    fn add_status(&mut self, bits: u32) -> u32 {
        self.write(Register::Status, self.read(Register::Status) | bits);
        self.read(Register::Status)
    }

    fn negotiate(&mut self, features: u64) -> u32 {
        self.add_status(1);
        self.add_status(status::DRIVER);
        for half in 0..2 {
            self.write(Register::DriverFeaturesSelect, half);
            self.write(Register::DriverFeatures, (features >> (32 * half)) as u32);
        }
        self.add_status(status::FEATURES_OK)
    }

    fn set_up_ring(&mut self, index: u32, size: u32, base: u32) {
        self.write(Register::QueueSelect, index);
        self.write(Register::QueueNum, size);
        self.write(Register::QueueDescriptorLow, base);
        self.write(Register::QueueDriverLow, base + 0x2000);
        self.write(Register::QueueDeviceLow, base + 0x3000);
        self.write(Register::QueueReady, 1);
    }
}

#[test]
fn a_driver_finds_negotiates_runs_and_resets_the_device() {
    let mut rig = Rig::new(false);
    assert_eq!((rig.read(Register::MagicValue), rig.read(Register::Version)), (MAGIC, 2));
    assert_eq!(rig.read(Register::DeviceId), 4);
    rig.write(Register::DeviceFeaturesSelect, 1);
    assert_eq!(rig.read(Register::DeviceFeatures), 1, "VERSION_1 is bit 32");
    assert_eq!(rig.negotiate(FEATURE_VERSION_1 | 0b100) & status::FEATURES_OK, status::FEATURES_OK);
    assert_eq!(rig.seen.lock().unwrap().features, FEATURE_VERSION_1 | 0b100);
    rig.write(Register::QueueSelect, 1);
    assert_eq!(rig.read(Register::QueueNumMax), 64);
    rig.set_up_ring(0, 128, 0x1_0000);
    rig.set_up_ring(1, 64, 0x2_0000);
    assert_eq!(rig.read(Register::QueueReady), 1);
    assert_eq!(rig.add_status(status::DRIVER_OK), 15);
    assert!(rig.transport.is_active());
    assert_eq!(rig.seen.lock().unwrap().active_queues, [(0, 128), (1, 64)]);

    let interrupt = rig.seen.lock().unwrap().interrupt.clone().unwrap();
    interrupt.signal_queue(0);
    assert!(rig.line.drain());
    assert_eq!(rig.read(Register::InterruptStatus), 1);
    let generation = rig.read(Register::ConfigGeneration);
    interrupt.signal_config();
    assert_ne!(rig.read(Register::ConfigGeneration), generation);
    assert_eq!(rig.read(Register::InterruptStatus), 3);
    rig.write(Register::InterruptAcknowledge, 1);
    assert_eq!(rig.read(Register::InterruptStatus), 2);

    rig.write(Register::QueueNotify, 1);
    assert!(rig.transport.kicks()[1].drain() && !rig.transport.kicks()[0].drain());

    rig.write(Register::Status, 0);
    assert_eq!((rig.read(Register::Status), rig.read(Register::InterruptStatus)), (0, 0));
    assert!(!rig.transport.is_active());
    assert_eq!(rig.negotiate(FEATURE_VERSION_1) & status::FEATURES_OK, status::FEATURES_OK, "it works again");
    rig.set_up_ring(0, 16, 0x1_0000);
    assert_eq!(rig.add_status(status::DRIVER_OK), 15);
    let seen = rig.seen.lock().unwrap();
    assert_eq!((seen.activations, seen.deactivations), (2, 1));
    assert_eq!(seen.active_queues, [(0, 16)]);
}

#[test]
fn features_that_were_not_offered_or_too_old_are_not_accepted() {
    for features in [FEATURE_VERSION_1 | 1 << 40, 0b100, 0] {
        let mut rig = Rig::new(false);
        assert_eq!(rig.negotiate(features) & status::FEATURES_OK, 0, "{features:#x}");
        assert_eq!(rig.add_status(status::DRIVER_OK) & status::DRIVER_OK, 0);
        assert!(!rig.transport.is_active());
    }
}

#[test]
fn rings_outside_memory_and_refusals_end_in_needs_reset() {
    for (refuse, base) in [(false, 0x10_0000 - 64), (false, u32::MAX - 0xffff), (true, 0x1_0000)] {
        let mut rig = Rig::new(refuse);
        rig.negotiate(FEATURE_VERSION_1);
        rig.set_up_ring(0, 128, base);
        let status = rig.add_status(status::DRIVER_OK);
        assert_eq!(status & status::DEVICE_NEEDS_RESET, status::DEVICE_NEEDS_RESET);
        assert!(rig.line.drain(), "the driver is told");
        assert!(!rig.transport.is_active());
        rig.write(Register::Status, 0);
        assert_eq!(rig.read(Register::Status), 0);
    }
}

#[test]
fn a_running_ring_cannot_be_changed_and_order_is_enforced() {
    let mut rig = Rig::new(false);
    rig.set_up_ring(0, 128, 0x1_0000);
    assert_eq!(rig.read(Register::QueueReady), 0, "too early");
    assert_eq!(rig.add_status(status::DRIVER_OK), 0, "no features yet");
    rig.negotiate(FEATURE_VERSION_1);
    rig.set_up_ring(0, 128, 0x1_0000);
    rig.add_status(status::DRIVER_OK);
    rig.write(Register::Status, 1);
    assert_eq!(rig.read(Register::Status), 15, "bits are not taken away");
    rig.write(Register::Status, 15 | 64);
    assert_eq!(rig.read(Register::Status), 15, "needs-reset is not the driver's to set");
    rig.write(Register::QueueSelect, 7);
    assert_eq!(rig.read(Register::QueueNumMax), 0, "no such ring");
    rig.write(Register::QueueNotify, 7);
}

#[test]
fn configuration_is_read_in_any_width_and_written_once_there_is_a_driver() {
    let mut rig = Rig::new(false);
    let mut data = [0; 3];
    rig.transport.read(CONFIG_SPACE_OFFSET + 2, &mut data);
    assert_eq!(&data, b"nfi");
    rig.transport.write(CONFIG_SPACE_OFFSET, &[1]);
    assert!(rig.seen.lock().unwrap().written.is_empty());
    rig.add_status(status::DRIVER);
    rig.transport.write(CONFIG_SPACE_OFFSET + 1, &[1, 2]);
    assert_eq!(rig.seen.lock().unwrap().written, [(1, vec![1, 2])]);
    rig.transport.read(0x001, &mut data);
    assert_eq!(data, [0; 3], "registers are 32 bits wide");
}

/// What a hostile guest does: any access anywhere, with a taste for the registers that matter.
fn access() -> impl Strategy<Value = (bool, u64, Vec<u8>)> {
    let interesting = prop_oneof![
        Just(0x014u64),
        Just(0x020),
        Just(0x024),
        Just(0x030),
        Just(0x038),
        Just(0x044),
        Just(0x050),
        Just(0x064),
        Just(0x070),
        Just(0x070),
        Just(0x080),
        Just(0x084),
        Just(0x090),
        Just(0x0a0),
        0u64..0x1000,
    ];
    let word = prop_oneof![
        any::<u32>(),
        0u32..16,
        Just(1u32),
        Just(3),
        Just(11),
        Just(15),
        Just(128),
        Just(0x1_0000),
        Just(u32::MAX),
    ];
    let data = prop_oneof![4 => word.prop_map(|word| word.to_le_bytes().to_vec()), 1 => proptest::collection::vec(any::<u8>(), 0..9)];
    (prop::bool::weighted(0.8), interesting, data)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn no_sequence_of_accesses_breaks_the_transport(accesses in proptest::collection::vec(access(), 1..120), refuse in any::<bool>()) {
        let mut rig = Rig::new(refuse);
        for (is_write, offset, mut data) in accesses {
            if is_write {
                rig.transport.write(offset, &data);
            } else {
                rig.transport.read(offset, &mut data);
            }
            let status = rig.read(Register::Status);
            prop_assert_eq!(rig.transport.is_active(), status & status::DRIVER_OK != 0 && status & status::DEVICE_NEEDS_RESET == 0);
            let seen = rig.seen.lock().unwrap();
            prop_assert_eq!(seen.features & !OFFERED, 0);
        }
        rig.write(Register::Status, 0);
        prop_assert!(!rig.transport.is_active());
        let seen = rig.seen.lock().unwrap();
        prop_assert_eq!(seen.activations, seen.deactivations);
    }
}
