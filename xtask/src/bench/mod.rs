//! `cargo xtask bench`: what a user waits for, measured on this machine in pairs.
//!
//! Absolute times say more about the machine than about the program, so each figure stands beside something everybody knows, run in
//! turn on the same machine: the same QEMU by hand, `tar xf`. The median of the rounds counts. Nothing here fails a build; the table says whether a
//! promise holds.
//!
//! With `--exact` the same for engine kvm, in the lab's clock ([`exact`]).

mod by_hand;
mod disks;
mod exact;
mod images;
mod metrics;
mod network;
mod sessions;
mod supervision;
pub(crate) mod written;

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::home::Home;
use crate::{binaries, cache, debian, images as test_images, install, program, sdk};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How often each pair is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How many sandboxes idle while the daemon is measured
    #[arg(long, default_value_t = 20)]
    sandboxes: usize,
    /// Measure only this part (repeatable): boot, disks, images, metrics, network, sessions, supervision
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
    /// Programs that are installed already, in place of building this tree's: a folder with bin/ and share/
    #[arg(long, value_name = "FOLDER", conflicts_with = "exact")]
    tree: Option<std::path::PathBuf>,
    /// Engine kvm in the lab that counts instructions, beside the peers' figures from there
    #[arg(long)]
    exact: bool,
    /// With --exact: only these rows, by their keys, as in hello,exec_out
    #[arg(long, value_name = "KEYS", value_delimiter = ',', requires = "exact")]
    rows: Vec<String>,
    /// With --exact: measure what `cargo xtask test` compares, and write it down anew
    #[arg(long, requires = "exact", conflicts_with = "rows")]
    write_down: bool,
    /// The SDKs: a command through each beside the raw API, and from creation to the first byte beside `msb run`
    #[arg(long, conflicts_with = "exact")]
    sdks: bool,
    #[command(flatten)]
    build: binaries::Arguments,
}

/// A program that runs until this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A line of the result.
struct Row {
    what: String,
    measured: String,
    promise: &'static str,
    holds: bool,
}

