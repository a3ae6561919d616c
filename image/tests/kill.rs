//! `kill -9` at every step of a pull and of a load: the store is sound afterwards, and the next one goes on with what came.
//!
//! The work is done by this program started again, so that it can be killed; therefore it has no test harness.

#![expect(clippy::print_stdout, reason = "says how many steps there were")]

mod support;

use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use msb_image::registry::{PullOptions, Source, Trust};
use msb_image::{ImageReference, Store};
use support::archive::{self, Layer};
use support::registry::{Faults, Kind, Proxy, Registry};
use support::tools::have;
use support::{assert_sound, files_below, load_file};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// In its environment the killed program finds where its home is and what it does there.
const HOME: &str = "MSB_TEST_HOME";
const WORK: &str = "MSB_TEST_WORK";
/// Unfinished blobs below this many bytes are not worth keeping (`store/partial.rs`).
const WORTH_KEEPING_BYTES: u64 = 64 << 10;

/// Each step at which a pull changes the store. A new one belongs here.
const STEPS: &[&str] = &[
    "blob: open",
    "blob: a piece",
    "layer: make",
    "layer: contents",
    "layer: tree",
    "layer: name the blob",
    "layer: name the files",
    "document: write",
    "root: write",
    "image: name a blob",
    "image: name the root",
    "record: write",
    "record: name",
    "flush: a part",
    "flush: the record",
];

fn main() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    if let (Some(home), Ok(work)) = (std::env::var_os(HOME), std::env::var(WORK)) {
        return work_there(Path::new(&home), &work);
    }
    if !["docker-registry", "skopeo"].iter().all(|tool| have(tool)) {
        return;
    }
    pulls();
    loads();
}

/// What is killed: a pull of a reference, or a load of a file.
fn work_there(home: &Path, work: &str) {
    let store = Store::open(home).unwrap();
    match work.strip_prefix("file:") {
        Some(path) => drop(load_file(&store, Path::new(path)).unwrap()),
        None => pull(&store, work),
    }
    store.flush();
}

fn pull(store: &Store, reference: &str) {
    let runtime = Runtime::new().unwrap();
    let reference: ImageReference = reference.parse().unwrap();
    let origin = format!("http://{}", reference.registry());
    let options = PullOptions::new(vec![Source { origin, trust: Trust::default(), credential: None }]);
    store.pull(&reference, &options, runtime.handle().clone(), &CancellationToken::new(), &mut |_| {}).unwrap();
}

/// This program again, in a home of its own.
fn other_process(home: &Path, work: &str, variable: &str, value: &Path) -> ExitStatus {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(HOME, home).env(WORK, work).env(variable, value);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap()
}

/// The steps of this work when nobody ends it.
fn steps(work: &str) -> Vec<String> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("steps");
    let status = other_process(&directory.path().join("home"), work, "MSB_IMAGE_STEPS", &file);
    assert!(status.success(), "{status}");
    std::fs::read_to_string(file).unwrap().lines().map(str::to_owned).collect()
}

/// Bytes of blobs that the next pull need not fetch.
fn kept(home: &Path) -> u64 {
    let images = home.join("images");
    let files = ["partial", "blobs"].into_iter().flat_map(|folder| files_below(&images.join(folder)));
    let lengths = files.map(|path: PathBuf| std::fs::metadata(path).unwrap().len());
    lengths.filter(|length| *length >= WORTH_KEEPING_BYTES).sum()
}

/// Ends the work at each of its steps, each time in a new home; `again` does it once more and says what is expected of it.
fn at_every_step(work: &str, mut again: impl FnMut(&Store, u64)) -> Vec<String> {
    let steps = steps(work);
    for (index, step) in steps.iter().enumerate() {
        let directory = tempfile::tempdir().unwrap();
        let home = directory.path();
        let status = other_process(home, work, "MSB_IMAGE_KILL", Path::new(&(index + 1).to_string()));
        // Bytes do not come in the same pieces each time, so that one or two steps of the first run may be missing at the end.
        if status.success() && index + 4 > steps.len() {
            continue;
        }
        assert_eq!(status.signal(), Some(9), "step {}, {step}: {status}", index + 1);
        let store = Store::open(home).unwrap();
        assert_sound(&store);
        for image in store.list().unwrap() {
            drop(store.lease(&image.digest.to_string()).unwrap());
        }
        again(&store, kept(home));
        store.flush();
        assert_sound(&store);
        assert_eq!(store.list().unwrap().len(), 1, "{step}");
        let left: Vec<_> =
            ["tmp", "partial"].iter().flat_map(|name| files_below(&home.join("images").join(name))).collect();
        assert!(left.is_empty(), "{step}: {left:?}");
    }
    steps
}

/// Layers of bytes that no compression makes small, and one that is not worth keeping.
fn layers() -> [Vec<u8>; 3] {
    let noise = |seed: u32, length: u32| -> Vec<u8> {
        let mix =
            |index: u32| (index ^ seed).wrapping_mul(2_654_435_761).rotate_left(index % 31).wrapping_mul(0x9e37_79b1);
        (0..length).map(|index| (mix(index) >> 19) as u8).collect()
    };
    let layer =
        |seed, length| Layer::new().directory("etc/").file(&format!("etc/{seed}"), &noise(seed, length)).finish();
    [layer(1, 1_500_000), layer(2, 10), layer(3, 600_000)]
}

fn pulls() {
    let registry = Registry::start(Kind::default());
    let layout = tempfile::tempdir().unwrap();
    let files = archive::oci("x", &layers(), archive::gzip);
    for (name, data) in &files {
        let path = layout.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, data).unwrap();
    }
    registry.push(layout.path(), "app:1");
    let total: usize = layers().iter().map(|layer| archive::gzip(layer).len()).sum();
    let proxy = Proxy::start(&registry.host, Faults::default());
    let reference = format!("{}/app:1", proxy.host);
    let mut resumed = 0;
    let passed = at_every_step(&reference, |store, kept| {
        let before = proxy.seen().body_bytes;
        pull(store, &reference);
        let fetched = (proxy.seen().body_bytes - before) as u64;
        // Manifest, configuration and the layer that is not worth keeping come again.
        assert!(fetched + kept <= total as u64 + 8_000, "{fetched} fetched although {kept} of {total} were here");
        resumed += u64::from(kept > 0);
    });
    for step in STEPS {
        assert!(passed.iter().any(|name| name == step), "no pull passes {step:?}: {passed:?}");
    }
    for name in &passed {
        assert!(STEPS.contains(&name.as_str()), "{name:?} is not in the list");
    }
    println!(
        "a pull was killed at each of its {} steps; {resumed} of the next ones had something to go on with",
        passed.len()
    );
    assert!(resumed as usize > passed.len() / 2, "{resumed} of {}", passed.len());
}

fn loads() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("archive.tar");
    std::fs::write(&path, archive::pack_files(&archive::docker("app:1", &layers()))).unwrap();
    let passed = at_every_step(&format!("file:{}", path.display()), |store, _| drop(load_file(store, &path).unwrap()));
    println!("a load was killed at each of its {} steps", passed.len());
}
