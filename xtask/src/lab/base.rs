//! The lab's machine as far as it is the same every time: a kernel with its modules, and a minimal Debian on a disk image.
//!
//! Made once per recipe and kernel package, kept under `~/.cache/msb/lab/<key>/`. Needs root to make (debootstrap does), not to run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{cache, debian, program};

/// Changed whenever what is made here changes.
const RECIPE: &str = "2";
/// The stock kernel for virtual machines: small, and with kvm_amd as a module.
const KERNEL: &str = "linux-image-cloud-amd64";
/// Beside the minimal system: what the cases and people inside use, and systemd as it comes on a server.
const INCLUDE: &str = "ca-certificates,iperf3,erofs-utils,iproute2,procps,strace,openssh-client,rsync,sshfs,curl,netcat-openbsd,kmod,\
    systemd-sysv,dbus,dbus-user-session,libpam-systemd";
/// What the machine's own initramfs loads to find its disks, in order.
pub(super) const DISK_MODULES: &[&str] =
    &["virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk", "overlay"];

/// A made base.
pub(super) struct Base {
    folder: PathBuf,
}

impl Base {
    /// Finds it in the cache or makes it.
    pub(super) fn get() -> Result<Self> {
        let (codename, mirror) = debian::release()?;
        let package = kernel_package()?;
        let key = cache::key([RECIPE, &codename, &package, INCLUDE].map(str::as_bytes));
        let folder = cache::entry("lab", &key, |folder| make(folder, &codename, &mirror, &package))?;
        Ok(Self { folder })
    }

    pub(super) fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    pub(super) fn disk(&self) -> PathBuf {
        self.folder.join("base.img")
    }

    pub(super) fn module(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.ko"))
    }
}

/// The package with the kernel itself, which the one in [`KERNEL`] only points at.
fn kernel_package() -> Result<String> {
    debian::first_known(&[KERNEL])?;
    let text = program::output(program::command("apt-cache").args(["depends", "--important", KERNEL]))?;
    text.lines()
        .find_map(|line| line.trim().strip_prefix("Depends: linux-image-").map(|rest| format!("linux-image-{rest}")))
        .with_context(|| format!("{KERNEL} depends on no kernel"))
}

fn make(folder: &Path, codename: &str, mirror: &str, package: &str) -> Result<()> {
    println!("The lab's machine is made once: Debian {codename} with {package}, about two minutes.");
    let log = cache::root()?.join("log/lab.log");
    let unpacked = folder.join("kernel");
    std::fs::create_dir(&unpacked)?;
    debian::unpack(&debian::download(package, folder)?, &unpacked)?;
    let root = folder.join("root");
    let mut debootstrap = program::command_as_root("debootstrap")?;
    debootstrap.args(["--variant=minbase", "--include", INCLUDE, codename]).arg(&root).arg(mirror);
    program::run_logged("debootstrap", &mut debootstrap, &log)?;
    // One script, because every step of it works on root's files.
    let mut finish = program::command_as_root("sh")?;
    finish.args(["-euc", FINISH, "sh"]).arg(folder).args(DISK_MODULES);
    program::run_logged("its disk", &mut finish, &log)
}

/// Modules into the root, an image of it, the modules of the disk's own drivers beside it; then what is not needed any more goes.
const FINISH: &str = r#"
folder=$1; shift
root=$folder/root
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
mkdir -p "$root/payload" "$root/lib/modules"
cp -a "$folder"/kernel/lib/modules/* "$root/lib/modules/"
release=$(ls "$root/lib/modules")
chroot "$root" depmod "$release"
for module in "$@"; do find "$root/lib/modules" -name "$module.ko" -exec cp {} "$folder/" \; ; done
cp "$folder"/kernel/boot/vmlinuz-* "$folder/vmlinuz"
mke2fs -q -t ext4 -d "$root" "$folder/base.img" 1G
rm -rf "$root" "$folder/kernel" "$folder"/*.deb
chmod a+r "$folder"/*
"#;
