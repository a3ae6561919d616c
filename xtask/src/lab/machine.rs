//! One run of the lab's machine: payload disk, initramfs, QEMU, output, exit status.
//!
//! The guest's console is this program's output, line by line; its last line carries the script's exit status. Nothing is left behind.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::base::{Base, DISK_MODULES};
use crate::initramfs::{Archive, DIRECTORY};
use crate::program;

/// Announces the script's exit status on the console.
const EXIT_MARK: &str = "LAB-EXIT ";
/// Size of the disk that takes all writes.
const WRITABLE_SIZE: u64 = 16 << 30;

/// A machine whose console says nothing for this long hangs: no single case may take so long.
const SILENCE: Duration = Duration::from_secs(300);

/// The machine fell silent and was stopped. Nothing that runs inside as a program can do that to a kernel: it is the emulation's fault.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hung;

impl std::fmt::Display for Hung {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "the lab's machine hung: nothing on its console for {} s", SILENCE.as_secs())
    }
}

impl std::error::Error for Hung {}

/// What the machine is given to run: a folder that appears read-only at `/payload`.
pub(crate) struct Payload {
    folder: tempfile::TempDir,
}

impl Payload {
    /// An empty one.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { folder: tempfile::Builder::new().prefix("msb-lab-").tempdir()? })
    }

    /// Adds a file or folder under `name`.
    pub(crate) fn add(&mut self, from: &Path, name: &str) -> Result<()> {
        super::copy(from, &self.folder.path().join("payload").join(self.prepared(name)?))
    }

    /// Adds everything in `folder`.
    pub(crate) fn add_content(&mut self, folder: &Path) -> Result<()> {
        self.prepared(".")?;
        super::copy(&folder.join("."), &self.folder.path().join("payload"))
    }

    /// Adds a file with this content.
    pub(crate) fn write(&mut self, name: &str, content: &[u8]) -> Result<()> {
        Ok(std::fs::write(self.folder.path().join("payload").join(self.prepared(name)?), content)?)
    }

    fn prepared<'a>(&self, name: &'a str) -> Result<&'a str> {
        std::fs::create_dir_all(self.folder.path().join("payload"))?;
        Ok(name)
    }
}

/// The machine's shape.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    /// Whether its clock counts instructions.
    pub(crate) exact: bool,
    /// Processors; one if exact.
    pub(crate) cpus: u32,
    /// Memory in MiB.
    pub(crate) memory_mib: u32,
    /// Seconds of this machine's time after which it is stopped.
    pub(crate) timeout_s: u64,
    /// What the script runs under.
    pub(crate) system: System,
}

/// What is process 1 of the machine's own system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum System {
    /// Nothing but the script: up in no time.
    #[default]
    Bare,
    /// systemd, with the script as a unit of its own. A script that has the machine booted again (`systemctl reboot`) is run again
    /// then, on the same disk.
    Systemd,
}

impl Machine {
    /// Runs `script` inside and returns its exit status; its output is printed as it comes.
    ///
    /// # Errors
    ///
    /// When the machine cannot be made or started, or stops before the script does.
    pub(crate) fn run(&self, payload: &Payload, script: &str) -> Result<i32> {
        self.run_with(payload, script, &mut |line| println!("{line}"))
    }

