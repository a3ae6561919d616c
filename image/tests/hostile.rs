//! Bad input: every lie has a typed error, and nothing of it stays in the store.

mod support;

use std::collections::BTreeMap;

use msb_image::{Digest, ImageError, Limits, LoadOptions, LoadSource, Platform};
use msb_protocol::error::ErrorCode;
use proptest::prelude::*;
use serde_json::{Value, json};
use support::archive::{
    Files, INDEX, LAYER, Layer, MANIFEST, add_blob, add_image, add_index, config, docker, gzip, named, oci, pack,
    pack_files, zstd,
};
use support::{assert_empty, assert_sound, home, load};
use tar::EntryType;

fn plain(bytes: &[u8]) -> Vec<u8> {
    bytes.to_vec()
}

fn small_layer() -> Vec<u8> {
    Layer::new().directory("etc/").file("etc/hosts", b"127.0.0.1 localhost\n").symlink("etc/link", "hosts").finish()
}

/// Loads what must be refused, and checks that nothing stays.
fn refused(bytes: &[u8], what: &str) -> ImageError {
    refused_with(bytes, &LoadOptions::default(), what)
}

fn refused_with(bytes: &[u8], options: &LoadOptions, what: &str) -> ImageError {
    let home = home();
    let result = home.store.load(LoadSource::Stream(Box::new(bytes)), options, &mut |_| {});
    let Err(error) = result else { panic!("{what} was accepted") };
    assert_empty(&home);
    let api = error.to_api();
    assert!(!api.message.is_empty() && !api.hint.is_empty(), "{what}");
    // The same from a file, where the reader seeks.
    let file = home.directory.path().join("archive");
    std::fs::write(&file, bytes).unwrap();
    let again = home.store.load(LoadSource::File(std::fs::File::open(&file).unwrap()), options, &mut |_| {});
    assert_eq!(again.err().map(|error| error.code()), Some(error.code()), "{what}, from a file");
    assert_empty(&home);
    error
}

fn refused_layer(layer: Vec<u8>, what: &str) -> ImageError {
    refused(&pack_files(&docker("x:1", &[layer])), what)
}

#[test]
fn paths_that_leave_the_image_are_refused() {
    let layers = [
        ("a parent directory", Layer::new().file("../escape", b"x")),
        ("a parent directory inside", Layer::new().file("a/../../escape", b"x")),
        ("an absolute name", Layer::new().file("/etc/passwd", b"x")),
        ("an absolute directory", Layer::new().directory("/etc/")),
        ("a path through a symbolic link", Layer::new().symlink("door", "/etc").file("door/passwd", b"x")),
        ("a path through a relative link", Layer::new().symlink("door", "../..").file("door/x", b"x")),
        ("a path through a file", Layer::new().file("door", b"").file("door/x", b"x")),
        ("a hard link out", Layer::new().hard_link("x", "../../etc/passwd")),
        ("a hard link to nowhere", Layer::new().hard_link("x", "etc/passwd")),
        ("a hard link to an absolute nowhere", Layer::new().hard_link("x", "/etc/passwd")),
        ("a hard link to a directory", Layer::new().directory("d/").hard_link("x", "d")),
        ("a hard link to the root", Layer::new().hard_link("x", ".")),
        ("a hard link through a link", Layer::new().symlink("door", "/").file("f", b"").hard_link("x", "door/f")),
        ("a hard link to itself", Layer::new().hard_link("x", "x")),
        ("a whiteout of nothing at all", Layer::new().file(".wh.", b"")),
        ("a whiteout of the parent", Layer::new().file("a/.wh...", b"")),
        ("a root that is a file", Layer::new().file("./", b"x").file(".", b"x")),
        ("an empty link target", Layer::new().symlink("x", "")),
    ];
    for (what, layer) in layers {
        let error = refused_layer(layer.finish(), what);
        assert!(matches!(error, ImageError::Layer { .. }), "{what}: {error:?}");
        assert_eq!(error.code(), ErrorCode::InvalidArchive, "{what}");
    }
}

#[test]
fn what_looks_strange_but_is_honest_is_accepted() {
    let deep = format!("{}leaf", "d/".repeat(40));
    let layers = [
        Layer::new().directory("./").file("./a//b", b"1").file("..x/y..", b"2").file(&deep, b"3"),
        Layer::new().file(".wh.never-was", b"").file(".wh..wh..opq", b"").file("new\nline", b"4"),
        Layer::new().hard_link("b", "/new\nline").file("a", b"now a file").file(".wh..wh.plnk", b""),
    ];
    let layers: Vec<_> = layers.into_iter().map(Layer::finish).collect();
    let home = home();
    let loaded = load(&home.store, &pack_files(&docker("x:1", &layers))).unwrap();
    assert_eq!(loaded[0].dropped.aufs_entries, 1);
    assert_sound(&home.store);
}