impl Row {
    /// Says it at once: what has been measured is not lost when something later fails.
    fn told(self) -> Self {
        println!("  {}: {}", self.what, self.measured);
        self
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.write_down {
        return written::write_down();
    }
    if arguments.exact {
        return exact::run(arguments.build, &arguments.rows);
    }
    if arguments.sdks {
        let rows = sdk::measure::pairs(arguments.build, arguments.rounds)?;
        print(&rows.into_iter().map(Row::from).collect::<Vec<_>>());
        return Ok(());
    }
    debian::ensure(&[debian::BUILD, debian::RUN])?;
    let tree = match &arguments.tree {
        Some(tree) => std::fs::canonicalize(tree).with_context(|| format!("cannot use {}", tree.display()))?,
        None => {
            let tree = cache::development_tree();
            install::install(&tree, arguments.build)?;
            tree
        }
    };
    const PARTS: [&str; 7] = ["boot", "disks", "images", "metrics", "network", "sessions", "supervision"];
    if let Some(unknown) = arguments.only.iter().find(|name| !PARTS.contains(&name.as_str())) {
        bail!("there is no part {unknown}; there are: {}", PARTS.join(", "));
    }
    let wanted = |part: &str| arguments.only.is_empty() || arguments.only.iter().any(|name| name == part);
    let rounds = arguments.rounds.max(1);
    let mut rows = Vec::new();
    if wanted("boot") {
        rows.extend(boot(&tree, rounds, arguments.sandboxes)?);
    }
    if wanted("disks") {
        rows.extend(disks::rows(&tree, rounds)?);
    }
    if wanted("images") {
        rows.extend(images::rows(&tree, rounds)?);
    }
    if wanted("metrics") {
        rows.extend(metrics::rows(&tree)?);
    }
    if wanted("network") {
        rows.extend(network::rows(&tree, rounds)?);
    }
    if wanted("sessions") {
        rows.extend(sessions::rows(&tree, rounds)?);
    }
    if wanted("supervision") {
        rows.extend(supervision::rows(&tree, rounds)?);
    }
    print(&rows);
    Ok(())
}

fn print(rows: &[Row]) {
    println!("\n{:<64} {:>24}  {:<22} holds", "what", "measured", "promise");
    for row in rows {
        println!("{:<64} {:>24}  {:<22} {}", row.what, row.measured, row.promise, if row.holds { "yes" } else { "NO" });
    }
}

impl From<sdk::measure::Pair> for Row {
    fn from(pair: sdk::measure::Pair) -> Self {
        let (ours, other) = (pair.ours.as_secs_f64() * 1000.0, pair.other.as_secs_f64() * 1000.0);
        let ratio = ours / other;
        Self {
            what: pair.what,
            measured: format!("{ours:.1} ms; {other:.1} ms; {ratio:.2}"),
            promise: if pair.ratio_max < 1.5 { "at most 5 % above" } else { "at most 1.5 times" },
            holds: ratio <= pair.ratio_max,
        }
    }
}

/// A sandbox's start and rest.
fn boot(tree: &Path, rounds: usize, sandboxes: usize) -> Result<Vec<Row>> {
    let home = Home::new("bench", tree)?;
    let archive = test_images::small()?.join("busybox.tar");
    succeed(&mut home.msb(&["image", "load", "-i", &archive.to_string_lossy()]))?;
    let mut rows = vec![cold_start(&home, tree, rounds)?];
    rows.extend(loading(&home)?);
    rows.extend(idle(&home, sandboxes)?);
    Ok(rows)
}

/// `msb run busybox -- true` against the same QEMU, kernel and initramfs started by hand. By hand there is no agent link, so the agent
/// gives up and the machine resets: the same boot, without disks and without an answer.
fn cold_start(home: &Home, tree: &Path, rounds: usize) -> Result<Row> {
    let (mut ours, mut by_hand) = (Vec::new(), Vec::new());
    for _ in 0..rounds.max(1) {
        by_hand.push(timed(&mut boot_by_hand(tree), None)?);
        ours.push(timed(&mut home.msb(&["run", "busybox", "--", "true"]), Some(0))?);
    }
    let (ours, by_hand) = (median(ours), median(by_hand));
    let ratio = ours.as_secs_f64() / by_hand.as_secs_f64();
    Ok(Row {
        what: "run busybox -- true; QEMU by hand with the same kernel and initramfs".to_owned(),
        measured: format!("{:.2} s; {:.2} s; {ratio:.2}", ours.as_secs_f64(), by_hand.as_secs_f64()),
        promise: "at most 1.5 times",
        holds: ratio <= 1.5,
    })
}

fn boot_by_hand(tree: &Path) -> Command {
    let share = tree.join("share/msb");
    let mut command = Command::new("timeout");
    command
        .args([
            "--signal=KILL",
            "60",
            "qemu-system-x86_64",
            "-M",
            "microvm,acpi=off",
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-m",
            "512",
        ])
        .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio"])
        .arg("-kernel")
        .arg(share.join("vmlinux"))
        .arg("-initrd")
        .arg(share.join("initramfs.cpio"))
        .args(["-append", "console=ttyS0 quiet panic=-1 oops=panic reboot=t init_on_alloc=1 tsc=reliable"])
        .stdin(Stdio::null());
    command
}

/// Loading an archive of 200 MiB against unpacking its layers with tar to the same disk; then loading it again.
fn loading(home: &Home) -> Result<Vec<Row>> {
    const LAYERS: usize = 4;
    const LAYER_MIB: usize = 50;
    let work = home.path().join("loading");
    let (content, layers) = (work.join("content"), work.join("layers"));
    std::fs::create_dir_all(&layers)?;
    // Files of mixed sizes with bytes that do not compress, as in images of programs.
    let mut random = std::fs::File::open("/dev/urandom")?;
    let mut manifest_layers = Vec::new();
    let mut diff_ids = Vec::new();
    for layer in 0..LAYERS {
        let folder = content.join(format!("layer{layer}"));
        std::fs::create_dir_all(&folder)?;
        let mut left = LAYER_MIB << 20;
        for index in 0.. {
            let size = left.min([4 << 10, 64 << 10, 1 << 20, 300 << 10][index % 4]);
            let mut file = std::fs::File::create(folder.join(format!("file{index}")))?;
            std::io::copy(&mut std::io::Read::take(&mut random, size as u64), &mut file)?;
            left -= size;
            if left == 0 {
                break;
            }
        }
        let tar = layers.join(format!("{layer}.tar"));
        program::output(
            program::command("tar").arg("-C").arg(&content).arg("-cf").arg(&tar).arg(format!("layer{layer}")),
        )?;
        let digest = program::output(program::command("sha256sum").arg(&tar))?;
        diff_ids.push(format!("\"sha256:{}\"", digest.split(' ').next().unwrap_or_default()));
        manifest_layers.push(format!("\"{layer}.tar\""));
    }
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
        diff_ids.join(",")
    );
    std::fs::write(layers.join("config.json"), config)?;
    let manifest =
        format!(r#"[{{"Config":"config.json","RepoTags":["large:latest"],"Layers":[{}]}}]"#, manifest_layers.join(","));
    std::fs::write(layers.join("manifest.json"), manifest)?;
    let archive = work.join("large.tar");
    program::output(program::command("tar").arg("-C").arg(&layers).arg("-cf").arg(&archive).arg("."))?;
    std::fs::remove_dir_all(&content)?;

    let unpacked = work.join("unpacked");
    std::fs::create_dir_all(&unpacked)?;
    let mut unpack = Command::new("sh");
    unpack
        .arg("-c")
        .arg("for layer in \"$1\"/*.tar; do tar -xf \"$layer\" -C \"$2\"; done; sync -f \"$2\"")
        .arg("sh")
        .arg(&layers)
        .arg(&unpacked);
    let by_tar = timed(&mut unpack, Some(0))?;
    let archive = archive.to_string_lossy().into_owned();
    let first = timed(&mut home.msb(&["image", "load", "-q", "-i", &archive]), Some(0))?;
    let again = timed(&mut home.msb(&["image", "load", "-q", "-i", &archive]), Some(0))?;
    std::fs::remove_dir_all(&work)?;
    let (ratio, part) = (first.as_secs_f64() / by_tar.as_secs_f64(), again.as_secs_f64() / first.as_secs_f64());
    Ok(vec![
        Row {
            what: "load a 200 MiB archive; tar xf of its layers".to_owned(),
            measured: format!("{:.2} s; {:.2} s; {ratio:.2}", first.as_secs_f64(), by_tar.as_secs_f64()),
            promise: "at most 1.5 times",
            holds: ratio <= 1.5,
        },
        Row {
            what: "load it again".to_owned(),
            measured: format!("{:.2} s; {:.0} %", again.as_secs_f64(), part * 100.0),
            promise: "under 5 %",
            holds: part < 0.05,
        },
    ])
}

/// What idle sandboxes cost: private memory of `msb-vmm` outside the guest, memory and processor time of the daemon.
fn idle(home: &Home, sandboxes: usize) -> Result<Vec<Row>> {
    for index in 0..sandboxes {
        print!("\rstarting sandbox {} of {sandboxes}", index + 1);
        std::io::stdout().flush()?;
        succeed(&mut home.msb(&["create", "-m", "128M", "--name", &format!("idle{index}"), "busybox"]))?;
    }
    println!();
    let daemon = *home.running("msbd").first().context("the daemon does not run")?;
    let machines = home.running("msb-vmm");
    std::thread::sleep(Duration::from_secs(3));
    let before = processor_time(daemon)?;
    const WATCHED: Duration = Duration::from_secs(20);
    std::thread::sleep(WATCHED);
    let share = (processor_time(daemon)? - before).as_secs_f64() / WATCHED.as_secs_f64();
    let memory = memory_mib(daemon, &["Rss:"])?;
    let mut machine = Vec::new();
    for pid in &machines {
        machine.push(memory_mib(*pid, &["Private_Clean:", "Private_Dirty:"])?);
    }
    let largest = machine.iter().copied().fold(0.0, f64::max);
    let restart = restart_after_kill(home)?;
    Ok(vec![
        Row {
            what: format!("msb-vmm (engine qemu): private memory, largest of {}", machine.len()),
            measured: format!("{largest:.1} MiB"),
            promise: "at most 5 MiB",
            holds: !machine.is_empty() && largest <= 5.0,
        },
        Row {
            what: format!("msbd with {sandboxes} idle sandboxes: resident memory"),
            measured: format!("{memory:.1} MiB"),
            promise: "under 30 MiB",
            holds: memory < 30.0,
        },
        Row {
            what: format!("msbd with {sandboxes} idle sandboxes: processor"),
            measured: format!("{:.2} % of a core", share * 100.0),
            promise: "under 1 % of a core",
            holds: share < 0.01,
        },
        Row {
            what: "from kill -9 of a machine to its next process, less the back-off".to_owned(),
            measured: format!("{} ms", restart.as_millis()),
            promise: "under 150 ms",
            holds: restart < Duration::from_millis(150),
        },
    ])
}

/// Kills one VM process and waits for a new one; the first back-off of 100 ms is taken off.
fn restart_after_kill(home: &Home) -> Result<Duration> {
    const BACK_OFF: Duration = Duration::from_millis(100);
    let before = home.running("msb-vmm");
    let victim = before.first().and_then(|pid| rustix::process::Pid::from_raw(*pid)).context("no machine runs")?;
    let began = Instant::now();
    rustix::process::kill_process(victim, rustix::process::Signal::KILL)?;
    while home.running("msb-vmm").iter().all(|pid| before.contains(pid)) {
        if began.elapsed() > Duration::from_secs(60) {
            bail!("a killed machine is not started again");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(began.elapsed().saturating_sub(BACK_OFF))
}

/// Time used by all threads of a process (proc(5): fields 14 and 15 of `stat`, in hundredths of a second).
fn processor_time(pid: i32) -> Result<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = text.rsplit_once(')').context("an odd stat file")?.1.split_whitespace().collect();
    let ticks = |index: usize| -> Result<u64> { Ok(fields.get(index).context("a short stat file")?.parse()?) };
    Ok(Duration::from_millis((ticks(11)? + ticks(12)?) * 10))
}

fn memory_mib(pid: i32, fields: &[&str]) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let kibibytes: f64 = text
        .lines()
        .filter_map(|line| {
            let rest = fields.iter().find_map(|field| line.strip_prefix(field))?;
            rest.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok()
        })
        .sum();
    Ok(kibibytes / 1024.0)
}

fn succeed(command: &mut Command) -> Result<()> {
    program::output(command).map(|_| ())
}

/// Wall time of a command; with a code, it must end with that.
fn timed(command: &mut Command, code: Option<i32>) -> Result<Duration> {
    let began = Instant::now();
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().context("cannot start")?;
    let took = began.elapsed();
    if code.is_some() && status.code() != code {
        bail!("{:?} ended with {status}", command.get_args().collect::<Vec<_>>());
    }
    Ok(took)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// [`median`], of numbers.
fn middle(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_of_the_sorted() {
        let seconds = |list: &[u64]| list.iter().copied().map(Duration::from_secs).collect::<Vec<_>>();
        assert_eq!(median(seconds(&[9, 1, 5])), Duration::from_secs(5));
    }

    #[test]
    fn our_own_processor_time_and_memory_can_be_read() {
        let pid = i32::try_from(std::process::id()).expect("a process id");
        processor_time(pid).expect("processor time");
        assert!(memory_mib(pid, &["Rss:"]).expect("memory") > 1.0);
    }
}