    /// As [`Machine::run`], with the output given to `each_line`.
    pub(crate) fn run_with(&self, payload: &Payload, script: &str, each_line: &mut dyn FnMut(&str)) -> Result<i32> {
        let base = Base::get()?;
        let work = tempfile::Builder::new().prefix("msb-lab-").tempdir()?;
        let (payload_disk, writable_disk) = (work.path().join("payload.img"), work.path().join("writable.img"));
        let content = payload.folder.path().join("payload");
        std::fs::create_dir_all(&content)?;
        make_filesystem(&payload_disk, size_of_folder(&content)? * 5 / 4 + (64 << 20), Some(&content))?;
        make_filesystem(&writable_disk, WRITABLE_SIZE, None)?;
        let initramfs = work.path().join("initramfs");
        let mut modules = Vec::new();
        for name in DISK_MODULES {
            let content =
                std::fs::read(base.module(name)).with_context(|| format!("module {name} of the lab's kernel"))?;
            modules.push((format!("{name}.ko"), content));
        }
        let (rest, boot) = match self.system {
            System::Bare => (INIT_BARE, "quiet panic=-1 reboot=t"),
            // A panic stands still and is found by its silence, where otherwise it would boot for ever.
            System::Systemd => (INIT_SYSTEMD, "quiet panic=0 systemd.show_status=0"),
        };
        let init = format!("{INIT}{rest}").replace("@MODULES@", &DISK_MODULES.join(" "));
        let mut files: Vec<(&str, u32, &[u8])> =
            vec![("init", 0o755, init.as_bytes()), ("task", 0o644, script.as_bytes())];
        files.extend(modules.iter().map(|(name, content)| (name.as_str(), 0o644, content.as_slice())));
        std::fs::write(&initramfs, self::initramfs(&files)?)?;

        let mut qemu = program::command("timeout");
        qemu.args(["--signal=KILL", &self.timeout_s.to_string(), "qemu-system-x86_64", "-M", "q35"]);
        if self.exact {
            // One instruction is 2^0 ns; sleep=off jumps over idle time.
            qemu.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"]);
        } else {
            qemu.args(["-accel", "tcg,thread=multi", "-smp", &self.cpus.to_string()]);
        }
        // String instructions count once a byte there: without ERMS and FSRM kernels copy with 8-byte moves instead.
        qemu.args(["-cpu", "max,-erms,-fsrm", "-m", &self.memory_mib.to_string()]);
        qemu.args(["-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio"]);
        if self.system == System::Bare {
            qemu.arg("-no-reboot");
        }
        for (id, path, options) in [
            ("base", &base.disk(), "readonly=on"),
            ("payload", &payload_disk, "readonly=on"),
            ("writable", &writable_disk, "cache=unsafe,discard=unmap"),
        ] {
            qemu.arg("-drive").arg(format!("file={},if=none,id={id},format=raw,{options}", path.display()));
            qemu.args(["-device", &format!("virtio-blk-pci,drive={id}")]);
        }
        qemu.arg("-kernel").arg(base.kernel()).arg("-initrd").arg(&initramfs);
        qemu.arg("-append").arg(format!("console=ttyS0 {boot}"));

        let monitor = work.path().join("monitor.sock");
        qemu.args(["-monitor", &format!("unix:{},server=on,wait=off", monitor.display())]);

        let mut child = qemu.stdout(Stdio::piped()).spawn().context("cannot start QEMU")?;
        let lines = lines(child.stdout.take().context("QEMU's output")?);
        let mut status = None;
        loop {
            let line = match lines.recv_timeout(SILENCE) {
                Ok(line) => line.context("reading the lab's console")?,
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    // Where its processors are, twice: one that stands still is told from one that spins.
                    for _ in 0..2 {
                        print!("{}", ask(&monitor, "info registers -a").unwrap_or_else(|error| format!("{error}\n")));
                    }
                    let _ = ask(&monitor, "quit");
                    let _ = child.wait();
                    return Err(Hung.into());
                }
            };
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches('\r');
            match line.split_once(EXIT_MARK) {
                Some((_, code)) => status = code.trim().parse().ok(),
                None if is_firmware(line) => {}
                None => each_line(line),
            }
        }
        child.wait()?;
        match status {
            Some(status) => Ok(status),
            None => bail!("the lab's machine stopped before the script ended (limit {} s)", self.timeout_s),
        }
    }
}

