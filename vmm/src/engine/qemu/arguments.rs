//! QEMU's command line, made from a machine: pure, so that a test reads it.

use std::os::fd::RawFd;

use crate::devices::virtio::device::DeviceType;

/// One vhost-user device: QEMU's name for it and the socket it talks on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Attachment {
    qemu_device: String,
    name: String,
    channel: Channel,
}

/// How QEMU gets at a device's socket.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Channel {
    /// It inherits a connected one.
    Inherited(RawFd),
    /// It inherits the name of one (`O_PATH`) and connects. Only for `-netdev vhost-user`, which refuses others: QEMU believes that descriptors
    /// can be passed over sockets that it connected itself and over no other.
    Named(RawFd),
}

impl Attachment {
    /// QEMU's counterpart of a device of ours.
    ///
    /// # Errors
    /// Why this engine has none.
    pub(super) fn new(device: DeviceType, name: &str, socket: RawFd) -> Result<Self, String> {
        let qemu_device = match device {
            DeviceType::Block => "vhost-user-blk,num-queues=1,config-wce=off",
            DeviceType::Vsock => "vhost-user-vsock-device",
            DeviceType::Rng => "vhost-user-rng",
            DeviceType::Net => return Err("a network card is attached by its socket's name".into()),
            DeviceType::Fs => "vhost-user-fs-device,tag=msb,queue-size=512",
            DeviceType::Balloon => return Err("the balloon is QEMU's own on this engine".into()),
        };
        Ok(Self { qemu_device: qemu_device.to_owned(), name: name.to_owned(), channel: Channel::Inherited(socket) })
    }

    /// The network card of this Ethernet address, which QEMU must be told: it answers for the configuration space itself.
    pub(super) fn network(name: &str, mac: [u8; 6], socket: RawFd) -> Self {
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        Self {
            qemu_device: format!("virtio-net-device,netdev=net-{name},mac={mac}"),
            name: name.to_owned(),
            channel: Channel::Named(socket),
        }
    }

    fn push_words(&self, words: &mut Vec<String>) {
        let Self { qemu_device, name, channel } = self;
        match channel {
            Channel::Inherited(socket) => {
                words.extend(["-chardev".into(), format!("socket,id=chr-{name},fd={socket}")]);
                words.extend(["-device".into(), format!("{qemu_device},chardev=chr-{name}")]);
            }
            Channel::Named(socket) => {
                words.extend(["-chardev".into(), format!("socket,id=chr-{name},path=/proc/self/fd/{socket}")]);
                words.extend(["-netdev".into(), format!("vhost-user,id=net-{name},chardev=chr-{name}")]);
                words.extend(["-device".into(), qemu_device.clone()]);
            }
        }
    }
}

/// What decides QEMU's command line.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Arguments {
    pub(super) cpus: u8,
    pub(super) memory_mib: u32,
    pub(super) kernel_fd: RawFd,
    pub(super) initramfs_fd: Option<RawFd>,
    pub(super) command_line: String,
    pub(super) console_fd: RawFd,
    pub(super) attachments: Vec<Attachment>,
}

impl Arguments {
    /// The words, program name not included.
    pub(super) fn to_words(&self) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        let mut option = |name: &str, value: String| words.extend([name.to_owned(), value]);
        // Threads have names, by which the time of the vCPUs is found.
        option("-name", "guest,debug-threads=on".into());
        // PIC and PIT stay: without ACPI they are the guest's first timer and interrupts. The clock comes over the agent link.
        option("-M", "microvm,acpi=off,auto-kernel-cmdline=on,rtc=off,memory-backend=ram".into());
        option("-accel", "tcg,thread=multi".into());
        // Everything TCG has but 57-bit addresses, which only make page walks longer; rdrand seeds the guest at boot.
        option("-cpu", "max,la57=off".into());
        option("-smp", self.cpus.to_string());
        option("-m", format!("{}M", self.memory_mib));
        option("-object", format!("memory-backend-memfd,id=ram,size={}M,share=on", self.memory_mib));
        option("-kernel", format!("/proc/self/fd/{}", self.kernel_fd));
        if let Some(fd) = self.initramfs_fd {
            option("-initrd", format!("/proc/self/fd/{fd}"));
        }
        option("-append", self.command_line.clone());
        option("-global", "virtio-mmio.force-legacy=false".into());
        option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
        option("-chardev", format!("socket,id=console,fd={}", self.console_fd));
        option("-serial", "chardev:console".into());
        option("-display", "none".into());
        option("-monitor", "none".into());
        option("-parallel", "none".into());
        words.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(String::from));
        for attachment in &self.attachments {
            attachment.push_words(&mut words);
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_bare_confined_and_has_no_network_but_ours() {
        let attachments =
            [(DeviceType::Block, "blk-root", 7), (DeviceType::Vsock, "vsock", 8), (DeviceType::Rng, "rng", 9)]
                .map(|(device, name, socket)| Attachment::new(device, name, socket).expect("attachment"))
                .to_vec();
        let mut arguments = Arguments {
            cpus: 2,
            memory_mib: 256,
            kernel_fd: 10,
            initramfs_fd: Some(11),
            command_line: "quiet".into(),
            console_fd: 6,
            attachments,
        };
        let line = arguments.to_words().join(" ");
        for needed in [
            "-M microvm,acpi=off,auto-kernel-cmdline=on",
            "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            "-nodefaults",
            "-no-reboot",
            "share=on",
            "-global virtio-mmio.force-legacy=false",
            "-chardev socket,id=chr-vsock,fd=8 -device vhost-user-vsock-device,chardev=chr-vsock",
            "-kernel /proc/self/fd/10 -initrd /proc/self/fd/11",
        ] {
            assert!(line.contains(needed), "{needed} is not in {line}");
        }
        for forbidden in ["-netdev", "-nic", "-drive", "user,"] {
            assert!(!line.contains(forbidden), "{forbidden} is in {line}");
        }
        let mac = [2, 0x6d, 0x73, 0x62, 0, 2];
        arguments.attachments.push(Attachment::network("net", mac, 12));
        let line = arguments.to_words().join(" ");
        assert!(line.ends_with(
            "-chardev socket,id=chr-net,path=/proc/self/fd/12 -netdev vhost-user,id=net-net,chardev=chr-net \
             -device virtio-net-device,netdev=net-net,mac=02:6d:73:62:00:02"
        ));
        assert!(Attachment::new(DeviceType::Net, "net", 1).is_err());
        assert!(Attachment::new(DeviceType::Balloon, "balloon", 1).is_err());
    }
}
