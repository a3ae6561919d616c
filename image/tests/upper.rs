//! The writable disk: small when fresh, a sound ext4, growable online.

#![allow(clippy::print_stdout, reason = "a test says what it measured or could not do")]

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use msb_image::{ImageError, MKE2FS_ARGUMENTS, TEMPLATE_BYTES, pack_template};
use support::home;
use support::tools::{Mount, have, privileged, run, skip};

fn template(directory: &Path) -> Option<PathBuf> {
    if !have("mke2fs") {
        return None;
    }
    let raw = directory.join("raw");
    std::fs::File::create(&raw).unwrap().set_len(TEMPLATE_BYTES).unwrap();
    run(Command::new("mke2fs").args(MKE2FS_ARGUMENTS).arg(&raw));
    let packed = directory.join("upper.ext4.zst");
    pack_template(&raw, &packed).unwrap();
    assert!(std::fs::metadata(&packed).unwrap().len() < 64 << 10, "the packed template is small");
    Some(packed)
}

#[test]
fn a_fresh_disk_is_sound_tiny_and_of_the_size_asked_for() {
    let home = home();
    let Some(packed) = template(home.directory.path()) else { return };
    for (name, bytes) in [("small", TEMPLATE_BYTES), ("usual", 4 << 30), ("huge", 1 << 40)] {
        let disk = home.directory.path().join(name);
        home.store.make_upper(&packed, &disk, bytes).unwrap();
        let metadata = std::fs::metadata(&disk).unwrap();
        assert_eq!(metadata.len(), bytes);
        assert!(metadata.blocks() * 512 < 5 << 20, "{name}: {} bytes are allocated", metadata.blocks() * 512);
        assert_eq!(metadata.mode() & 0o777, 0o600);
        run(Command::new("e2fsck").args(["-fn"]).arg(&disk));
    }
    let disk = home.directory.path().join("usual");
    assert!(home.store.make_upper(&packed, &disk, 4 << 30).is_err(), "an existing disk is never overwritten");
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 4 << 30);
    let small = home.store.make_upper(&packed, &home.directory.path().join("tiny"), TEMPLATE_BYTES - 4096);
    assert!(matches!(small, Err(ImageError::Limit { .. })));
    let features = run(Command::new("dumpe2fs").arg("-h").arg(&disk));
    for feature in ["has_journal", "64bit", "metadata_csum", "meta_bg"] {
        assert!(features.contains(feature), "{feature}: {features}");
    }
    assert!(!features.contains("resize_inode"), "{features}");
}

#[test]
fn a_disk_grows_while_it_is_mounted() {
    let home = home();
    let Some(packed) = template(home.directory.path()) else { return };
    if !(privileged() && have("resize2fs") && have("losetup")) {
        return;
    }
    let disk = home.directory.path().join("disk");
    home.store.make_upper(&packed, &disk, 64 << 30).unwrap();
    let place = home.directory.path().join("place");
    std::fs::create_dir(&place).unwrap();
    let mounted = Command::new("mount").args(["-t", "ext4", "-o", "loop"]).arg(&disk).arg(&place).output().unwrap();
    if !mounted.status.success() {
        skip("a loop device cannot be mounted here");
        return;
    }
    {
        let _mount = Mount(&place);
        std::fs::write(place.join("before"), [5; 100_000]).unwrap();
        let device = run(Command::new("findmnt").args(["-no", "SOURCE"]).arg(&place));
        let grown = Command::new("resize2fs").arg(device.trim()).output().unwrap();
        let text = String::from_utf8_lossy(&grown.stderr);
        if text.contains("Permission denied") {
            // EXT4_IOC_RESIZE_FS wants CAP_SYS_RESOURCE, which a container's root may lack; a guest's root has it.
            println!("no right to grow a mounted file system here; it is grown unmounted instead");
        } else {
            assert!(grown.status.success(), "{text}");
            let statistics = rustix::fs::statvfs(&place).unwrap();
            assert!(statistics.f_blocks * statistics.f_frsize > 62 << 30, "grown to {} blocks", statistics.f_blocks);
        }
        std::fs::write(place.join("after"), [6; 100_000]).unwrap();
        assert_eq!(std::fs::read(place.join("before")).unwrap(), [5; 100_000]);
    }
    run(Command::new("e2fsck").args(["-fy"]).arg(&disk));
    run(Command::new("resize2fs").arg(&disk));
    run(Command::new("e2fsck").args(["-fn"]).arg(&disk));
    let header = run(Command::new("dumpe2fs").arg("-h").arg(&disk));
    let blocks =
        header.lines().find_map(|line| line.strip_prefix("Block count:")).unwrap().trim().parse::<u64>().unwrap();
    assert_eq!(blocks * 4096, 64 << 30);
}

#[test]
fn a_damaged_template_is_an_error_and_leaves_no_disk() {
    let home = home();
    let packed = home.directory.path().join("packed");
    for bytes in [&b"not zstd at all"[..], b"", &zstd::encode_all(&[1u8; 9000][..], 1).unwrap()[..12]] {
        std::fs::write(&packed, bytes).unwrap();
        let disk = home.directory.path().join("disk");
        let result = home.store.make_upper(&packed, &disk, 1 << 30);
        assert!(matches!(result, Err(ImageError::Corrupt(_))), "{result:?}");
        assert!(!disk.exists());
    }
    let missing =
        home.store.make_upper(&home.directory.path().join("missing"), &home.directory.path().join("disk"), 1 << 30);
    assert!(matches!(missing, Err(ImageError::Io { .. })));
}
