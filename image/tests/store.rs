//! The life of images in the store: names, leases, removal, prune, save, and what survives an end at any moment.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};
use std::time::Duration;

use msb_image::{CheckDepth, Digest, ImageError, LoadEvent, LoadOptions, LoadSource, PruneOptions, SaveFormat, Store};
use msb_protocol::error::ErrorCode;
use support::archive::{Layer, docker, gzip, oci, pack_files, zstd};
use support::tools::{have, privileged, run, skip};
use support::{assert_sound, files_below, home, load};

fn base() -> Vec<u8> {
    Layer::new().directory("bin/").file("bin/sh", &[7; 100_000]).hard_link("bin/ash", "bin/sh").finish()
}

fn top(text: &str) -> Vec<u8> {
    Layer::new().file("etc/name", text.as_bytes()).finish()
}

fn nobody() -> BTreeSet<Digest> {
    BTreeSet::new()
}

#[test]
fn an_image_is_found_by_name_digest_and_short_digest() {
    let home = home();
    let one = &load(&home.store, &pack_files(&docker("busybox", &[base()]))).unwrap()[0];
    assert_eq!(one.references, ["busybox:latest"]);
    assert!(!one.was_present);
    for query in [
        "busybox".to_string(),
        "docker.io/library/busybox:latest".into(),
        one.digest.to_string(),
        format!("busybox@{}", one.digest),
        one.digest.short(),
        one.config_digest.to_string(),
        format!("sha256:{}", &one.config_digest.hex()[..8]),
    ] {
        let found = home.store.get(&query).unwrap_or_else(|error| panic!("{query}: {error}"));
        assert_eq!(found.summary.digest, one.digest, "{query}");
    }
    let error = home.store.get("alpine").unwrap_err();
    assert!(error.to_string().contains("busybox:latest"), "{error}");
    assert!(matches!(home.store.get("Not A Name"), Err(ImageError::InvalidReference { .. })));
    assert!(load(&home.store, &pack_files(&docker("busybox", &[base()]))).unwrap()[0].was_present);
    assert_eq!(home.store.list().unwrap().len(), 1);
}

#[test]
fn a_name_moves_to_the_image_that_took_it_last_also_after_a_restart() {
    let home = home();
    let old = load(&home.store, &pack_files(&docker("app:1", &[base(), top("old")]))).unwrap()[0].digest;
    let new = load(&home.store, &pack_files(&docker("app:1", &[base(), top("new")]))).unwrap()[0].digest;
    assert_eq!(home.store.get("app:1").unwrap().summary.digest, new);
    assert_eq!(home.store.get(&old.to_string()).unwrap().summary.references, Vec::<String>::new());
    home.store.tag(&old.to_string(), &"app:old".parse().unwrap()).unwrap();
    home.store.tag("app:1", &"app:2".parse().unwrap()).unwrap();
    drop(home.store);
    let store = Store::open(home.directory.path()).unwrap();
    assert_eq!(store.get("app:old").unwrap().summary.digest, old);
    assert_eq!(store.get("app:2").unwrap().summary.references, ["app:1", "app:2"]);
    let details = store.get("app:1").unwrap();
    assert_eq!(details.layers.len(), 2);
    assert_eq!(details.layers.iter().map(|layer| layer.shared_with).collect::<Vec<_>>(), [1, 0]);
    assert_eq!(details.config.command, ["/bin/sh"]);
    assert_sound(&store);
}

#[test]
fn tags_given_at_load_replace_the_archives_own() {
    let home = home();
    let bytes = pack_files(&docker("app:1", &[base()]));
    let load_as = |tags: &[&str]| {
        let options =
            LoadOptions { tags: tags.iter().map(|tag| tag.parse().unwrap()).collect(), ..LoadOptions::default() };
        home.store
            .load(LoadSource::Stream(Box::new(&bytes[..])), &options, &mut |_| {})
            .map(|images| images[0].references.clone())
    };
    assert_eq!(load_as(&["mine:1", "mine:2"]).unwrap(), ["mine:1", "mine:2"]);
    assert_eq!(load_as(&["app:1=renamed:3"]).unwrap(), ["renamed:3"]);
    assert!(matches!(load_as(&["other=x"]), Err(ImageError::Archive(_))));
}

