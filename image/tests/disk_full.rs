//! A disk without room at every step of a pull: file systems of every size from too small for anything to large enough, and with every
//! number of files. Whatever fails says so, the store is sound and has no image, and with room the next pull goes on with what came.

#![expect(clippy::print_stdout, reason = "says how much room was needed")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use msb_image::registry::{PullOptions, Source, Trust};
use msb_image::{CheckDepth, ImageError, ImageReference, Store};
use support::archive::{self, Layer};
use support::registry::{Faults, Kind, Proxy, Registry};
use support::tools::{Mount, have, privileged, run};
use support::{assert_sound, files_below};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// Bytes that no compression makes small.
fn noise(length: u32) -> Vec<u8> {
    (0..length)
        .map(|index| (index.wrapping_mul(2_654_435_761).rotate_left(index % 31).wrapping_mul(40_503) >> 13) as u8)
        .collect()
}

fn pull(store: &Store, reference: &str) -> Result<(), ImageError> {
    let runtime = Runtime::new().unwrap();
    let reference: ImageReference = reference.parse().unwrap();
    let origin = format!("http://{}", reference.registry());
    let options = PullOptions::new(vec![Source { origin, trust: Trust::default(), credential: None }]);
    store.pull(&reference, &options, runtime.handle().clone(), &CancellationToken::new(), &mut |_| {}).map(drop)
}

/// Pulls into a file system with these limits, then takes the limits away and pulls again. Says whether the first pull found room.
fn with_limit(place: &Path, limit: &str, reference: &str, proxy: &Proxy, total: u64) -> bool {
    run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("mode=0700,{limit}"), "tmpfs"]).arg(place));
    let mount = Mount(place);
    let grow = || run(Command::new("mount").args(["-o", "remount,size=64M,nr_inodes=10000"]).arg(place));
    let (store, has_room) = match Store::open(place) {
        Ok(store) => (store, true),
        // Not even its directories have room.
        Err(error) => {
            assert!(matches!(error, ImageError::DiskFull(_)), "{limit}: {error:?}");
            grow();
            (Store::open(place).unwrap(), false)
        }
    };
    let first = pull(&store, reference);
    let images = place.join("images");
    let kept: u64 =
        files_below(&images.join("partial")).iter().map(|path| std::fs::metadata(path).unwrap().len()).sum();
    if let Err(error) = &first {
        assert!(matches!(error, ImageError::DiskFull(_)), "{limit}: {error:?}");
        assert!(store.list().unwrap().is_empty(), "{limit}");
        assert!(files_below(&images.join("tmp")).is_empty(), "{limit}: what failed still takes the room");
    }
    store.flush();
    // The check unpacks what it compares, and that takes room: without it, nothing can be told, which is no damage.
    match store.check(CheckDepth::Content) {
        Ok(report) => assert!(report.problems.is_empty(), "{limit}: {:?}", report.problems),
        Err(error) => assert!(matches!(error, ImageError::DiskFull(_)), "{limit}: {error:?}"),
    }
    grow();
    assert_sound(&store);
    let before = proxy.seen().body_bytes;
    pull(&store, reference).unwrap();
    let fetched = (proxy.seen().body_bytes - before) as u64;
    // The proxy may still count a buffer of each connection that the first pull gave up.
    assert!(
        fetched + kept <= total + 4 * (16 << 10) + 8_000,
        "{limit}: {fetched} fetched although {kept} of {total} were here"
    );
    store.flush();
    assert_sound(&store);
    let left: Vec<PathBuf> = ["tmp", "partial"].iter().flat_map(|name| files_below(&images.join(name))).collect();
    assert!(left.is_empty(), "{limit}: {left:?}");
    drop(store);
    drop(mount);
    has_room && first.is_ok()
}

#[test]
fn a_pull_without_room_says_so_and_goes_on_when_there_is_some() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    if !(privileged() && have("docker-registry") && have("skopeo")) {
        return;
    }
    let registry = Registry::start(Kind::default());
    let scratch = tempfile::tempdir().unwrap();
    let layers = [("a", 700_000), ("b", 10), ("c", 300_000)]
        .map(|(name, length)| Layer::new().directory("etc/").file(&format!("etc/{name}"), &noise(length)).finish());
    let layout = scratch.path().join("layout");
    for (name, data) in &archive::oci("x", &layers, archive::gzip) {
        let path = layout.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, data).unwrap();
    }
    registry.push(&layout, "app:1");
    let total: usize = layers.iter().map(|layer| archive::gzip(layer).len()).sum();
    let proxy = Proxy::start(&registry.host, Faults::default());
    let reference = format!("{}/app:1", proxy.host);
    let place = scratch.path().join("disk");
    std::fs::create_dir(&place).unwrap();
    let sizes = (1..).map(|step| format!("size={}k", step * 64));
    // A directory needs one too; the root of the file system is one.
    let inodes = (2..).map(|count| format!("size=64M,nr_inodes={count}"));
    for limits in [Box::new(sizes) as Box<dyn Iterator<Item = String>>, Box::new(inodes)] {
        let mut failed = 0;
        for limit in limits.take(200) {
            if with_limit(&place, &limit, &reference, &proxy, total as u64) {
                println!("{limit} was the first with room; {failed} had none");
                break;
            }
            failed += 1;
        }
        assert!((10..200).contains(&failed), "{failed}");
    }
}
