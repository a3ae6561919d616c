//! What the guest can touch besides its memory: the virtio devices (`virtio/`). The serial console is the engine's own
//! (QEMU's, or `engine/kvm`'s 16550) and writes into `logs::console`.

pub mod virtio;