#[test]
fn only_one_process_writes_and_a_later_format_is_refused() {
    let home = home();
    assert!(matches!(Store::open(home.directory.path()), Err(ImageError::Busy(_))));
    drop(home.store);
    let format = home.directory.path().join("images/format");
    std::fs::write(&format, "2").unwrap();
    assert!(matches!(Store::open(home.directory.path()), Err(ImageError::Format { .. })));
    std::fs::write(&format, "1").unwrap();
    Store::open(home.directory.path()).unwrap();
}

#[test]
fn nobody_else_can_read_the_store() {
    use std::os::unix::fs::PermissionsExt;
    let home = home();
    load(&home.store, &pack_files(&docker("app:1", &[base()]))).unwrap();
    let top = home.directory.path().join("images");
    assert_eq!(std::fs::metadata(&top).unwrap().permissions().mode() & 0o777, 0o700);
    for path in files_below(&top.join("records")).into_iter().chain(files_below(&top.join("blobs"))) {
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o077 & 0o022, 0, "{}", path.display());
    }
}

#[test]
fn what_a_lease_a_sandbox_or_a_pin_needs_stays() {
    let home = home();
    let store = &home.store;
    let digests: Vec<_> = ["leased", "used", "pinned", "idle"]
        .into_iter()
        .map(|name| load(store, &pack_files(&docker(name, &[base(), top(name)]))).unwrap()[0].digest)
        .collect();
    let lease = store.lease("leased").unwrap();
    store.pin("pinned", true).unwrap();
    let in_use = BTreeSet::from([digests[1]]);
    let users = BTreeMap::from([(digests[1], vec!["web".to_string()])]);

    let plan = store.prune(&PruneOptions { dry_run: true, ..PruneOptions::default() }, &in_use).unwrap();
    assert_eq!(plan.images.len(), 1);
    assert_eq!(store.list().unwrap().len(), 4);
    let report = store.prune(&PruneOptions::default(), &in_use).unwrap();
    assert_eq!(report.images, plan.images);
    assert_eq!(
        (report.image_refs_removed, report.manifests_removed, report.layers_removed, report.fsmeta_removed),
        (1, 1, 1, 1)
    );
    assert_eq!(report.bytes_reclaimed, plan.bytes_reclaimed);
    assert!(report.bytes_reclaimed > 0);
    assert_sound(store);

    let error = store.remove("used", &users, false).unwrap_err();
    assert!(matches!(&error, ImageError::InUse { users, .. } if users == &["web"]), "{error:?}");
    assert!(matches!(store.remove("leased", &BTreeMap::new(), false), Err(ImageError::InUse { .. })));
    let outcome = store.remove("used", &users, true).unwrap();
    assert_eq!((outcome.untagged.as_slice(), outcome.deleted), (&["used:latest".to_string()][..], None));
    store.root_image(digests[1]).unwrap();
    drop(lease);
    assert_eq!(store.remove("leased", &BTreeMap::new(), false).unwrap().deleted, Some(digests[0]));
    store.prune(&PruneOptions { all: true, ..PruneOptions::default() }, &nobody()).unwrap();
    assert_eq!(store.list().unwrap(), []);
    support::assert_empty(&home);
}

#[test]
fn removing_one_of_several_names_keeps_the_image() {
    let home = home();
    load(&home.store, &pack_files(&docker("app:1", &[base()]))).unwrap();
    home.store.tag("app:1", &"app:2".parse().unwrap()).unwrap();
    let outcome = home.store.remove("app:1", &BTreeMap::new(), false).unwrap();
    assert_eq!((outcome.untagged, outcome.deleted), (vec!["app:1".into()], None));
    assert!(home.store.remove("app:2", &BTreeMap::new(), false).unwrap().deleted.is_some());
    support::assert_empty(&home);
}

