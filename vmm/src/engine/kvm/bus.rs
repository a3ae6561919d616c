//! What answers a guest's accesses to ports and device memory: the virtio windows, the serial port, the reset line. Nothing else exists.
//!
//! Called by vCPU threads for each exit, with sizes and addresses of the guest's choice. Windows are found by arithmetic, not by search;
//! each device has its own lock, so vCPUs only wait for each other on the same device.

use std::io::Write;
use std::sync::{Mutex, PoisonError};

use vm_superio::{Serial, Trigger};

use super::super::ConsoleSink;
use crate::arch::x86_64::layout::{I8042_PORT, MMIO_START, MMIO_WINDOW_SIZE, SERIAL_PORT};
use crate::devices::virtio::event_loop::{Frozen, LoopHandle, WorkerId};
use crate::devices::virtio::notifier::Notifier;
use crate::transport::mmio::MmioTransport;
use crate::transport::mmio::saved::SavedTransport;

/// Registers of a 16550.
const SERIAL_PORT_COUNT: u16 = 8;
/// Command port of the keyboard controller, above its data port.
const I8042_COMMAND_OFFSET: u16 = 4;
/// "Pulse the reset line": the only command that does anything.
const I8042_RESET: u8 = 0xfe;
/// What an absent port reads as.
const FLOATING_BUS: u8 = 0xff;
/// CMOS data port. It reads as zero: all ones would say "update in progress", for which kernels wait.
const CMOS_DATA_PORT: u16 = 0x71;

/// What an access means for the machine.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Effect {
    /// Go on.
    None,
    /// The guest pulled the reset line.
    Reset,
}

/// The serial port's interrupt.
#[derive(Debug)]
pub struct SerialInterrupt(Notifier);

impl Trigger for SerialInterrupt {
    type E = std::io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.notify()
    }
}

type SerialPort = Serial<SerialInterrupt, vm_superio::serial::NoEvents, ConsoleSink>;

/// All devices of a machine.
pub struct Bus {
    windows: Vec<Mutex<MmioTransport>>,
    serial: Mutex<SerialPort>,
}

impl Bus {
    /// Devices in slot order, the console's sink, and the eventfd of the serial port's line.
    pub fn new(devices: Vec<MmioTransport>, console: ConsoleSink, serial_line: Notifier) -> Self {
        Self {
            windows: devices.into_iter().map(Mutex::new).collect(),
            serial: Mutex::new(Serial::new(SerialInterrupt(serial_line), console)),
        }
    }

    /// The device whose window holds `address`, and the offset in it.
    fn window(&self, address: u64) -> Option<(&Mutex<MmioTransport>, u64)> {
        let offset = address.checked_sub(MMIO_START)?;
        let slot = usize::try_from(offset / MMIO_WINDOW_SIZE).ok()?;
        Some((self.windows.get(slot)?, offset % MMIO_WINDOW_SIZE))
    }