#[test]
fn what_overlayfs_would_misread_is_dropped_and_reported() {
    let layer = Layer::new()
        .null_device("fake-whiteout")
        .pax(&[
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.user.ok", b"1"),
            ("SCHILY.xattr.system.nfs4_acl", b"x"),
        ])
        .directory("d/")
        .finish();
    let home = home();
    let mut warnings = Vec::new();
    let bytes = pack_files(&docker("x:1", &[layer]));
    let loaded = home
        .store
        .load(LoadSource::Stream(Box::new(&bytes[..])), &LoadOptions::default(), &mut |event| {
            if let msb_image::LoadEvent::Warning { message } = event {
                warnings.push(message);
            }
        })
        .unwrap();
    let dropped = &loaded[0].dropped;
    assert_eq!((dropped.whiteout_devices, dropped.overlay_xattrs, dropped.foreign_xattrs), (1, 1, 1));
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("fake-whiteout"), "{warnings:?}");
    let lease = home.store.lease("x:1").unwrap();
    let image = home.directory.path().join("image");
    support::concatenate(lease.root(), &image);
    let rows = support::tree::of_erofs(&std::fs::read(&image).unwrap());
    assert!(!rows.contains_key(&b"fake-whiteout"[..]));
    assert_eq!(rows[&b"d"[..]].xattrs, BTreeMap::from([(b"user.ok".to_vec(), b"1".to_vec())]));
}