#[test]
fn prune_chooses_by_age_label_and_size() {
    let home = home();
    let store = &home.store;
    for name in ["one", "two", "three"] {
        load(store, &pack_files(&docker(name, &[base(), top(name)]))).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    let take = |options: PruneOptions| -> Vec<String> {
        let options = PruneOptions { dry_run: true, ..options };
        store.prune(&options, &nobody()).unwrap().images.into_iter().flat_map(|image| image.references).collect()
    };
    let two = store.get("two").unwrap().summary;
    assert_eq!(take(PruneOptions { unused_since_ms: Some(two.loaded_ms), ..PruneOptions::default() }), ["one:latest"]);
    // Use makes an image young again.
    drop(store.lease("one").unwrap());
    let two_only = take(PruneOptions { unused_since_ms: Some(two.loaded_ms + 1), ..PruneOptions::default() });
    assert_eq!(two_only, ["two:latest"]);
    assert_eq!(take(PruneOptions { labels: vec![("team".into(), None)], ..PruneOptions::default() }).len(), 3);
    assert!(
        take(PruneOptions { labels: vec![("team".into(), Some("x".into()))], ..PruneOptions::default() }).is_empty()
    );
    // The base layer is shared, so it counts once.
    let base_bytes = store.get("one").unwrap().layers[0].compressed_bytes;
    let all = store.list().unwrap().iter().map(|image| image.size_bytes - base_bytes).sum::<u64>() + base_bytes;
    assert_eq!(take(PruneOptions { keep_bytes: Some(all), ..PruneOptions::default() }), Vec::<String>::new());
    // `one` was used last, so `two` is the oldest now.
    assert_eq!(take(PruneOptions { keep_bytes: Some(all - 1), ..PruneOptions::default() }), ["two:latest"]);
    let usage = store.usage(&nobody()).unwrap();
    assert_eq!(take(PruneOptions { keep_bytes: Some(0), ..PruneOptions::default() }).len(), 3);
    assert!(usage.reclaimable_bytes() > 0 && usage.images == 3);
}

#[test]
fn saved_images_are_the_loaded_ones_byte_for_byte() {
    let first = home();
    let one = load(&first.store, &pack_files(&oci("app:1", &[base(), top("1")], gzip))).unwrap()[0].clone();
    let two = load(&first.store, &pack_files(&oci("app:2", &[base(), top("2")], zstd))).unwrap()[0].clone();
    let three = load(&first.store, &pack_files(&docker("app:3", &[base(), top("3")]))).unwrap()[0].clone();
    for format in [SaveFormat::Docker, SaveFormat::Oci] {
        let mut bytes = Vec::new();
        first.store.save(&["app:1".into(), "app:2".into(), "app:3".into()], format, &mut bytes).unwrap();
        let mut again = Vec::new();
        first.store.save(&["app:1".into(), "app:2".into(), "app:3".into()], format, &mut again).unwrap();
        assert!(bytes == again, "the same images give the same archive");
        let second = home();
        let loaded = load(&second.store, &bytes).unwrap();
        let digests: Vec<_> = loaded.iter().map(|image| (image.digest, image.config_digest)).collect();
        assert_eq!(digests, [&one, &two, &three].map(|image| (image.digest, image.config_digest)), "{format:?}");
        assert_eq!(
            loaded.iter().flat_map(|image| image.references.clone()).collect::<Vec<_>>(),
            ["app:1", "app:2", "app:3"]
        );
        assert_sound(&second.store);
        if have("skopeo") {
            let archive = second.directory.path().join("saved.tar");
            std::fs::write(&archive, &bytes).unwrap();
            let source = match format {
                SaveFormat::Docker => format!("docker-archive:{}:docker.io/library/app:2", archive.display()),
                SaveFormat::Oci => format!("oci-archive:{}:docker.io/library/app:2", archive.display()),
            };
            let text = run(Command::new("skopeo").args(["inspect", "--config", "--raw", &source]));
            assert_eq!(Digest::of(text.trim_end().as_bytes()), two.config_digest, "{format:?}");
        }
    }
}

/// Loads a file; for each layer whether it was known and passed over.
fn load_noting_layers(store: &Store, path: &std::path::Path) -> Vec<bool> {
    let mut known = Vec::new();
    let file = std::fs::File::open(path).unwrap();
    store
        .load(LoadSource::File(file), &LoadOptions::default(), &mut |event| {
            if let LoadEvent::Layer { known: was_known, .. } = event {
                known.push(was_known);
            }
        })
        .unwrap();
    known
}

#[test]
fn a_load_for_which_nobody_waits_any_more_ends_and_leaves_nothing() {
    let home = home();
    let path = home.directory.path().join("archive.tar");
    std::fs::write(&path, pack_files(&docker("app:0", &[base(), top("x")]))).unwrap();
    let options = LoadOptions::default();
    let result = home.store.load(LoadSource::File(std::fs::File::open(&path).unwrap()), &options, &mut |event| {
        if matches!(event, LoadEvent::Layer { .. }) {
            options.given_up.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    });
    assert!(matches!(result, Err(ImageError::Source(_))), "{result:?}");
    assert!(home.store.list().unwrap().is_empty());
    assert_sound(&home.store);
}

#[test]
fn what_the_store_has_is_not_read_again() {
    let home = home();
    let layers = [base(), top("x")];
    let path = home.directory.path().join("archive.tar");
    // The names of an old docker archive promise nothing: there the documents are looked at first.
    for (name, bytes) in
        [("oci", pack_files(&oci("app:1", &layers, gzip))), ("docker", pack_files(&docker("app:0", &layers)))]
    {
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(load_noting_layers(&home.store, &path), [false, false], "{name}");
        assert_eq!(load_noting_layers(&home.store, &path), [true, true], "{name}");
    }
    // Layers shared with another image are stored once.
    let before = files_below(&home.directory.path().join("images/layers")).len();
    load(&home.store, &pack_files(&oci("app:2", &[base(), top("y")], gzip))).unwrap();
    assert_eq!(files_below(&home.directory.path().join("images/layers")).len(), before + 2);
    assert_sound(&home.store);
}

#[test]
fn damage_is_found_and_lost_layer_files_are_made_again() {
    let home = home();
    let digest = load(&home.store, &pack_files(&docker("app:1", &[base(), top("x")]))).unwrap()[0].digest;
    let images = home.directory.path().join("images");
    let root = home.store.root_image(digest).unwrap();
    let before = std::fs::read(&root.metadata).unwrap();
    std::fs::remove_dir_all(images.join("layers/v1")).unwrap();
    std::fs::create_dir(images.join("layers/v1")).unwrap();
    std::fs::remove_file(&root.metadata).unwrap();
    assert!(!home.store.check(CheckDepth::Structure).unwrap().problems.is_empty());
    let lease = home.store.lease("app:1").unwrap();
    assert_eq!(lease.root(), &root);
    assert!(std::fs::read(&root.metadata).unwrap() == before);
    assert_sound(&home.store);

    // One changed byte anywhere is found by the closest check.
    for path in files_below(&images).into_iter().filter(|path| !path.ends_with("lock") && !path.ends_with("format")) {
        if path.parent().is_some_and(|parent| parent.ends_with("records")) {
            continue;
        }
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        bad[good.len() / 2] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        assert!(!home.store.check(CheckDepth::Content).unwrap().problems.is_empty(), "{}", path.display());
        std::fs::write(&path, &good).unwrap();
    }
    assert_sound(&home.store);

    // What is lost together with the blob it is made from cannot be made again; the image says so, the others live.
    drop(lease);
    load(&home.store, &pack_files(&docker("other", &[top("other")]))).unwrap();
    let top_layer = home.store.get("app:1").unwrap().layers[1].digest.hex().to_owned();
    std::fs::remove_file(images.join("blobs/sha256").join(top_layer)).unwrap();
    std::fs::remove_dir_all(images.join("layers/v1")).unwrap();
    std::fs::create_dir(images.join("layers/v1")).unwrap();
    std::fs::remove_file(&root.metadata).unwrap();
    assert_eq!(home.store.lease("app:1").unwrap_err().code(), ErrorCode::StoreCorrupt);
    home.store.lease("other").unwrap();
}

#[test]
fn an_image_that_a_power_cut_left_unfinished_is_dropped_at_open() {
    let home = home();
    load(&home.store, &pack_files(&docker("whole", &[base()]))).unwrap();
    load(&home.store, &pack_files(&docker("torn", &[base(), top("torn")]))).unwrap();
    home.store.flush();
    let torn = home.store.get("torn").unwrap();
    let images = home.directory.path().join("images");
    drop(home.store);
    // As if the host had lost power before anything was synced: other boot, and one file that never reached the disk.
    for record in files_below(&images.join("records")) {
        let mut value: serde_json::Value = serde_json::from_slice(&std::fs::read(&record).unwrap()).unwrap();
        assert_eq!(value["flushed"], true);
        value["flushed"] = false.into();
        value["boot_id"] = "another boot".into();
        std::fs::write(&record, serde_json::to_vec(&value).unwrap()).unwrap();
    }
    std::fs::write(images.join("layers/v1").join(torn.layers[1].diff_id.hex()).join("data"), [0; 4096]).unwrap();
    std::fs::write(images.join("records/garbage.json"), b"").unwrap();
    std::fs::write(images.join("tmp/left-over"), b"x").unwrap();
    let store = Store::open(home.directory.path()).unwrap();
    assert_eq!(
        store.list().unwrap().iter().flat_map(|image| image.references.clone()).collect::<Vec<_>>(),
        ["whole:latest"]
    );
    assert_sound(&store);
    load(&store, &pack_files(&docker("torn", &[base(), top("torn")]))).unwrap();
    assert_sound(&store);
}

/// The process that is killed: loads over and over into the given home.
#[test]
fn load_until_killed() {
    let Some(home) = std::env::var_os("MSB_TEST_LOAD_HOME") else { return };
    let store = Store::open(home.as_ref()).unwrap();
    let mut counter = 0u64;
    loop {
        counter += 1;
        let big = Layer::new().file("big", &vec![counter as u8 | 1; 3_000_000]).finish();
        load(&store, &pack_files(&docker("app:1", &[base(), big.clone()]))).unwrap();
        load(&store, &pack_files(&oci("app:2", &[base(), big, top(&counter.to_string())], gzip))).unwrap();
        store.tag("app:2", &"app:3".parse().unwrap()).unwrap();
        store.prune(&PruneOptions { keep_bytes: Some(4_000_000), ..PruneOptions::default() }, &nobody()).unwrap();
    }
}

#[test]
fn a_kill_at_any_moment_leaves_a_sound_store() {
    let home = home();
    load(&home.store, &pack_files(&docker("kept", &[base()]))).unwrap();
    home.store.pin("kept", true).unwrap();
    drop(home.store);
    for round in 0..12u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "load_until_killed", "--nocapture"])
            .env("MSB_TEST_LOAD_HOME", home.directory.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(60 + round * 37));
        assert!(child.try_wait().unwrap().is_none(), "the loader ended by itself");
        child.kill().unwrap();
        child.wait().unwrap();
        let store = Store::open(home.directory.path()).unwrap();
        assert!(files_below(&home.directory.path().join("images/tmp")).is_empty());
        assert_sound(&store);
        store.lease("kept").unwrap();
    }
}