    /// A read of device memory.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.window(address) {
            Some((device, offset)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(FLOATING_BUS),
        }
    }

    /// A write to device memory.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.window(address) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    /// A read of a port. String instructions read several times: `data` has all of them, and each byte port gets one byte.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match port.checked_sub(SERIAL_PORT) {
            Some(offset) if offset < SERIAL_PORT_COUNT => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                for byte in data {
                    *byte = serial.read(offset as u8);
                }
            }
            _ if port == CMOS_DATA_PORT || port == I8042_PORT || port == I8042_PORT + I8042_COMMAND_OFFSET => {
                data.fill(0)
            }
            _ => data.fill(FLOATING_BUS),
        }
    }

    /// A write to a port.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Effect {
        match port.checked_sub(SERIAL_PORT) {
            Some(offset) if offset < SERIAL_PORT_COUNT => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                for &byte in data {
                    // A console that cannot be written loses output; the guest must not notice.
                    let _ = serial.write(offset as u8, byte);
                }
                Effect::None
            }
            _ if port == I8042_PORT + I8042_COMMAND_OFFSET && data.first() == Some(&I8042_RESET) => Effect::Reset,
            _ => Effect::None,
        }
    }

    /// Makes every device stand between two events, and writes it down. They stand until the answer is dropped. No vCPU may run.
    ///
    /// # Errors
    /// In words: a device that cannot be saved now.
    pub fn save_devices(&self) -> Result<(Vec<SavedTransport>, Vec<Frozen>), String> {
        let windows: Vec<_> =
            self.windows.iter().map(|window| window.lock().unwrap_or_else(PoisonError::into_inner)).collect();
        // A loop serves several devices and stands once for all of them.
        let mut loops: Vec<(&LoopHandle, Vec<(usize, WorkerId)>)> = Vec::new();
        for (slot, window) in windows.iter().enumerate() {
            match window.worker() {
                None if window.is_active() => return Err(format!("device {} cannot be saved", window.name())),
                None => {}
                Some((handle, worker)) => match loops.iter_mut().find(|(known, _)| known.is(handle)) {
                    Some((_, workers)) => workers.push((slot, worker)),
                    None => loops.push((handle, vec![(slot, worker)])),
                },
            }
        }
        let mut rings = vec![Vec::new(); windows.len()];
        let mut frozen = Vec::with_capacity(loops.len());
        for (handle, workers) in loops {
            let stands = handle.freeze(workers.iter().map(|(_, worker)| *worker).collect());
            let stands = stands.map_err(|error| error.to_string())?;
            for ((slot, _), positions) in workers.iter().zip(stands.positions()) {
                rings[*slot] = positions.map_err(|error| format!("device {}: {error}", windows[*slot].name()))?;
            }
            frozen.push(stands);
        }
        let devices = windows.iter().zip(rings).map(|(window, rings)| window.save(rings)).collect::<Result<_, _>>()?;
        Ok((devices, frozen))
    }

    /// Puts devices back and starts them; once, before any vCPU runs and after the jail was closed.
    ///
    /// # Errors
    /// In words: a device that is another, or whose state cannot be.
    pub fn restore_devices(&self, saved: Vec<SavedTransport>) -> Result<(), String> {
        if saved.len() != self.windows.len() {
            return Err(format!("it has {} devices, this machine {}", saved.len(), self.windows.len()));
        }
        for (window, saved) in self.windows.iter().zip(saved) {
            window.lock().unwrap_or_else(PoisonError::into_inner).restore(saved)?;
        }
        Ok(())
    }

    /// Stops every device; called when no vCPU runs any more.
    pub fn reset_devices(&self) {
        for window in &self.windows {
            window.lock().unwrap_or_else(PoisonError::into_inner).reset();
        }
        // The last words of a panic may still be buffered; nobody is left to hear of a failure.
        let _ = self.serial.lock().unwrap_or_else(PoisonError::into_inner).writer_mut().flush();
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        to.debug_struct("Bus").field("windows", &self.windows.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);
    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_console_hears_the_serial_port_and_only_one_port_resets() {
        let console = Shared::default();
        let bus = Bus::new(Vec::new(), Box::new(console.clone()), Notifier::new().unwrap());
        for byte in b"hello" {
            assert_eq!(bus.port_write(SERIAL_PORT, &[*byte]), Effect::None);
        }
        // rep outsb arrives in one piece
        bus.port_write(SERIAL_PORT, b" there");
        assert_eq!(console.0.lock().unwrap().as_slice(), b"hello there");
        assert_eq!(bus.port_write(0x64, &[0xfe]), Effect::Reset);
        assert_eq!(bus.port_write(0x64, &[0xd1]), Effect::None);
        assert_eq!(bus.port_write(0x60, &[0xfe]), Effect::None);
        let mut status = [0];
        bus.port_read(SERIAL_PORT + 5, &mut status);
        assert_eq!(status[0] & 0x60, 0x60, "the transmitter is always empty");
    }

    proptest! {
        #[test]
        fn no_access_panics(address in any::<u64>(), port in any::<u16>(), mut data in proptest::collection::vec(any::<u8>(), 0..64)) {
            let bus = Bus::new(Vec::new(), Box::new(std::io::sink()), Notifier::new().unwrap());
            bus.mmio_write(address, &data);
            bus.mmio_read(address, &mut data);
            bus.port_write(port, &data);
            bus.port_read(port, &mut data);
        }
    }
}
