//! The figures of images: loading, pulling and merging beside what the usual tools take for the same, memory and disk.
//!
//! `skopeo copy` and `umoci unpack` together are what others need before they can boot from a tree. Both sides begin without the image
//! and end with everything in the page cache; nobody waits for the disk.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{Row, Running, median, succeed, timed};
use crate::home::Home;
use crate::{binaries, cache, debian, images, program};

/// Layers of the large image that the images of the sharing rows have too.
const SHARED: usize = 7;
/// Images that share them.
const SHARING: usize = 10;
/// Bytes of the layer that each has of its own.
const OWN_BYTES: usize = 4 << 20;
/// Files of the image that is merged.
const FILES: usize = 40_000;

/// Measures all rows.
pub(super) fn rows(tree: &Path, rounds: usize) -> Result<Vec<Row>> {
    debian::ensure(&[debian::CHECK, debian::IMAGES])?;
    let work = tempfile::Builder::new().prefix("bench-images-").tempdir_in(cache::target())?;
    let work = work.path();
    println!("making an image of eight layers");
    let layers = images::large::layers(&images::python()?.join("python.tar"), work)?;
    let mib = layers.iter().map(Vec::len).sum::<usize>() >> 20;
    let archive = work.join("large.tar");
    images::large::write(layers.clone(), "large:1", &archive)?;
    let mut rows = loading(tree, &archive, mib, work, rounds)?;
    rows.push(pulling(tree, &archive, mib, work, rounds)?);
    rows.extend(sharing(tree, &layers[..SHARED], work, rounds)?);
    drop(layers);
    rows.push(merging(work, rounds)?);
    Ok(rows)
}

fn words<'a>(list: &[&'a str]) -> Vec<&'a str> {
    list.to_vec()
}

/// The peers: copy into a layout, unpack it. Time of both.
fn by_peers(source: &str, work: &Path) -> Result<Duration> {
    let (layout, bundle) = (work.join("layout"), work.join("bundle"));
    let mut copy = Command::new("skopeo");
    copy.args(["--insecure-policy", "copy", "-q", "--src-tls-verify=false", source])
        .arg(format!("oci:{}:large", layout.display()));
    let mut unpack = Command::new("umoci");
    unpack.args(["unpack", "--image"]).arg(format!("{}:large", layout.display())).arg(&bundle);
    let took = timed(&mut copy, Some(0))? + timed(&mut unpack, Some(0))?;
    std::fs::remove_dir_all(&layout)?;
    std::fs::remove_dir_all(&bundle)?;
    Ok(took)
}

/// Leaves the store as it was before anything was loaded.
fn empty(home: &Home) -> Result<()> {
    succeed(&mut home.msb(&words(&["image", "prune", "--yes", "--all"])))
}

fn versus(what: String, ours: Vec<Duration>, peers: Vec<Duration>) -> Row {
    let (ours, peers) = (median(ours), median(peers));
    let ratio = peers.as_secs_f64() / ours.as_secs_f64();
    Row {
        what,
        measured: format!("{:.2} s; {:.2} s; {ratio:.1} times", ours.as_secs_f64(), peers.as_secs_f64()),
        promise: "2 times faster",
        holds: ratio >= 2.0,
    }
}

fn loading(tree: &Path, archive: &Path, mib: usize, work: &Path, rounds: usize) -> Result<Vec<Row>> {
    let home = Home::new("bench-load", tree)?;
    succeed(&mut home.msb(&["image", "ls"]))?;
    let path = archive.to_string_lossy().into_owned();
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    let daemon = *home.running("msbd").first().context("the daemon does not run")?;
    let mut peak = 0.0;
    for round in 0..rounds {
        ours.push(timed(&mut home.msb(&["image", "load", "-q", "-i", &path]), Some(0))?);
        if round == 0 {
            peak = peak_mib(daemon)?;
        }
        empty(&home)?;
        peers.push(by_peers(&format!("docker-archive:{path}"), work)?);
    }
    Ok(vec![
        versus(format!("load a docker archive of {mib} MiB in 8 layers; skopeo and umoci"), ours, peers),
        Row {
            what: format!("msbd while it loads {mib} MiB: memory at most"),
            measured: format!("{peak:.0} MiB"),
            promise: "under 64 MiB",
            holds: peak < 64.0,
        },
    ])
}

/// The most memory that a process ever had in use.
pub(super) fn peak_mib(pid: i32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kibibytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes / 1024.0)
}

fn pulling(tree: &Path, archive: &Path, mib: usize, work: &Path, rounds: usize) -> Result<Row> {
    let registry = Registry::start(work)?;
    let reference = format!("{}/large:1", registry.host);
    let mut push = Command::new("skopeo");
    push.args(["--insecure-policy", "copy", "-q", "--dest-tls-verify=false"])
        .arg(format!("docker-archive:{}", archive.display()))
        .arg(format!("docker://{reference}"));
    program::output(&mut push)?;
    let home = Home::new("bench-pull", tree)?;
    succeed(&mut home.msb(&["image", "ls"]))?;
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        ours.push(timed(&mut home.msb(&["pull", "-q", &reference]), Some(0))?);
        empty(&home)?;
        peers.push(by_peers(&format!("docker://{reference}"), work)?);
    }
    Ok(versus(format!("pull the same {mib} MiB from a registry on loopback; skopeo and umoci"), ours, peers))
}

/// Debian's registry on loopback.
struct Registry {
    host: String,
    /// Serves as long as this is there.
    _serving: Running,
}

