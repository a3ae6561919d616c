//! `cargo xtask lab`: the whole-system cases with engine kvm, on a machine that has no KVM.
//!
//! ```text
//!  this machine (any Linux, no KVM needed)
//!    └ QEMU emulates an AMD processor with SVM ── base (Debian, its cloud kernel, kvm_amd) ── /dev/kvm
//!        └ msb, msbd, msb-vmm --engine kvm, from the payload disk
//!            └ guest
//! ```
//!
//! With `--exact` the machine counts instructions: one is one nanosecond of its clock, idle time is skipped, so the same work takes the
//! same milliseconds however busy this machine is. `base` makes and caches the machine, `machine` runs it. Inside, everything is root's
//! and thrown away afterwards; the payload is read-only at `/payload`.

mod base;
mod machine;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{binaries, cache, debian, dist, images, install, kernel, program};

pub(crate) use machine::{Hung, Machine, Payload, System};

/// What the lab needs installed on this machine.
pub(crate) const PACKAGES: &[&[debian::Package]] = &[debian::BUILD, debian::RUN, debian::IMAGES, debian::CHECK];

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Count instructions instead of time: repeats to the millisecond, one processor
    #[arg(long)]
    exact: bool,
    /// Run this script (bash, as root) inside instead of the whole-system cases
    #[arg(long, value_name = "SCRIPT")]
    task: Option<PathBuf>,
    /// A folder that appears as /payload when a script is run; without it the install tree and the small images do
    #[arg(long, value_name = "FOLDER", requires = "task")]
    payload: Option<PathBuf>,
    /// Boot bare kernels only: no daemon, no agent, the first thing to look at when nothing works
    #[arg(long, conflicts_with_all = ["task", "payload"])]
    bare: bool,
    /// With systemd as the machine's process 1: its own cases, or the script as a unit
    #[arg(long)]
    systemd: bool,
    /// Processors of the machine
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory of the machine in MiB
    #[arg(long, default_value_t = 4096)]
    memory: u32,
    /// Seconds after which the machine is stopped
    #[arg(long, default_value_t = 1800)]
    timeout: u64,
    /// Run only the cases whose name contains this
    #[arg(last = true)]
    filter: Vec<String>,
    #[command(flatten)]
    build: binaries::Arguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    debian::ensure(PACKAGES)?;
    let machine = Machine {
        exact: arguments.exact,
        cpus: arguments.cpus,
        memory_mib: arguments.memory,
        timeout_s: arguments.timeout,
        system: if arguments.systemd { System::Systemd } else { System::Bare },
    };
    let code = match &arguments.task {
        Some(task) => {
            let script = std::fs::read_to_string(task).with_context(|| format!("cannot read {}", task.display()))?;
            let mut payload = Payload::new()?;
            match &arguments.payload {
                Some(folder) => payload.add_content(folder)?,
                None => {
                    add_tree(&mut payload, arguments.build)?;
                    payload.add(&images::small()?, "images")?;
                }
            }
            machine.run(&payload, &script)?
        }
        None if arguments.systemd => {
            let names: Vec<&str> = arguments.filter.iter().map(String::as_str).collect();
            service_cases(&machine, arguments.build, &names)?
        }
        None if arguments.bare => bare(&machine, arguments.build)?,
        None => cases(&machine, arguments.build, &arguments.filter)?,
    };
    if code != 0 {
        bail!("in the lab: exit status {code}");
    }
    Ok(())
}

fn add_tree(payload: &mut Payload, build: binaries::Arguments) -> Result<()> {
    let tree = cache::development_tree();
    install::install(&tree, build)?;
    payload.add(&tree, "msb")
}

/// Runs the whole-system cases inside, with engine kvm; returns their exit status.
pub(crate) fn cases(machine: &Machine, build: binaries::Arguments, filter: &[String]) -> Result<i32> {
    let mut payload = Payload::new()?;
    add_tree(&mut payload, build)?;
    payload.add(&images::small()?, "images")?;
    payload.add(&compiled(&["test", "--package", "msb-tests", "--test", "system", "--no-run"])?, "system")?;
    let filter: Vec<String> = filter.iter().map(|word| quoted(word)).collect();
    // As in the tier e2e: an image of half a gigabyte that one case needs is there when it is asked for.
    let tools = if std::env::var_os("MSB_TEST_TOOLS").is_some() {
        payload.add(&images::tools()?.join("tools.tar"), "tools.tar")?;
        "MSB_TEST_TOOLS=/payload/tools.tar RUST_TEST_NOCAPTURE=1"
    } else {
        ""
    };
    let script = format!(
        "export MSB_TEST_TREE=/payload/msb MSB_TEST_IMAGES=/payload/images MSB_TEST_ENGINE=kvm MSB_TEST_EVIDENCE=/root/evidence {tools}\n\
         mkdir -p /root/evidence\n\
         /payload/system --test-threads={} {}\n",
        machine.cpus.max(1),
        filter.join(" ")
    );
    machine.run(&payload, &script)
}

