//! The figures of disks and shared directories, beside QEMU's own virtio-blk and virtiofsd with the same kernel and the
//! same programs (`by_hand`), and what a fresh root disk costs the host.
//!
//! Blocks are read and written past the guest's page cache (O_DIRECT); the host's is the same for both sides. Times are
//! the guest's.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::by_hand::{ByHand, LOAD, load_program};
use super::{Row, Running, median, middle, succeed};
use crate::home::Home;
use crate::{cache, debian, images, program};

/// Size of the file that blocks are read from and written to.
const FILE_MIB: u32 = 256;
/// Files of the archive that is unpacked. The peer keeps a descriptor for each that its guest remembers, so that a host which allows
/// fewer descriptors gets [`ARCHIVED_FEW`].
const ARCHIVED: usize = 20_000;
const ARCHIVED_FEW: usize = 10_000;
/// Files of the repository that is cloned.
const COMMITTED: usize = 2_000;
/// Fresh disks that are made.
const FRESH: usize = 20;

/// One access pattern: what it is called, and its words for the load program.
struct Access {
    what: &'static str,
    words: &'static str,
}

const fn access(what: &'static str, words: &'static str) -> Access {
    Access { what, words }
}

/// The patterns: access, order, block in bytes, how many.
const ACCESSES: [Access; 6] = [
    access("4 KiB random read", "read random 4096 4000"),
    access("4 KiB random write", "write random 4096 4000"),
    access("4 KiB random write, each with fsync", "sync random 4096 300"),
    access("1 MiB sequential read", "read sequential 1048576 512"),
    access("1 MiB sequential write", "write sequential 1048576 512"),
    access("1 MiB sequential write, each with fsync", "sync sequential 1048576 128"),
];

/// Where Debian keeps its virtiofsd: with QEMU up to 12, then in a package of its own.
const VIRTIOFSD: [&str; 2] = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];

/// Measures all rows.
pub(super) fn rows(tree: &Path, rounds: usize) -> Result<Vec<Row>> {
    debian::ensure(&[debian::IMAGES, debian::DISKS])?;
    let work = tempfile::Builder::new().prefix("bench-disks-").tempdir_in(cache::target())?;
    let home = Home::new("bench-disks", tree)?;
    let archive = images::tools()?.join("tools.tar");
    succeed(&mut home.msb(&["image", "load", "-q", "-i", &archive.to_string_lossy()]))?;
    let mut rows = vec![fresh(&home)?];
    rows.extend(blocks(&home, tree, work.path(), rounds)?);
    rows.extend(shared(&home, tree, work.path(), rounds)?);
    Ok(rows)
}

/// Nanoseconds that the load program printed.
fn duration(text: &str) -> Result<Duration> {
    let nanoseconds = text.trim().parse().with_context(|| format!("no time: {text}"))?;
    Ok(Duration::from_nanos(nanoseconds))
}

/// What a line of a shell prints in our sandbox.
fn ask(home: &Home, line: &str) -> Result<String> {
    program::output(&mut home.msb(&["exec", "box", "--", "sh", "-c", line]))
}

/// A sandbox called `box` that both programs are in.
fn sandbox(home: &Home, words: &[&str]) -> Result<()> {
    let create = ["create", "--name", "box", "-m", "1G", "-c", "1"];
    succeed(&mut home.msb(&[&create[..], words, &["tools"]].concat()))?;
    succeed(&mut home.msb(&["cp", "-q", &load_program()?.to_string_lossy(), &format!("box:{LOAD}")]))
}

/// A row of pairs. The ratio is the median of the pairs' own: what was measured one after the other had the same machine, which in another
/// minute has half its speed.
fn versus(what: String, [ours, peer]: [Vec<Duration>; 2]) -> Row {
    let ratio = middle(ours.iter().zip(&peer).map(|(ours, peer)| peer.as_secs_f64() / ours.as_secs_f64()).collect());
    let (ours, peer) = (median(ours), median(peer));
    Row {
        what,
        measured: format!("{:.2} s; {:.2} s; {ratio:.2} times", ours.as_secs_f64(), peer.as_secs_f64()),
        promise: "1.0 times or better",
        holds: ratio >= 1.0,
    }
    .told()
}

/// Puts an overlay with its upper layer on the root disk in the place where the peer writes.
const OVERLAY: &str = "cd /mnt && mkdir lower upper work && \
    mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay /root";