#[test]
fn archives_that_are_none_are_refused_in_words() {
    for (what, bytes, part) in [
        ("nothing", vec![], "empty"),
        ("text", b"hello".to_vec(), "ends inside"),
        ("a long text", vec![b'x'; 5000], "header"),
        ("zeros", vec![0; 10240], "empty"),
        ("xz", b"\xfd7zXZ\0\0\0".to_vec(), "xz"),
        ("half a gzip", gzip(&pack_files(&docker("x", &[small_layer()])))[..60].to_vec(), "ends early"),
        ("other files", pack([("readme", &b"x"[..])]), "manifest.json"),
        (
            "an index without a layout",
            pack([("index.json", &br#"{"schemaVersion":2,"manifests":[]}"#[..])]),
            "oci-layout",
        ),
        ("a broken manifest.json", pack([("manifest.json", &b"{"[..])]), "manifest.json"),
        ("an empty manifest.json", pack([("manifest.json", &b"[]"[..])]), "no image"),
    ] {
        let error = refused(&bytes, what);
        assert!(error.to_string().contains(part), "{what}: {error}");
        assert_eq!(error.code(), ErrorCode::InvalidArchive, "{what}: {error}");
    }
    let outer = [
        ("a climbing name", Layer::new().file("../x", b"")),
        ("an absolute name", Layer::new().file("/x", b"")),
        ("a device", Layer::new().raw("x", EntryType::Char, "", b"")),
        ("an absolute link", Layer::new().symlink("x", "/etc/passwd")),
        ("a climbing link", Layer::new().symlink("a/x", "../../etc/passwd")),
    ];
    for (what, archive) in outer {
        assert!(matches!(refused(&archive.finish(), what), ImageError::Archive(_)), "{what}");
    }
}

/// Changes one thing in an honest layout and loads it.
fn lie(change: impl FnOnce(&mut Files)) -> ImageError {
    let mut files = oci("x:1", &[small_layer()], gzip);
    change(&mut files);
    refused(&pack_files(&files), "a lie")
}

fn edit_json(files: &mut Files, name: &str, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&files[name]).unwrap();
    change(&mut value);
    files.insert(name.into(), serde_json::to_vec(&value).unwrap());
}

/// Changes the manifest and everything above it consistently, so that only the intended lie remains.
fn edit_manifest(files: &mut Files, change: impl FnOnce(&mut Files, &mut Value)) {
    let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
    let digest: Digest = index["manifests"][0]["digest"].as_str().unwrap().parse().unwrap();
    let bytes = files.remove(&format!("blobs/sha256/{}", digest.hex())).unwrap();
    let mut manifest: Value = serde_json::from_slice(&bytes).unwrap();
    change(files, &mut manifest);
    let descriptor = add_blob(files, MANIFEST, serde_json::to_vec(&manifest).unwrap());
    add_index(files, vec![named(descriptor, "x:1")]);
}

#[test]
fn every_lie_about_digests_sizes_and_types_is_found() {
    // A blob that is not what its name says.
    let error = lie(|files| {
        let name = files.keys().find(|name| files[*name].starts_with(&[0x1f, 0x8b])).unwrap().clone();
        files.insert(name, gzip(&Layer::new().file("evil", b"x").finish()));
    });
    assert_eq!(error.code(), ErrorCode::DigestMismatch, "{error}");
    // A layer that is not what the configuration says.
    let error = lie(|files| {
        edit_manifest(files, |files, manifest| {
            manifest["layers"][0] = add_blob(files, LAYER, gzip(&Layer::new().file("evil", b"x").finish()));
        });
    });
    assert_eq!(error.code(), ErrorCode::DigestMismatch, "{error}");
    assert!(error.to_string().contains("unpacked"), "{error}");
    for field in ["layers", "config"] {
        let error = lie(|files| {
            edit_manifest(files, |_, manifest| {
                let descriptor = if field == "layers" { &mut manifest["layers"][0] } else { &mut manifest["config"] };
                descriptor["size"] = json!(descriptor["size"].as_u64().unwrap() + 1);
            });
        });
        assert!(matches!(error, ImageError::Size { .. }), "{field}: {error:?}");
    }
    let error = lie(|files| edit_json(files, "index.json", |index| index["manifests"][0]["size"] = json!(1)));
    assert!(matches!(error, ImageError::Size { .. }), "{error:?}");
    for (what, digest) in
        [("sha512", format!("sha512:{}", "0".repeat(128))), ("missing", Digest::of(b"missing").to_string())]
    {
        let error =
            lie(|files| edit_json(files, "index.json", |index| index["manifests"][0]["digest"] = json!(digest)));
        assert!(matches!(error, ImageError::Archive(_)), "{what}: {error:?}");
    }
    let error = lie(|files| {
        edit_manifest(files, |_, manifest| manifest["layers"][0]["mediaType"] = json!("application/vnd.in-toto+json"))
    });
    assert!(error.to_string().contains("not a file system layer"), "{error}");
    let error =
        lie(|files| edit_json(files, "index.json", |index| index["manifests"][0]["mediaType"] = json!("text/plain")));
    assert!(error.to_string().contains("not an image"), "{error}");
    let error = lie(|files| edit_manifest(files, |_, manifest| manifest["layers"] = json!([])));
    assert!(error.to_string().contains("0 layers but its configuration lists 1"), "{error}");
    let error = lie(|files| edit_json(files, "oci-layout", |layout| layout["imageLayoutVersion"] = json!("9.0")));
    assert!(error.to_string().contains("9.0"), "{error}");
    let error = lie(|files| edit_json(files, "index.json", |index| index["manifests"][0]["annotations"] = json!({})));
    assert!(matches!(error, ImageError::Unnamed { .. }), "{error:?}");

    let mut files = docker("x:1", &[small_layer()]);
    let name = files.keys().find(|name| name.ends_with("layer.tar")).unwrap().clone();
    files.insert(name.clone(), Layer::new().file("other", b"x").finish());
    assert_eq!(refused(&pack_files(&files), "a docker layer").code(), ErrorCode::DigestMismatch);
    files.remove(&name);
    assert!(refused(&pack_files(&files), "a missing layer").to_string().contains("lacks layer"));
}

#[test]
fn indexes_are_walked_choosing_platforms_and_passing_over_attestations() {
    let layers = [small_layer()];
    let mut files = Files::new();
    let image = add_image(&mut files, &config(&layers), &layers, zstd);
    let mut arm = config(&layers);
    arm["architecture"] = json!("arm64");
    let mut other = add_image(&mut files, &arm, &layers, gzip);
    other["platform"] = json!({"os": "linux", "architecture": "arm64", "variant": "v8"});
    let mut ours = image.clone();
    ours["platform"] = json!({"os": "linux", "architecture": "amd64"});
    let mut attestation = json!({"mediaType": MANIFEST, "digest": Digest::of(b"not here").to_string(), "size": 5});
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    let mut annotated = attestation.clone();
    annotated["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
    let nested = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [other, attestation, annotated, ours]});
    let nested = add_blob(&mut files, INDEX, serde_json::to_vec(&nested).unwrap());
    add_index(&mut files, vec![named(nested, "docker.io/team/app:1")]);
    let bytes = pack_files(&files);

    let home = home();
    let loaded = load(&home.store, &bytes).unwrap();
    assert_eq!(loaded.len(), 1);
    assert_eq!(loaded[0].references, ["team/app:1"]);
    assert_eq!(loaded[0].digest.to_string(), image["digest"].as_str().unwrap());
    assert_eq!(loaded[0].platform, "linux/amd64");
    let arm = LoadOptions { platform: Some("linux/arm64".parse().unwrap()), ..LoadOptions::default() };
    let loaded = home.store.load(LoadSource::Stream(Box::new(&bytes[..])), &arm, &mut |_| {}).unwrap();
    assert_eq!(loaded[0].platform, "linux/arm64");
    let absent = Platform { os: "linux".into(), architecture: "s390x".into(), variant: None };
    let options = LoadOptions { platform: Some(absent), ..LoadOptions::default() };
    let error = refused_with(&bytes, &options, "another platform");
    assert!(error.to_string().contains("linux/s390x") && error.to_string().contains("linux/arm64"), "{error}");
}

#[test]
fn an_index_may_nest_but_not_without_end() {
    let mut files = Files::new();
    let layers = [small_layer()];
    let mut descriptor = add_image(&mut files, &config(&layers), &layers, plain);
    for _ in 0..msb_image::limits::INDEX_DEPTH {
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor]});
        descriptor = add_blob(&mut files, INDEX, serde_json::to_vec(&index).unwrap());
    }
    let mut fits = files.clone();
    add_index(&mut fits, vec![named(descriptor.clone(), "x")]);
    let home = home();
    load(&home.store, &pack_files(&fits)).unwrap();
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor]});
    descriptor = add_blob(&mut files, INDEX, serde_json::to_vec(&index).unwrap());
    add_index(&mut files, vec![named(descriptor, "x")]);
    assert_eq!(refused(&pack_files(&files), "too deep").code(), ErrorCode::LimitExceeded);
}

