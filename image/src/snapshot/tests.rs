//! What snapshots' files promise: whole or not there, exact, and unmoved by hostile archives.

use std::io::{Cursor, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::snapshot::{SNAPSHOT_FORMAT, SnapshotDisk, SnapshotImage, SnapshotKind};
use msb_protocol::spec::SandboxSpec;

use super::*;

const SIZE: u64 = 256 << 20;

fn name(text: &str) -> SandboxName {
    text.parse().unwrap()
}

/// A home with a source disk in it.
struct World {
    home: tempfile::TempDir,
    files: SnapshotFiles,
    source: PathBuf,
}

impl World {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let source = home.path().join("upper.img");
        let file = File::create_new(&source).unwrap();
        file.set_len(SIZE).unwrap();
        let noise: Vec<u8> =
            (0..3_000u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        for (offset, bytes) in [(1024, &noise[..]), (100 << 20, b"middle"), (SIZE - 4, b"last")] {
            file.write_all_at(bytes, offset).unwrap();
        }
        let files = SnapshotFiles::new(home.path().join("snapshots"));
        Self { home, files, source }
    }

    fn manifest(content: DiskContent) -> SnapshotManifest {
        let mut spec = SandboxSpec::new("busybox");
        spec.root_size_mib = 256;
        SnapshotManifest {
            format: SNAPSHOT_FORMAT,
            kind: SnapshotKind::Disk,
            memory: None,
            transient: false,
            name: name("warm"),
            created_at: jiff::Timestamp::UNIX_EPOCH,
            created_by: "0.1.0".into(),
            source: name("box"),
            image: SnapshotImage { reference: "busybox".into(), digest: Digest::of(b"image").to_string() },
            parent: None,
            labels: Default::default(),
            spec,
            disk: SnapshotDisk {
                size_bytes: content.size_bytes,
                data_bytes: content.data_bytes,
                digest: content.digest.to_string(),
            },
        }
    }

    fn take(&self, as_name: &str) -> (String, SnapshotManifest) {
        let draft = self.files.draft().unwrap();
        draft.copy_disk(&self.source).unwrap();
        let manifest = Self::manifest(draft.measure().unwrap());
        let sealed = draft.seal(&manifest).unwrap();
        let id = sealed.id().to_string();
        self.files.publish(sealed, &name(as_name)).unwrap();
        (id, manifest)
    }

    fn export(&self, of: &str, id: &str, manifest: &SnapshotManifest) -> Vec<u8> {
        let mut archive = Vec::new();
        self.files.export(&name(of), id, manifest, &mut archive).unwrap();
        archive
    }

    fn import(&self, archive: &[u8]) -> Result<Sealed, ApiError> {
        let importing = Importing::open(Box::new(Cursor::new(archive.to_vec())))?;
        Ok(importing.finish(&self.files)?)
    }

    /// Names in the directory, hidden ones too.
    fn entries(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.home.path().join("snapshots"))
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

#[test]
fn a_snapshot_is_whole_private_and_gives_the_same_disk_again() {
    let world = World::new();
    let (id, manifest) = world.take("warm");
    assert_eq!(world.files.sweep().unwrap(), [name("warm")]);
    let (digest, read) = world.files.read(&name("warm")).unwrap();
    assert_eq!((digest.to_string(), &read), (id.clone(), &manifest));
    for file in [MANIFEST, DISK] {
        let mode = fs::metadata(world.files.path(&name("warm")).join(file)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o400, "{file}");
    }
    assert!(world.files.allocated_bytes(&name("warm")) < 4 << 20);
    // What happens to the source afterwards is not the snapshot's.
    File::options().write(true).open(&world.source).unwrap().write_all_at(b"changed", 1024).unwrap();
    assert_eq!(world.files.verify(&name("warm"), &id, &manifest).unwrap(), (manifest.disk.data_bytes, vec![]));
    let clone = world.home.path().join("clone.img");
    world.files.clone_disk(&name("warm"), SIZE, &clone, SIZE * 2).unwrap();
    let file = File::options().read(true).write(true).open(&clone).unwrap();
    assert_eq!(file.metadata().unwrap().len(), SIZE * 2);
    assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
    file.set_len(SIZE).unwrap();
    assert_eq!(disk::measure(&file).unwrap().digest.to_string(), manifest.disk.digest);
    // A disk that is there is never replaced, and a failed clone leaves nothing.
    assert!(world.files.clone_disk(&name("warm"), SIZE, &clone, SIZE).is_err());
    let error = world.files.clone_disk(&name("warm"), SIZE + 1, &world.home.path().join("x"), SIZE).unwrap_err();
    assert_eq!(error.code(), ErrorCode::SnapshotDamaged);
    assert_eq!(fs::read_dir(world.home.path()).unwrap().count(), 3);
    world.files.remove(&name("warm")).unwrap();
    world.files.remove(&name("warm")).unwrap();
    assert_eq!(world.entries(), [""; 0]);
    assert_eq!(world.files.read(&name("warm")).unwrap_err().code(), ErrorCode::SnapshotDamaged);
}

#[test]
fn what_is_given_up_leaves_nothing_and_what_is_killed_is_swept() {
    let world = World::new();
    let draft = world.files.draft().unwrap();
    draft.copy_disk(&world.source).unwrap();
    drop(draft);
    assert_eq!(world.entries(), [""; 0]);
    let draft = world.files.draft().unwrap();
    draft.copy_disk(&world.source).unwrap();
    let sealed = draft.seal(&World::manifest(disk::measure(&File::open(&world.source).unwrap()).unwrap())).unwrap();
    // As a kill leaves it.
    std::mem::forget(sealed);
    assert_eq!(world.entries().len(), 1);
    assert_eq!(world.files.sweep().unwrap(), []);
    assert_eq!(world.entries(), [""; 0]);
}

#[test]
fn verify_finds_each_flipped_bit() {
    let world = World::new();
    let (id, manifest) = world.take("warm");
    let places = [
        (DISK, vec![0, 1024, 5_000, 65_535, (50 << 20) + 7, (100 << 20) + 3, (200 << 20) + 1, SIZE - 1]),
        (MANIFEST, (0..fs::metadata(world.files.path(&name("warm")).join(MANIFEST)).unwrap().len()).collect()),
    ];
    for (file, offsets) in places {
        let path = world.files.path(&name("warm")).join(file);
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let open = File::options().read(true).write(true).open(&path).unwrap();
        for offset in offsets {
            let mut byte = [0];
            open.read_exact_at(&mut byte, offset).unwrap();
            let bit = 1 << (offset % 8);
            open.write_all_at(&[byte[0] ^ bit], offset).unwrap();
            let (_, problems) = world.files.verify(&name("warm"), &id, &manifest).unwrap();
            assert_eq!(problems.len(), 1, "{file} at {offset}");
            let exported = world.files.export(&name("warm"), &id, &manifest, &mut io::sink());
            assert_eq!(exported.unwrap_err().code(), ErrorCode::SnapshotDamaged, "{file} at {offset}");
            open.write_all_at(&byte, offset).unwrap();
        }
    }
    assert_eq!(world.files.verify(&name("warm"), &id, &manifest).unwrap().1, [""; 0]);
    // A damaged one is not exported.
    let path = world.files.path(&name("warm")).join(DISK);
    File::options().write(true).open(&path).unwrap().write_all_at(b"!", 2048).unwrap();
    let error = world.files.export(&name("warm"), &id, &manifest, &mut io::sink()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::SnapshotDamaged);
    File::options().write(true).open(&path).unwrap().set_len(SIZE / 2).unwrap();
    assert_eq!(world.files.verify(&name("warm"), &id, &manifest).unwrap().1.len(), 1);
    fs::remove_file(&path).unwrap();
    assert_eq!(world.files.verify(&name("warm"), &id, &manifest).unwrap().1.len(), 1);
}

#[test]
fn an_archive_is_small_comes_back_the_same_and_gnu_tar_reads_it() {
    let world = World::new();
    let (id, manifest) = world.take("warm");
    let archive = world.export("warm", &id, &manifest);
    assert!(archive.len() < 100_000, "{}", archive.len());
    assert_eq!(archive, world.export("warm", &id, &manifest), "the same snapshot gives the same archive");
    let sealed = world.import(&archive).unwrap();
    assert_eq!((sealed.id().to_string(), sealed.manifest()), (id.clone(), &manifest));
    world.files.publish(sealed, &name("again")).unwrap();
    assert_eq!(world.files.verify(&name("again"), &id, &manifest).unwrap().1, [""; 0]);
    assert!(world.files.allocated_bytes(&name("again")) < 4 << 20);
    let plain = world.home.path().join("plain.tar");
    fs::write(&plain, zstd::decode_all(&archive[..]).unwrap()).unwrap();
    let out = world.home.path().join("out");
    fs::create_dir(&out).unwrap();
    // Where there is a tar at all.
    if let Ok(status) = std::process::Command::new("tar").arg("-xf").arg(&plain).arg("-C").arg(&out).status() {
        assert!(status.success());
        let file = File::open(out.join(DISK)).unwrap();
        assert_eq!(disk::measure(&file).unwrap().digest.to_string(), manifest.disk.digest);
        assert!(file.metadata().unwrap().blocks() * 512 < 4 << 20);
    }
}

#[test]
fn a_cut_or_flipped_archive_never_becomes_a_snapshot() {
    let world = World::new();
    let (id, manifest) = world.take("warm");
    let archive = world.export("warm", &id, &manifest);
    for cut in (0..archive.len()).step_by(archive.len() / 97 + 1).chain([archive.len() - 1]) {
        let error = world.import(&archive[..cut]).expect_err("a cut archive");
        assert_eq!(error.code, ErrorCode::InvalidArchive, "{cut}: {error:?}");
    }
    for place in (0..archive.len()).step_by(archive.len() / 211 + 1) {
        let mut flipped = archive.clone();
        flipped[place] ^= 1 << (place % 8);
        // A bit that means nothing to the format may pass; what comes out is then the same snapshot.
        if let Ok(sealed) = world.import(&flipped) {
            assert_eq!(sealed.id().to_string(), id, "{place}");
        }
    }
    assert_eq!(world.entries(), ["warm"]);
}

/// An archive with these entries: path, type, content.
fn packed(entries: &[(&str, tar::EntryType, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, kind, content) in entries {
        let mut header = tar::Header::new_ustar();
        // Written by hand: the library refuses the paths that an attacker would use.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(*kind);
        if *kind == tar::EntryType::Symlink {
            header.set_link_name("/etc/passwd").unwrap();
        }
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        header.set_cksum();
        archive.append(&header, *content).unwrap();
    }
    zstd::encode_all(&archive.into_inner().unwrap()[..], 1).unwrap()
}

#[test]
fn hostile_archives_are_refused_and_leave_nothing() {
    use tar::EntryType::{Directory, Link, Regular, Symlink};
    let world = World::new();
    let mut small = tempfile::tempfile().unwrap();
    small.write_all(&[7; 70_000]).unwrap();
    small.seek(SeekFrom::Start(0)).unwrap();
    let good = World::manifest(disk::measure(&small).unwrap());
    let manifest = |edit: &dyn Fn(&mut SnapshotManifest)| {
        let mut manifest = good.clone();
        edit(&mut manifest);
        serde_json::to_vec(&manifest).unwrap()
    };
    let (own, disk) = (manifest(&|_| {}), vec![7u8; 70_000]);
    world.import(&packed(&[(MANIFEST, Regular, &own), (DISK, Regular, &disk)])).unwrap();
    let lie = manifest(&|manifest| manifest.disk.digest = Digest::of(b"other").to_string());
    let larger = manifest(&|manifest| manifest.disk.size_bytes = 70_001);
    let less = manifest(&|manifest| manifest.disk.data_bytes = 65_536);
    let huge = manifest(&|manifest| {
        manifest.spec.root_size_mib = 1 << 20;
        manifest.disk.size_bytes = 1 << 40;
        manifest.disk.data_bytes = 1 << 40;
    });
    let later = manifest(&|manifest| manifest.format = 9);
    let long = vec![b' '; SNAPSHOT_MANIFEST_LEN_MAX + 1];
    let cases: Vec<(&str, Vec<u8>, ErrorCode)> = vec![
        ("nothing", Vec::new(), ErrorCode::InvalidArchive),
        ("no zstd", b"PK\x03\x04 something else entirely".to_vec(), ErrorCode::InvalidArchive),
        ("empty", packed(&[]), ErrorCode::InvalidArchive),
        ("no disk", packed(&[(MANIFEST, Regular, &own)]), ErrorCode::InvalidArchive),
        ("disk first", packed(&[(DISK, Regular, &disk), (MANIFEST, Regular, &own)]), ErrorCode::InvalidArchive),
        ("upwards", packed(&[("../manifest.json", Regular, &own)]), ErrorCode::InvalidArchive),
        ("absolute", packed(&[(MANIFEST, Regular, &own), ("/disk.img", Regular, &disk)]), ErrorCode::InvalidArchive),
        ("link", packed(&[(MANIFEST, Regular, &own), (DISK, Symlink, b"")]), ErrorCode::InvalidArchive),
        ("hard link", packed(&[(MANIFEST, Regular, &own), (DISK, Link, b"")]), ErrorCode::InvalidArchive),
        ("directory", packed(&[(MANIFEST, Directory, b"")]), ErrorCode::InvalidArchive),
        (
            "more",
            packed(&[(MANIFEST, Regular, &own), (DISK, Regular, &disk), ("x", Regular, b"x")]),
            ErrorCode::InvalidArchive,
        ),
        ("lie", packed(&[(MANIFEST, Regular, &lie), (DISK, Regular, &disk)]), ErrorCode::DigestMismatch),
        ("size", packed(&[(MANIFEST, Regular, &larger), (DISK, Regular, &disk)]), ErrorCode::InvalidArchive),
        ("too much", packed(&[(MANIFEST, Regular, &less), (DISK, Regular, &disk)]), ErrorCode::InvalidArchive),
        ("later", packed(&[(MANIFEST, Regular, &later), (DISK, Regular, &disk)]), ErrorCode::UnsupportedOperation),
        ("long", packed(&[(MANIFEST, Regular, &long), (DISK, Regular, &disk)]), ErrorCode::InvalidArchive),
    ];
    for (what, archive, code) in cases {
        let error = world.import(&archive).expect_err(what);
        assert_eq!(error.code, code, "{what}: {error:?}");
    }
    // A terabyte that is said to be there is refused before it is written.
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(huge.len() as u64);
    archive.append_data(&mut header, MANIFEST, &huge[..]).unwrap();
    let records: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", DISK.as_bytes()),
        ("GNU.sparse.realsize", b"1099511627776"),
    ];
    archive.append_pax_extensions(records).unwrap();
    let mut map = b"1\n0\n1048576\n".to_vec();
    map.resize(512 + (1 << 20), 0);
    map[12..512].fill(0);
    let mut header = tar::Header::new_gnu();
    header.set_size(map.len() as u64);
    archive.append_data(&mut header, "disk", &map[..]).unwrap();
    let archive = zstd::encode_all(&archive.into_inner().unwrap()[..], 1).unwrap();
    assert_eq!(world.import(&archive).unwrap_err().code, ErrorCode::DiskFull);
    // Something behind the end.
    let mut appended = zstd::decode_all(&packed(&[(MANIFEST, Regular, &own), (DISK, Regular, &disk)])[..]).unwrap();
    appended.extend_from_slice(b"tail");
    assert!(world.import(&zstd::encode_all(&appended[..], 1).unwrap()).is_err());
    assert_eq!(world.entries(), [""; 0]);
}
