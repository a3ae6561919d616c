//! A guest that QEMU runs by hand: the same QEMU, processor, kernel and kernel line as the engine's, Debian from the
//! `tools` image as its root, QEMU's own devices, and a shell on the serial console. The other half of the pairs of
//! disks and network.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};

use super::Running;
use crate::{binaries, cache, images, program};

/// The program that both guests run, in the peer's root.
pub(super) const LOAD: &str = "/usr/local/bin/xtask-load";
/// Its source, which decides the root's cache key, too.
const LOAD_SOURCE: &str = include_str!("../load/main.rs");
/// Size of the peer's disk: that of a sandbox's.
const DISK_SIZE: &str = "8G";
/// The first program of the peer: what a guest's init does, and lines of a shell.
const INIT: &str = r#"#!/bin/bash
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mkdir -p /dev/pts && mount -t devpts pts /dev/pts
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo -onlcr
dmesg -n 1
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
ip link set lo up
echo "<ready>"
while read -r line; do
    sh -c "$line" </dev/null
    echo "<ended $?>"
done
"#;

/// The load program, compiled for guests.
pub(super) fn load_program() -> Result<PathBuf> {
    let compiler = program::output(program::command("rustc").arg("--version"))?;
    let place = cache::entry("load", &cache::key([LOAD_SOURCE.as_bytes(), compiler.as_bytes()]), |result| {
        let mut compile = program::command("rustc");
        compile.args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols"]);
        compile.args(["--target", binaries::TARGET, "-o"]).arg(result.join("xtask-load"));
        program::output(compile.arg("xtask/src/load/main.rs")).map(|_| ())
    })?;
    Ok(place.join("xtask-load"))
}

/// The peer's root disk, to be copied: the tree of the `tools` image and what this file adds, in an ext4 like a
/// sandbox's.
fn root_disk() -> Result<PathBuf> {
    let (tools, load) = (images::tools()?.join("tools.tar"), load_program()?);
    let parts = [LOAD_SOURCE.as_bytes(), INIT.as_bytes(), tools.as_os_str().as_encoded_bytes(), MAKE.as_bytes()];
    let place = cache::entry("by-hand", &cache::key(parts), |result| {
        println!("making the root disk of the guest by hand");
        std::fs::write(result.join("init"), INIT)?;
        let mut make = program::command_as_root("sh")?;
        make.args(["-euc", MAKE, "sh"]).arg(&tools).arg(&load).arg(result).arg(DISK_SIZE);
        program::output(&mut make).map(|_| ())
    })?;
    Ok(place.join("root.img"))
}

/// Layers into a tree, the tree into a file system.
const MAKE: &str = r#"
tools=$1 load=$2 result=$3 size=$4
tree=$result/tree
mkdir "$tree"
for layer in $(tar -xOf "$tools" manifest.json | grep -o '[0-9a-f]*/layer\.tar'); do
    tar -xOf "$tools" "$layer" | tar --numeric-owner -C "$tree" -xf -
done
install -m 755 "$load" "$tree/usr/local/bin/xtask-load"
install -m 755 "$result/init" "$tree/bench-init"
mkdir -p "$tree/shared" "$tree/dev" "$tree/proc" "$tree/sys" "$tree/run" "$tree/tmp"
truncate -s "$size" "$result/root.img"
PATH=$PATH:/usr/sbin:/sbin mke2fs -q -F -t ext4 -b 4096 -I 256 -m 0 -J size=16 \
    -E lazy_itable_init=1,nodiscard -d "$tree" "$result/root.img"
rm -rf --one-file-system "$tree" "$result/layer"
"#;

/// A running one.
pub(super) struct ByHand {
    _qemu: Running,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl ByHand {
    /// Boots one with a fresh root disk in `work` and these words for QEMU. `shares_memory`: as a vhost-user device
    /// needs it.
    pub(super) fn start(tree: &Path, work: &Path, shares_memory: bool, words: &[String]) -> Result<Self> {
        let disk = work.join("by-hand.img");
        let mut copy = program::command("cp");
        program::output(copy.args(["--sparse=always", "--reflink=auto"]).arg(root_disk()?).arg(&disk))?;
        // It must not outlive us, however we end.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off"])
            .args(["-smp", "1", "-m", "1024M", "-display", "none", "-monitor", "none", "-parallel", "none"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-serial", "stdio"])
            .args(["-global", "virtio-mmio.force-legacy=false"]);
        let machine = "microvm,acpi=off,auto-kernel-cmdline=on,rtc=off";
        if shares_memory {
            qemu.args(["-M", &format!("{machine},memory-backend=ram")]);
            qemu.args(["-object", "memory-backend-memfd,id=ram,size=1024M,share=on"]);
        } else {
            qemu.args(["-M", machine]);
        }
        let drive = disk.display().to_string().replace(',', ",,");
        qemu.arg("-kernel")
            .arg(tree.join("share/msb/vmlinux"))
            .args(["-append", KERNEL_LINE])
            .args(["-drive", &format!("if=none,id=root,format=raw,discard=unmap,file={drive}")])
            .args(["-device", "virtio-blk-device,drive=root"])
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = qemu.spawn().context("cannot start QEMU")?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let qemu = Running(child);
        let mut guest = Self {
            _qemu: qemu,
            input: input.context("no input")?,
            output: BufReader::new(output.context("no output")?),
        };
        guest.read_until("<ready>")?;
        // There is no clock that it could ask.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        guest.shell(&format!("date -s @{} >/dev/null", now.as_secs()))?;
        Ok(guest)
    }

    /// What a line of a shell printed; it must succeed.
    pub(super) fn shell(&mut self, line: &str) -> Result<String> {
        writeln!(self.input, "{line}")?;
        self.input.flush()?;
        let (text, end) = self.read_until("<ended ")?;
        if end.trim() != "<ended 0>" {
            bail!("the guest by hand: {line}: {end} {text}");
        }
        Ok(text)
    }

    /// Lines up to the one that begins so, and that one.
    fn read_until(&mut self, beginning: &str) -> Result<(String, String)> {
        let mut text = String::new();
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line)? == 0 {
                bail!("the guest by hand has ended: {text}");
            }
            if line.starts_with(beginning) {
                return Ok((text, line));
            }
            text.push_str(&line);
        }
    }
}

/// The engine's kernel line (`vmm/src/launch/command_line.rs`, `vmm/src/engine/qemu`) with another root.
const KERNEL_LINE: &str = "console=ttyS0 quiet panic=-1 oops=panic reboot=t pci=off 8250.nr_uarts=1 random.trust_cpu=on \
    random.trust_bootloader=on cgroup_no_v1=all tsc=nowatchdog init_on_alloc=1 tsc=reliable rcupdate.rcu_expedited=1 \
    root=/dev/vda rw rootflags=discard,noinit_itable init=/bench-init";