/// Reads and writes of the root disk.
fn blocks(home: &Home, tree: &Path, work: &Path, rounds: usize) -> Result<Vec<Row>> {
    sandbox(home, &[])?;
    let mut peer = ByHand::start(tree, work, false, &[])?;
    // What is compared is the disk: both write through an overlay, as a sandbox's root is one.
    peer.shell(OVERLAY)?;
    let mut rows = Vec::new();
    for Access { what, words } in ACCESSES {
        let line = format!("{LOAD} disk /root/load {FILE_MIB} {words}");
        let mut took = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            took[0].push(duration(&ask(home, &line)?)?);
            took[1].push(duration(&peer.shell(&line)?)?);
        }
        rows.push(versus(format!("root disk: {what}; QEMU's virtio-blk"), took));
    }
    succeed(&mut home.msb(&["rm", "-f", "box"]))?;
    Ok(rows)
}

/// A clone and an unpacked archive on a shared directory.
fn shared(home: &Home, tree: &Path, work: &Path, rounds: usize) -> Result<Vec<Row>> {
    let folders = ["ours", "peer"].map(|side| work.join(side));
    let source = work.join("source");
    let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let few = descriptors.is_some_and(|most| most < 2 * ARCHIVED as u64);
    let archived = if few { ARCHIVED_FEW } else { ARCHIVED };
    files_below(&source.join("archived"), archived)?;
    files_below(&source.join("committed"), COMMITTED)?;
    for folder in &folders {
        std::fs::create_dir_all(folder)?;
        let mut make = program::command("sh");
        make.args(["-euc", MAKE_SHARED, "sh"]).arg(&source).arg(folder);
        program::output(&mut make)?;
    }
    let share = format!("{}:/shared", folders[0].display());
    sandbox(home, &["-v", &share])?;
    let daemon = Virtiofsd::start(&folders[1], work)?;
    let words = daemon.words();
    let mut peer = ByHand::start(tree, work, true, &words)?;
    peer.shell("mount -t virtiofs shared /shared")?;
    let works = [
        (
            format!("git clone of {COMMITTED} files on a shared directory; QEMU's virtiofsd"),
            "git clone -q /shared/repo /shared/out",
        ),
        (
            format!("tar x of {archived} small files on a shared directory; QEMU's virtiofsd"),
            "tar -C /shared/out -xf /shared/files.tar",
        ),
    ];
    let mut rows = Vec::new();
    // Half a minute each under emulation: few times have to do.
    let rounds = rounds.min(3);
    for (what, line) in works {
        let mut took = [Vec::new(), Vec::new()];
        for round in 0..rounds {
            let line = line.replace("out", &format!("out{round}"));
            for folder in &folders {
                std::fs::create_dir_all(folder.join(format!("out{round}")))?;
            }
            // What was made by the host is not seen by the guests before they ask again.
            std::thread::sleep(Duration::from_secs(2));
            // Neither remembers files of the round before.
            let forget = "sync; echo 3 > /proc/sys/vm/drop_caches";
            ask(home, forget)?;
            peer.shell(forget)?;
            let line = format!("{LOAD} time {line}");
            took[0].push(duration(&ask(home, &line)?)?);
            took[1].push(duration(&peer.shell(&line)?)?);
            for folder in &folders {
                std::fs::remove_dir_all(folder.join(format!("out{round}")))?;
            }
        }
        rows.push(versus(what, took));
    }
    succeed(&mut home.msb(&["rm", "-f", "box"]))?;
    Ok(rows)
}

/// An archive and a repository of what is in the first folder, in the second.
const MAKE_SHARED: &str = r#"
tar -C "$1/archived" -cf "$2/files.tar" .
git init -q "$2/repo"
cp -r "$1/committed/." "$2/repo"
git -C "$2/repo" add .
git -C "$2/repo" -c user.name=bench -c user.email=bench@localhost commit -q -m files
git -C "$2/repo" gc -q
"#;

/// Small files in folders of a hundred.
fn files_below(folder: &Path, count: usize) -> Result<()> {
    for number in 0..count {
        let folder = folder.join(format!("folder{}", number / 100));
        if number % 100 == 0 {
            std::fs::create_dir_all(&folder)?;
        }
        let content = format!("file {number}\n").repeat(8 + number % 300);
        std::fs::write(folder.join(format!("file{number}")), content)?;
    }
    Ok(())
}

/// QEMU's server of shared directories, until it is dropped.
struct Virtiofsd {
    _daemon: Running,
    socket: PathBuf,
}

