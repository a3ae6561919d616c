//! The register map (VIRTIO 1.2, section 4.2.2, table 4.1) and the status bits (section 2.1).

/// "virt", little endian.
pub const MAGIC: u32 = 0x7472_6976;
/// Version 2: the non-legacy interface.
pub const VERSION: u32 = 2;
/// Vendor: "MSB" and a zero; drivers ignore it.
pub const VENDOR: u32 = 0x0042_534d;
/// Where the device's own configuration begins.
pub const CONFIG_SPACE_OFFSET: u64 = 0x100;
/// Offset of the notify register, for ioeventfd.
pub const QUEUE_NOTIFY_OFFSET: u64 = 0x50;

/// Status bits.
pub mod status {
    /// The driver is able to drive the device.
    pub const DRIVER: u32 = 2;
    /// The driver is running the device.
    pub const DRIVER_OK: u32 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u32 = 8;
    /// Set by the device only.
    pub const DEVICE_NEEDS_RESET: u32 = 64;
    /// What a driver may set: ACKNOWLEDGE (1), the above, FAILED (128).
    pub const DRIVER_BITS: u32 = 1 | DRIVER | DRIVER_OK | FEATURES_OK | 128;
}

macro_rules! registers {
    ($($(#[$doc:meta])* $name:ident = $offset:literal,)*) => {
        /// A 32-bit register.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub enum Register {
            $($(#[$doc])* $name = $offset,)*
        }

        impl Register {
            /// The register at `offset` of the window, if there is one.
            pub fn at(offset: u64) -> Option<Self> {
                match offset {
                    $($offset => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

registers! {
    /// "virt".
    MagicValue = 0x000,
    /// 2.
    Version = 0x004,
    /// What kind of device.
    DeviceId = 0x008,
    /// Whose.
    VendorId = 0x00c,
    /// The selected half of what the device offers.
    DeviceFeatures = 0x010,
    /// Selects it.
    DeviceFeaturesSelect = 0x014,
    /// The selected half of what the driver takes.
    DriverFeatures = 0x020,
    /// Selects it.
    DriverFeaturesSelect = 0x024,
    /// Selects the ring the queue registers speak of.
    QueueSelect = 0x030,
    /// Its largest size.
    QueueNumMax = 0x034,
    /// Its size.
    QueueNum = 0x038,
    /// Whether it is ready.
    QueueReady = 0x044,
    /// The driver made buffers available in this ring.
    QueueNotify = 0x050,
    /// Pending interrupt causes.
    InterruptStatus = 0x060,
    /// Clears them.
    InterruptAcknowledge = 0x064,
    /// Status bits; writing zero resets.
    Status = 0x070,
    /// Descriptor table, low half.
    QueueDescriptorLow = 0x080,
    /// Descriptor table, high half.
    QueueDescriptorHigh = 0x084,
    /// Available ring, low half.
    QueueDriverLow = 0x090,
    /// Available ring, high half.
    QueueDriverHigh = 0x094,
    /// Used ring, low half.
    QueueDeviceLow = 0x0a0,
    /// Used ring, high half.
    QueueDeviceHigh = 0x0a4,
    /// Length of the selected shared memory region, low half.
    SharedMemoryLengthLow = 0x0b0,
    /// High half.
    SharedMemoryLengthHigh = 0x0b4,
    /// Its address, low half.
    SharedMemoryBaseLow = 0x0b8,
    /// High half.
    SharedMemoryBaseHigh = 0x0bc,
    /// Changes whenever the configuration does.
    ConfigGeneration = 0x0fc,
}