/// The console line by line, so that whoever waits for one can stop waiting.
fn lines(output: impl Read + Send + 'static) -> Receiver<std::io::Result<Vec<u8>>> {
    let (sender, receiver) = sync_channel(1024);
    std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n') {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Gives QEMU's monitor a command and returns what it answers within a second.
fn ask(monitor: &Path, command: &str) -> Result<String> {
    let mut stream = UnixStream::connect(monitor).context("QEMU's monitor")?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    writeln!(stream, "{command}")?;
    let mut answer = Vec::new();
    // It never closes the connection: its silence is the end.
    let _ = stream.read_to_end(&mut answer);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// What SeaBIOS paints on the console before the kernel takes over.
fn is_firmware(line: &str) -> bool {
    line.contains("SeaBIOS") || line.contains("\u{1b}c") || line.starts_with("Booting from ROM")
}

/// An uncompressed cpio with a busybox, its usual folders and these files (name, permissions, content).
pub(super) fn initramfs(files: &[(&str, u32, &[u8])]) -> Result<Vec<u8>> {
    const REGULAR: u32 = 0o100_000;
    let busybox = std::fs::read("/bin/busybox").context("busybox-static")?;
    let mut archive = Archive::default();
    for folder in ["proc", "sys", "dev", "base", "writable", "new"] {
        archive.entry(folder, DIRECTORY, (0, 0), &[]);
    }
    archive.entry("dev/console", 0o020_600, (5, 1), &[]);
    archive.entry("busybox", REGULAR | 0o755, (0, 0), &busybox);
    for (name, mode, content) in files {
        archive.entry(name, REGULAR | mode, (0, 0), content);
    }
    Ok(archive.finish())
}

fn make_filesystem(image: &Path, size_bytes: u64, content: Option<&Path>) -> Result<()> {
    std::fs::File::create(image)?.set_len(size_bytes)?;
    let mut mke2fs = program::command("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4"]);
    if let Some(content) = content {
        mke2fs.arg("-d").arg(content);
    }
    program::output(mke2fs.arg(image)).map(|_| ())
}

fn size_of_folder(folder: &Path) -> Result<u64> {
    let text = program::output(program::command("du").args(["--summarize", "--bytes"]).arg(folder))?;
    let number = text.split_whitespace().next().context("du prints a number")?;
    Ok(number.parse()?)
}

/// The machine's init: mounts the base with what was written over it, and the payload. One of the two below follows.
const INIT: &str = r#"#!/busybox sh
b=/busybox
$b mount -t proc proc /proc; $b mount -t devtmpfs dev /dev
for module in @MODULES@; do $b insmod /$module.ko; done
$b mount -t ext4 -o ro /dev/vda /base; $b mount -t ext4 /dev/vdc /writable; $b mkdir -p /writable/upper /writable/work
$b mount -t overlay -o lowerdir=/base,upperdir=/writable/upper,workdir=/writable/work overlay /new
$b mount -t ext4 -o ro /dev/vdb /new/payload
$b cp /task /new/task; $b mount --move /dev /new/dev
"#;

/// Mounts what a system needs, loads KVM, runs the script, says how it ended.
const INIT_BARE: &str = r#"
$b mount -t proc proc /new/proc; $b mount -t sysfs sys /new/sys
$b mkdir -p /new/dev/pts /new/dev/shm
$b mount -t devpts devpts /new/dev/pts; $b mount -t tmpfs shm /new/dev/shm; $b mount -t tmpfs -o mode=1777 tmp /new/tmp
$b mount -t tmpfs run /new/run; $b mount -t cgroup2 cgroup /new/sys/fs/cgroup; $b mount -t securityfs security /new/sys/kernel/security
$b chroot /new /bin/bash -c 'ip link set lo up; hostname lab; modprobe -a kvm-amd vhost_vsock tun veth loop fuse 2>/dev/null; export HOME=/root PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8; cd /root; bash /task </dev/null; echo "LAB-EXIT $?"'
$b poweroff -f
"#;

/// Gives systemd a unit that does the same as the last line of [`INIT_BARE`], and becomes systemd. Timers and terminals, which nobody
/// needs there, are masked.
const INIT_SYSTEMD: &str = r#"
units=/new/etc/systemd/system
for unit in serial-getty@ttyS0.service getty@tty1.service apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer dpkg-db-backup.timer e2scrub_reap.service modprobe@.service systemd-sysusers.service; do
    $b ln -sf /dev/null $units/$unit
done
echo lab > /new/etc/hostname
$b cat > $units/lab.service <<'END'
[Unit]
Description=What the lab was asked to run
After=multi-user.target systemd-user-sessions.service dbus.socket systemd-logind.service

[Service]
# A shell of its own, so that a script killed by a reboot says nothing.
ExecStart=/bin/bash -c 'bash /task; echo "LAB-EXIT $?"; exec systemctl poweroff --force --force'
Environment=HOME=/root PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
WorkingDirectory=/root
StandardInput=null
StandardOutput=file:/dev/ttyS0
StandardError=file:/dev/ttyS0
KillMode=mixed
TimeoutStopSec=5s
Delegate=yes
END
$b cat > $units/lab-kvm.service <<'END'
[Unit]
Description=What a host of sandboxes has from its boot on
DefaultDependencies=no
After=systemd-modules-load.service
Before=sysinit.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/bash -c 'modprobe -a kvm-amd vhost_vsock tun veth loop fuse 2>/dev/null; chmod 666 /dev/kvm'
END
$b cat > $units/lab.target <<'END'
[Unit]
Requires=multi-user.target lab-kvm.service lab.service
AllowIsolate=yes
END
$b umount /proc
exec $b switch_root /new /lib/systemd/systemd --unit=lab.target
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_firmware_is_not_heard() {
        assert!(is_firmware("SeaBIOS (version 1.16.2-debian-1.16.2-1)"));
        assert!(!is_firmware("INIT-UP after 0.05 s, 1 processors"));
    }
}