#[test]
fn a_full_disk_fails_the_load_and_nothing_else() {
    if !privileged() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=3m", "tmpfs"]).arg(directory.path()).status();
    if !mounted.is_ok_and(|status| status.success()) {
        skip("a tmpfs cannot be mounted here");
        return;
    }
    let _mount = support::tools::Mount(directory.path());
    let store = Store::open(directory.path()).unwrap();
    load(&store, &pack_files(&docker("small", &[base()]))).unwrap();
    let noise: Vec<u8> = (0..2_500_000u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for size in [1_000_000, 1_600_000, 2_500_000] {
        let big = Layer::new().file("big", &noise[..size]).finish();
        let result = load(&store, &pack_files(&docker("big", &[base(), big])));
        if size > 1_200_000 {
            let error = result.expect_err("more than fits");
            assert!(matches!(error, ImageError::DiskFull(_)), "{size}: {error:?}");
            assert_eq!(error.code(), ErrorCode::DiskFull);
        } else {
            result.unwrap();
            store.remove("big", &BTreeMap::new(), false).unwrap();
        }
        assert!(files_below(&directory.path().join("images/tmp")).is_empty());
        assert_sound(&store);
    }
    store.lease("small").unwrap();
    drop(store);
}

#[test]
fn loads_and_prunes_at_once_never_lose_a_part() {
    let home = home();
    std::thread::scope(|scope| {
        for worker in 0..3 {
            let store = home.store.clone();
            scope.spawn(move || {
                for round in 0..8 {
                    let name = format!("app{worker}");
                    let bytes = pack_files(&oci(&name, &[base(), top(&round.to_string())], gzip));
                    match load(&store, &bytes) {
                        Ok(_) => {}
                        Err(error) => panic!("{error}"),
                    }
                    if let Ok(lease) = store.lease(&name) {
                        for (path, length) in &lease.root().data {
                            assert_eq!(std::fs::metadata(path).unwrap().len(), *length);
                        }
                    }
                }
            });
        }
        let store = home.store.clone();
        scope.spawn(move || {
            for _ in 0..60 {
                store.prune(&PruneOptions::default(), &nobody()).unwrap();
                std::thread::sleep(Duration::from_millis(2));
            }
        });
    });
    assert_sound(&home.store);
}

#[test]
fn a_stream_that_fails_is_the_sources_fault() {
    struct Broken;
    impl std::io::Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::ConnectionReset.into())
        }
    }
    let home = home();
    let bytes = pack_files(&docker("x", &[base()]));
    let source = std::io::Read::chain(&bytes[..2000], Broken);
    let result = home.store.load(LoadSource::Stream(Box::new(source)), &LoadOptions::default(), &mut |_| {});
    assert!(matches!(result, Err(ImageError::Source(_))));
    support::assert_empty(&home);
}