#[test]
fn limits_hold_at_the_limit_and_one_step_past() {
    let many =
        |count: usize| (0..count).fold(Layer::new(), |layer, index| layer.file(&format!("f{index}"), b"x")).finish();
    type Case = (&'static str, Vec<u8>, Vec<u8>, fn(&mut Limits));
    let cases: [Case; 6] = [
        ("entries of a layer", many(10), many(11), |limits| limits.layer_entries = 10),
        ("size of a layer", vec![0; 20480], vec![0; 20992], |limits| limits.layer_bytes = 20480),
        ("size of a blob", vec![0; 20480], vec![0; 20992], |limits| limits.blob_bytes = 20480),
        ("merged files", many(9), many(10), |limits| limits.image_entries = 10),
        ("names", many(10), many(11), |limits| limits.layer_metadata_bytes = 20),
        ("metadata", many(1), many(1), |limits| limits.metadata_bytes = 200),
    ];
    for (what, fits, past, set) in cases {
        let mut options = LoadOptions::default();
        set(&mut options.limits);
        if what != "metadata" {
            let home = home();
            let bytes = pack_files(&docker("x:1", &[fits]));
            home.store
                .load(LoadSource::Stream(Box::new(&bytes[..])), &options, &mut |_| {})
                .unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        let error = refused_with(&pack_files(&docker("x:1", &[past])), &options, what);
        assert_eq!(error.code(), ErrorCode::LimitExceeded, "{what}: {error}");
    }
    let layers: Vec<_> = (0..513).map(|_| small_layer()).collect();
    assert_eq!(refused(&pack_files(&docker("x:1", &layers)), "513 layers").code(), ErrorCode::LimitExceeded);
    let home = home();
    load(&home.store, &pack_files(&docker("x:1", &layers[..512]))).unwrap();
    let options = LoadOptions { limits: Limits { archive_entries: 3, ..Limits::default() }, ..LoadOptions::default() };
    let bytes = pack_files(&docker("x:1", &[small_layer(), small_layer()]));
    assert_eq!(refused_with(&bytes, &options, "archive entries").code(), ErrorCode::LimitExceeded);
}

#[test]
fn a_bomb_is_stopped_by_its_ratio() {
    let mut header = tar::Header::new_gnu();
    header.set_path("zeros").unwrap();
    header.set_size(200 << 20);
    header.set_mode(0o644);
    header.set_cksum();
    let mut layer = header.as_bytes().to_vec();
    layer.resize(layer.len() + (200 << 20) + 1024, 0);
    // zstd makes a few kilobytes of it.
    let error = refused(&pack_files(&oci("x:1", &[layer], zstd)), "a bomb");
    assert!(matches!(&error, ImageError::Limit { what, .. } if what.contains("ratio")), "{error:?}");
}

#[test]
fn paths_at_the_length_limits_work_and_longer_ones_are_refused() {
    let name = "n".repeat(255);
    let path = vec!["d".repeat(254); 16].join("/") + "/end-of-it/tail";
    assert_eq!(path.len(), 4094);
    let layer = |path: &str| Layer::new().pax(&[("path", path.as_bytes())]).file("x", b"data").finish();
    let home = home();
    load(&home.store, &pack_files(&docker("x:1", &[layer(&name), layer(&path), layer(&(path.clone() + "12"))])))
        .unwrap();
    assert_sound(&home.store);
    for (what, path) in [("a long name", name + "n"), ("a long path", path + "123")] {
        assert!(matches!(refused_layer(layer(&path), what), ImageError::Layer { .. }), "{what}");
    }
}

#[test]
fn a_deep_tree_neither_overflows_a_stack_nor_the_time() {
    let path = "d/".repeat(2040) + "leaf";
    let layer = Layer::new().pax(&[("path", path.as_bytes())]).file("x", b"data").finish();
    let home = home();
    load(&home.store, &pack_files(&docker("x:1", &[layer]))).unwrap();
    assert_sound(&home.store);
}

#[test]
fn a_cut_at_every_block_is_an_error_and_leaves_nothing() {
    for bytes in [pack_files(&docker("x:1", &[small_layer()])), gzip(&pack_files(&oci("x:1", &[small_layer()], gzip)))]
    {
        let step = if bytes.starts_with(&[0x1f]) { 97 } else { 512 };
        // The last block of a plain tar is padding: GNU tar itself does without it.
        let end = if step == 512 { bytes.len() - 1024 } else { bytes.len() };
        for cut in (0..=end.saturating_sub(1)).step_by(step) {
            let home = home();
            let error = load(&home.store, &bytes[..cut]).expect_err("a cut archive");
            assert_eq!(error.code(), ErrorCode::InvalidArchive, "{cut}: {error}");
            assert_empty(&home);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_flipped_bit_is_an_error_or_changes_nothing_that_matters(position in any::<prop::sample::Index>(), bit in 0u8..8, format in 0usize..3) {
        let layers = [small_layer(), Layer::new().file("etc/.wh.hosts", b"").finish()];
        let files = match format {
            0 => docker("x:1", &layers),
            1 => oci("x:1", &layers, gzip),
            _ => oci("x:1", &layers, zstd),
        };
        let mut bytes = pack_files(&files);
        let position = position.index(bytes.len());
        bytes[position] ^= 1 << bit;
        let home = home();
        match load(&home.store, &bytes) {
            // A name, a label or padding may differ; what is stored agrees with its digests.
            Ok(images) => prop_assert!(!images.is_empty()),
            Err(error) => {
                prop_assert!(!error.to_string().is_empty());
                assert_empty(&home);
            }
        }
        assert_sound(&home.store);
    }

    #[test]
    fn any_tree_of_entries_merges_into_a_sound_image(entries in proptest::collection::vec(("[abc](/[abcd]){0,3}", 0u8..8), 1..40)) {
        let mut layers = Vec::new();
        for chunk in entries.chunks(10) {
            let mut layer = Layer::new();
            for (path, kind) in chunk {
                layer = match kind {
                    0 | 1 => layer.file(path, path.as_bytes()),
                    2 => layer.directory(path),
                    3 => layer.symlink(path, "a/b"),
                    4 => layer.hard_link(path, "a/b"),
                    5 => layer.file(&format!("{path}/.wh..wh..opq"), b""),
                    6 => match path.rsplit_once('/') {
                        Some((parent, name)) => layer.file(&format!("{parent}/.wh.{name}"), b""),
                        None => layer.file(&format!(".wh.{path}"), b""),
                    },
                    _ => layer.symlink(path, "../c"),
                };
            }
            layers.push(layer.finish());
        }
        let home = home();
        if let Ok(images) = load(&home.store, &pack_files(&docker("x:1", &layers))) {
            let image = home.directory.path().join("image");
            support::concatenate(&home.store.root_image(images[0].digest).unwrap(), &image);
            let rows = support::tree::of_erofs(&std::fs::read(&image).unwrap());
            // Counts of links agree with the names that lead to an inode.
            let mut names = BTreeMap::new();
            for (path, row) in rows.iter().filter(|(_, row)| row.kind != 'd') {
                names.entry(row.same_as.clone().unwrap_or_else(|| path.clone())).or_insert((0, row.links)).0 += 1;
            }
            for (path, (count, links)) in names {
                prop_assert_eq!(count, links, "{:?}", path);
            }
        } else {
            assert_empty(&home);
        }
        assert_sound(&home.store);
    }
}