impl Virtiofsd {
    fn start(folder: &Path, work: &Path) -> Result<Self> {
        let found = VIRTIOFSD.iter().find(|path| Path::new(path).exists());
        let program =
            found.context("no virtiofsd here: it comes with qemu-system-common or as a package of its own")?;
        let socket = work.join("virtiofsd.sock");
        let mut daemon = program::command_as_root("setpriv")?;
        daemon.args(["--pdeathsig", "KILL", program]).arg(format!("--socket-path={}", socket.display()));
        daemon.args(["-o", &format!("source={},cache=auto", folder.display())]);
        let daemon = Running(daemon.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("virtiofsd")?);
        let began = Instant::now();
        while !socket.exists() {
            if began.elapsed() > Duration::from_secs(20) {
                bail!("virtiofsd does not come up");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { _daemon: daemon, socket })
    }

    /// QEMU's words for it.
    fn words(&self) -> Vec<String> {
        let socket = self.socket.display().to_string().replace(',', ",,");
        [
            "-chardev",
            &format!("socket,id=fs,path={socket}"),
            "-device",
            "vhost-user-fs-device,chardev=fs,tag=shared,queue-size=512",
        ]
        .map(str::to_owned)
        .to_vec()
    }
}

/// A fresh root disk: the time that the service's own log says it took, and the programs that a create starts.
fn fresh(home: &Home) -> Result<Row> {
    succeed(&mut home.msb(&["self", "stop", "--sandboxes"]))?;
    let settings = home.path().join("config.toml");
    std::fs::write(&settings, "log_level = \"debug\"\n")?;
    let create = |name: &str| {
        succeed(&mut home.msb(&["create", "-q", "-m", "128M", "--root-size", "8G", "--name", name, "tools"]))?;
        succeed(&mut home.msb(&["rm", "-f", name]))
    };
    for number in 0..FRESH {
        create(&format!("fresh{number}"))?;
    }
    let took = disk_times(home)?;
    if took.len() != FRESH {
        bail!("the service's log tells of {} disks", took.len());
    }
    let took = median(took);
    let programs = programs_started(home, || create("traced"))?;
    if !programs.iter().any(|program| program.starts_with("qemu")) {
        bail!("the trace does not show QEMU: {programs:?}");
    }
    let made_by_a_program = programs.iter().any(|program| program.contains("mkfs") || program.contains("mke2fs"));
    std::fs::remove_file(&settings)?;
    succeed(&mut home.msb(&["self", "stop", "--sandboxes"]))?;
    Ok(Row {
        what: format!("create with a fresh 8 GiB root: the disk (programs started: {})", programs.join(", ")),
        measured: format!("{:.2} ms", took.as_secs_f64() * 1000.0),
        promise: "under 3 ms, no mkfs",
        holds: took < Duration::from_millis(3) && !made_by_a_program,
    })
}

/// What the service's log says of writable disks (`actors/src/images/store.rs`).
fn disk_times(home: &Home) -> Result<Vec<Duration>> {
    let log = std::fs::read_to_string(home.path().join("msbd.log"))?;
    let lines = log.lines().filter(|line| line.contains("writable disk made"));
    lines
        .map(|line| {
            let (_, time) = line.split_once("took_us=").context("a line without its time")?;
            let digits: String = time.chars().take_while(char::is_ascii_digit).collect();
            Ok(Duration::from_micros(digits.parse()?))
        })
        .collect()
}

/// The programs that the service and its children start meanwhile, each once.
fn programs_started(home: &Home, work: impl FnOnce() -> Result<()>) -> Result<Vec<String>> {
    let daemon = *home.running("msbd").first().context("the daemon does not run")?;
    let trace = home.path().join("trace");
    let mut tracer = program::command_as_root("strace")?;
    tracer.args(["-f", "-qq", "-e", "trace=execve", "-e", "status=successful", "-o"]).arg(&trace);
    let mut tracer = tracer.args(["-p", &daemon.to_string()]).spawn().context("strace")?;
    let began = Instant::now();
    while std::fs::read_to_string(format!("/proc/{daemon}/status"))?.contains("TracerPid:\t0\n") {
        if began.elapsed() > Duration::from_secs(20) {
            bail!("strace does not attach");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    // The other threads of the service follow at once.
    std::thread::sleep(Duration::from_millis(500));
    let outcome = work();
    // Asked and not killed: a killed tracer takes its tracees' stops with it.
    let pid = rustix::process::Pid::from_raw(i32::try_from(tracer.id())?).context("no id")?;
    rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
    tracer.wait()?;
    outcome?;
    let text = std::fs::read_to_string(&trace)?;
    let mut programs: Vec<String> = text.lines().filter_map(executed).collect();
    programs.sort();
    programs.dedup();
    Ok(programs)
}

/// The program's name in a line of strace: `123 execve("/usr/bin/true", ["true"], …) = 0`.
fn executed(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("execve(\"")?;
    let (path, words) = rest.split_once('"')?;
    // A program that starts itself again is known by its words.
    let path = if path == "/proc/self/exe" { words.split('"').nth(1)? } else { path };
    Some(path.rsplit('/').next()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_read_from_a_trace() {
        let line = r#"12 execve("/usr/bin/qemu-system-x86_64", ["qemu", "-M"], 0x7 /* 0 vars */) = 0"#;
        assert_eq!(executed(line).as_deref(), Some("qemu-system-x86_64"));
        assert_eq!(executed("12 +++ exited with 0 +++"), None);
    }
}
