//! Bad input gets a clear error, and nothing is lost.

use std::io::Write;

use msb_tests::{Home, image};

#[test]
fn names_images_and_amounts_that_cannot_be_are_refused() {
    let home = Home::with_busybox("bad_words");
    for name in ["", "../escape", "/abs", "a/b", ".hidden", "-dash", "with space", "n\u{e4}me", &"x".repeat(129)] {
        let finished = home.msb(["create", &format!("--name={name}"), "busybox"]).run();
        assert!(matches!(finished.code(), Some(1 | 2)), "{name:?}: {}", finished.account());
        assert!(!finished.stderr.is_empty(), "{name:?}: {}", finished.account());
    }
    home.fails(&["create", "--name", "a/b", "busybox"], 1, "invalid_name");
    let complaint = home.fails(&["run", "--pull", "never", "no-such-image", "true"], 125, "image_not_found");
    assert!(
        complaint.contains("busybox") && complaint.contains("image load"),
        "says what there is and what to do: {complaint}"
    );
    let _ =
        home.msb(["run", "busybox", "--name", "x"]).run().exits(127).complains("options of msb come before the image");
    home.fails(&["exec", "nobody", "--", "true"], 125, "sandbox_not_found");
    home.fails(&["stop", "nobody"], 1, "sandbox_not_found");
    home.fails(&["create", "-c", "0", "busybox"], 1, "invalid_config");
    home.fails(&["create", "-m", "0", "busybox"], 1, "invalid_config");
    home.fails(&["create", "--label", "sandbox.id=x", "busybox"], 1, "invalid_label");
    home.fails(&["create", "UPPER CASE"], 1, "invalid_reference");
    assert!(home.sandboxes().is_empty(), "something was made: {:?}", home.sandboxes());
    home.succeeds(&["create", "--name", "box", "busybox"]);
    home.fails(&["create", "--name", "box", "busybox"], 1, "sandbox_already_exists");
    assert_eq!(home.status("box"), "running");
    let longest = "x".repeat(128);
    home.succeeds(&["create", "--name", &longest, "busybox"]);
    home.finish();
}

#[test]
fn damaged_and_hostile_archives_are_refused_and_leave_the_store_as_it_was() {
    let home = Home::with_busybox("bad_archives");
    let before = home.json(&["image", "ls"]);
    let good = std::fs::read(image("busybox-oci.tar")).expect("the archive");
    let write = |name: &str, bytes: &[u8]| {
        let path = home.scratch().join(name);
        std::fs::write(&path, bytes).expect("an archive");
        path.to_str().expect("UTF-8").to_owned()
    };
    let load = |path: &str, codes: &[&str]| {
        let finished = home.msb(["--format", "json", "image", "load", "-i", path]).run().exits(1);
        let said = format!("{}{}", finished.text(), finished.complaint());
        assert!(
            codes.iter().any(|code| said.contains(&format!("\"{code}\""))),
            "none of {codes:?}: {}",
            finished.account()
        );
    };
    load(&write("empty.tar", b""), &["invalid_archive"]);
    load(&write("noise.tar", &[0x5a; 100_000]), &["invalid_archive"]);
    for part in [600, good.len() / 3, good.len() / 2, good.len() - 2048] {
        load(&write("short.tar", &good[..part]), &["invalid_archive", "digest_mismatch"]);
    }
    // One flipped bit in the middle of a layer's blob.
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x10;
    load(&write("flipped.tar", &flipped), &["invalid_archive", "digest_mismatch"]);
    load("/no/such/file.tar", &["path_not_found"]);
    // A manifest that promises a file outside, and layers that try to get out.
    load(&write("outside.tar", &docker_archive("../../etc/passwd", &layer("ok", b"x"))), &["invalid_archive"]);
    for path in ["../escaped", "/../../escaped", "a/../../escaped"] {
        let archive = write("escape.tar", &docker_archive("layer.tar", &raw_layer(path)));
        let finished = home.msb(["image", "load", "-i", &archive]).run();
        assert!(matches!(finished.code(), Some(0 | 1)), "{}", finished.account());
        if finished.code() == Some(0) {
            let _ = home.msb(["image", "rm", "hostile:latest"]).run().succeeds();
        }
    }
    for place in [home.path(), home.scratch(), std::path::PathBuf::from("/")] {
        assert!(!place.join("escaped").exists(), "a layer wrote into {}", place.display());
    }
    assert_eq!(home.json(&["image", "ls"]), before, "the store changed");
    home.succeeds(&["doctor", "--store"]);
    home.msb(["run", "busybox", "echo", "still", "fine"]).run().succeeds().prints("still fine\n");
    home.finish();
}

/// A docker archive with one layer, whose manifest names the layer as it is told to.
fn docker_archive(layer_name: &str, layer: &[u8]) -> Vec<u8> {
    use sha2::Digest;
    let diff_id = hex::encode(sha2::Sha256::digest(layer));
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{}},"rootfs":{{"type":"layers","diff_ids":["sha256:{diff_id}"]}}}}"#
    );
    let manifest = format!(r#"[{{"Config":"config.json","RepoTags":["hostile:latest"],"Layers":["{layer_name}"]}}]"#);
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in
        [("config.json", config.as_bytes()), ("layer.tar", layer), ("manifest.json", manifest.as_bytes())]
    {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, content).expect("an entry");
    }
    tar.into_inner().expect("an archive")
}

fn layer(name: &str, content: &[u8]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, content).expect("an entry");
    tar.into_inner().expect("a layer")
}

/// A layer with one file under a name that the tar library refuses to write.
fn raw_layer(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut header = tar::Header::new_ustar();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_size(2);
    header.set_mode(0o644);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_cksum();
    bytes.write_all(header.as_bytes()).expect("memory");
    bytes.extend_from_slice(b"x\n");
    bytes.resize(bytes.len().next_multiple_of(512) + 1024, 0);
    bytes
}

#[test]
fn homes_that_cannot_be_used_are_explained() {
    let home = Home::new("bad_homes");
    let file = home.scratch().join("a-file");
    std::fs::write(&file, "").expect("a file");
    let finished = home.msb(["--format", "json", "ls"]).env("MSB_HOME", &file).run().exits(1);
    let said = format!("{}{}", finished.text(), finished.complaint());
    assert!(said.contains("home_unusable") || said.contains("daemon_unavailable"), "{}", finished.account());
    assert!(said.contains("a-file"), "names the path: {}", finished.account());
    // Somebody else's folder: only root can make one for the test.
    if rustix::process::geteuid().is_root() {
        let other = home.scratch().join("others");
        std::fs::create_dir(&other).expect("a folder");
        std::os::unix::fs::chown(&other, Some(4242), Some(4242)).expect("chown");
        let finished = home.msb(["--format", "json", "ls"]).env("MSB_HOME", &other).run().exits(1);
        let said = format!("{}{}", finished.text(), finished.complaint());
        assert!(said.contains("home_unusable") || said.contains("daemon_unavailable"), "{}", finished.account());
    }
    home.finish();
}
