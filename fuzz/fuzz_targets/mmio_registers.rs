//! What a guest writes to the registers of a virtio-mmio device (VIRTIO 1.2, section 4.2.2): any access anywhere, in any order.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use msb_vmm::devices::virtio::device::{ActivateError, Activation, DeviceType, FEATURE_VERSION_1, VirtioDevice, copy_config};
use msb_vmm::devices::virtio::notifier::Notifier;
use msb_vmm::testing::guest_memory;
use msb_vmm::transport::mmio::MmioTransport;

/// A device that only asserts the transport's promises.
#[derive(Default)]
struct Plain {
    active: bool,
}

impl VirtioDevice for Plain {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }
    fn name(&self) -> &str {
        "plain"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn device_features(&self) -> u64 {
        FEATURE_VERSION_1 | 0b101
    }
    fn acknowledge_features(&mut self, features: u64) {
        assert!(!self.active && features & !self.device_features() == 0);
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(b"configuration", offset, data);
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert!(!self.active && activation.queues.len() <= 2);
        self.active = true;
        Ok(())
    }
    fn deactivate(&mut self) -> Vec<virtio_queue::Queue> {
        self.active = false;
        Vec::new()
    }
}

fuzz_target!(|accesses: Vec<(bool, u16, u32, u8)>| {
    let line = Notifier::new().expect("eventfd");
    let mut transport = MmioTransport::new(Box::<Plain>::default(), Arc::clone(&guest_memory(1)), line).expect("transport");
    for (is_write, offset, value, length) in accesses.into_iter().take(256) {
        let offset = u64::from(offset) % 0x1004;
        let mut data = value.to_le_bytes().to_vec();
        data.resize(usize::from(length % 9), 0);
        if is_write {
            transport.write(offset, &data);
        } else {
            transport.read(offset, &mut data);
        }
    }
});
