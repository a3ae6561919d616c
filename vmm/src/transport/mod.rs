//! How a virtio device reaches the guest: registers in guest physical memory (`mmio`, engine kvm) or the vhost-user protocol
//! (`vhost_user`, engine qemu). Both drive `devices::virtio::device::VirtioDevice` and nothing else.

pub mod mmio;
pub mod vhost_user;