/// The cases of the service under systemd, which has the Debian package installed; returns their exit status.
pub(crate) fn service_cases(machine: &Machine, build: binaries::Arguments, names: &[&str]) -> Result<i32> {
    let machine = Machine { system: System::Systemd, ..*machine };
    let work = tempfile::tempdir()?;
    let mut payload = Payload::new()?;
    payload.add(&dist::package_for_tests(work.path(), build)?, "msb.deb")?;
    payload.add(&images::small()?, "images")?;
    payload.add(&compiled(&["test", "--package", "msb-tests", "--test", "systemd", "--no-run"])?, "systemd")?;
    let names: Vec<String> = names.iter().map(|name| quoted(name)).collect();
    machine.run(&payload, &format!("export MSB_TEST_LAB=1\n/payload/systemd {}\n", names.join(" ")))
}

/// Runs a measuring script with the install tree, the small images, a bare kernel and whatever `more` it needs as payload; its lines go to
/// `each_line`.
pub(crate) fn measure(
    machine: &Machine,
    build: binaries::Arguments,
    script: &str,
    more: &[(PathBuf, &str)],
    each_line: &mut dyn FnMut(&str),
) -> Result<i32> {
    let mut payload = bare_payload(build)?;
    add_tree(&mut payload, build)?;
    payload.add(&images::small()?, "images")?;
    for (path, name) in more {
        payload.add(path, name)?;
    }
    payload.add(&vsock(build)?, "vsock")?;
    machine.run_with(&payload, script, each_line)
}

/// Boots our kernel with a tiny initramfs on engine kvm, with nothing else of the product.
fn bare(machine: &Machine, build: binaries::Arguments) -> Result<i32> {
    machine.run(&bare_payload(build)?, BARE_SCRIPT)
}

fn bare_payload(build: binaries::Arguments) -> Result<Payload> {
    let kernel = kernel::built()?;
    let mut payload = Payload::new()?;
    payload.add(&kernel.join("vmlinux"), "vmlinux")?;
    payload.add(&kernel.join("bzImage"), "bzImage")?;
    let profile = if build.fast { "dev" } else { "release" };
    let example = ["build", "--package", "msb-vmm", "--example", "bare", "--profile", profile];
    payload.add(&compiled(&example)?, "bare")?;
    payload.write("initramfs.cpio", &machine::initramfs(&[("init", 0o755, BARE_INIT.as_bytes())])?)?;
    Ok(payload)
}

/// Init of the bare guest: says that it is there and resets the machine.
const BARE_INIT: &str = "#!/busybox sh\n\
    /busybox mkdir -p /proc\n/busybox mount -t proc proc /proc\n\
    echo \"INIT-UP after $(/busybox cut -d' ' -f1 /proc/uptime) s, $(/busybox grep -c ^processor /proc/cpuinfo) processors\"\n\
    case \"$(/busybox cat /proc/cmdline)\" in *end=panic*) exit 1 ;; esac\n\
    /busybox reboot -f\n";

/// Every road a kernel can take, each twice, because the first run also fills the machine's page cache.
const BARE_SCRIPT: &str = "set -e\ncd /tmp\n\
    check() { \"$@\" | tee /tmp/console; grep -aq INIT-UP /tmp/console; grep -aq 'BARE-END Reset' /tmp/console; }\n\
    for kernel in vmlinux bzImage; do for turn in 1 2; do check /payload/bare /payload/$kernel /payload/initramfs.cpio; done; done\n\
    check /payload/bare /payload/vmlinux /payload/initramfs.cpio --cpus 4\n\
    check /payload/bare /payload/vmlinux /payload/initramfs.cpio --memory 3500\n\
    check /payload/bare /payload/vmlinux /payload/initramfs.cpio --memory 64\n\
    check /payload/bare /payload/vmlinux /payload/initramfs.cpio --append end=panic\n\
    grep -aq 'Kernel panic' /tmp/console\n";

/// The program that sends bytes over bare vsock: static, because it also runs in guests.
fn vsock(build: binaries::Arguments) -> Result<PathBuf> {
    let profile = if build.fast { "dev" } else { "vm" };
    let mut cargo = binaries::cargo();
    cargo.env("RUSTFLAGS", binaries::STATIC_FLAGS);
    let words =
        ["build", "--package", "msb-guest", "--example", "vsock", "--profile", profile, "--target", binaries::TARGET];
    compiled_by(cargo, &words)
}

/// Compiles with cargo and returns the one executable that comes of it.
fn compiled(words: &[&str]) -> Result<PathBuf> {
    compiled_by(binaries::cargo(), words)
}

fn compiled_by(mut cargo: Command, words: &[&str]) -> Result<PathBuf> {
    cargo.args(words).args(["--locked", "--message-format", "json-render-diagnostics"]);
    let text = program::output(&mut cargo)?;
    // The last one named is the one that was asked for; its dependencies' build programs come before it.
    let mut executables = text.lines().rev().filter_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(PathBuf::from(message.get("executable")?.as_str()?))
    });
    executables.next().with_context(|| format!("cargo {} made no executable", words.join(" ")))
}

/// A word that a shell takes as it is.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Copies a file, or a folder with everything in it; links become what they point at.
fn copy(from: &Path, to: &Path) -> Result<()> {
    program::output(program::command("cp").args(["--recursive", "--dereference", "--preserve=mode"]).arg(from).arg(to))
        .map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_reach_the_shell_in_one_piece() {
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
    }
}