impl Registry {
    fn start(work: &Path) -> Result<Self> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let host = format!("127.0.0.1:{port}");
        let settings = work.join("registry.yml");
        let data = work.join("registry");
        std::fs::write(
            &settings,
            format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {host}\n",
                data.display()
            ),
        )?;
        let mut serve = Command::new("docker-registry");
        serve.arg("serve").arg(&settings).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let registry = Self { _serving: Running(serve.spawn().context("docker-registry")?), host };
        let began = Instant::now();
        while std::net::TcpStream::connect(&registry.host).is_err() {
            if began.elapsed() > Duration::from_secs(60) {
                bail!("the registry does not come up");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(registry)
    }
}

/// A layer of bytes that nobody else has.
fn own_layer(work: &Path) -> Result<Vec<u8>> {
    let root = work.join("own");
    std::fs::create_dir_all(&root)?;
    let mut random = std::io::Read::take(std::fs::File::open("/dev/urandom")?, OWN_BYTES as u64);
    std::io::copy(&mut random, &mut std::fs::File::create(root.join("own"))?)?;
    let layer = images::large::packed(&root)?;
    std::fs::remove_dir_all(&root)?;
    Ok(layer)
}

/// Images that have seven large layers in common and one of their own.
fn sharing(tree: &Path, shared: &[Vec<u8>], work: &Path, rounds: usize) -> Result<Vec<Row>> {
    let home = Home::new("bench-share", tree)?;
    let archive = work.join("sharing.tar");
    let path = archive.to_string_lossy().into_owned();
    let load = || timed(&mut home.msb(&["image", "load", "-q", "-i", &path]), Some(0));
    let (mut second, mut own) = (Vec::new(), Vec::new());
    let mut used = Vec::new();
    for number in 0..SHARING.max(rounds + 1) {
        // The own layer alone, as an image: the same work without the others.
        images::large::write(vec![own_layer(work)?], &format!("alone{number}:1"), &archive)?;
        own.push(load()?);
        succeed(&mut home.msb(&["image", "rm", &format!("alone{number}:1")]))?;
        succeed(&mut home.msb(&words(&["image", "prune", "--yes", "--filter", "label=none"])))?;
        let layers = shared.iter().cloned().chain([own_layer(work)?]).collect();
        images::large::write(layers, &format!("image{number}:1"), &archive)?;
        second.push(load()?);
        used.push(disk_bytes(&home.path().join("images"))?);
    }
    let count = second.len();
    let (first, second) = (second[0], median(second[1..].to_vec()));
    let own = median(own);
    let more = second.saturating_sub(own);
    // Its own layer twice (blob and data file), the merged metadata, manifest, configuration and record.
    let growth = (used[count - 1] - used[0]) / (count as u64 - 1);
    let metadata = metadata_bytes(&home.path().join("images/roots/v1"))?;
    let expected = 2 * OWN_BYTES as u64 + metadata + (256 << 10);
    Ok(vec![
        Row {
            what: format!("load an image that shares 7 of 8 layers (the first took {:.2} s)", first.as_secs_f64()),
            measured: format!(
                "{} ms; own layer alone {} ms; {} ms more",
                second.as_millis(),
                own.as_millis(),
                more.as_millis()
            ),
            promise: "own layer plus 50 ms",
            holds: more <= Duration::from_millis(50),
        },
        Row {
            what: format!("disk of {count} images that share 7 layers: what each adds to {} MiB", used[0] >> 20),
            measured: format!("{:.1} MiB, of that {} MiB its own layer", mebibytes(growth), OWN_BYTES >> 20),
            promise: "shared layers once",
            holds: growth <= expected,
        },
    ])
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Bytes that the files of a folder take.
fn disk_bytes(folder: &Path) -> Result<u64> {
    let text = program::output(program::command("du").args(["-s", "-B1"]).arg(folder))?;
    Ok(text.split_whitespace().next().context("du")?.parse()?)
}

/// The largest file of a folder.
fn metadata_bytes(folder: &Path) -> Result<u64> {
    let mut largest = 0;
    for entry in std::fs::read_dir(folder)? {
        largest = largest.max(entry?.metadata()?.len());
    }
    Ok(largest)
}

/// The metadata image of known layers against making an EROFS image of the unpacked tree.
fn merging(work: &Path, rounds: usize) -> Result<Row> {
    let root = work.join("tree");
    for number in 0..FILES {
        let folder = root.join(format!("usr/lib/folder{}/part{}", number % 40, number % 400 / 40));
        if number < 400 {
            std::fs::create_dir_all(&folder)?;
        }
        std::fs::write(folder.join(format!("file{number}")), vec![b'x'; 200 + number % 3_000])?;
    }
    let archive = work.join("files.tar");
    images::large::write(vec![images::large::packed(&root)?, own_layer(work)?], "files:1", &archive)?;
    let mut merge = binaries::cargo();
    merge.args(["bench", "--quiet", "--locked", "-p", "msb-image", "--bench", "merge", "--"]);
    let text = program::output(merge.arg(&archive).arg(rounds.to_string()))?;
    let microseconds: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("merged in microseconds: "))
        .context("the bench printed no time")?
        .trim()
        .parse()?;
    let ours = Duration::from_micros(microseconds);
    let target: PathBuf = work.join("tree.erofs");
    let mut peers = Vec::new();
    for _ in 0..rounds {
        let _ = std::fs::remove_file(&target);
        peers.push(timed(Command::new("mkfs.erofs").arg("--quiet").arg(&target).arg(&root), Some(0))?);
    }
    let peers = median(peers);
    let ratio = peers.as_secs_f64() / ours.as_secs_f64();
    Ok(Row {
        what: format!("merged metadata of {FILES} files, layers known; mkfs.erofs of the tree"),
        measured: format!("{} ms; {} ms; {ratio:.0} times", ours.as_millis(), peers.as_millis()),
        promise: "20 times faster",
        holds: ratio >= 20.0,
    })
}
