//! Memory while loading stays the same whatever the archive's size. Alone in its file: the peak is the process's.

mod support;

use std::fs::File;
use std::io::{BufReader, Read, Write};

use msb_image::{Digest, LoadOptions, LoadSource};
use serde_json::json;
use support::{assert_sound, home};

/// Files in the layer, and the size of each.
const FILES: u32 = 150;
const FILE_BYTES: usize = 1 << 20;
/// What the documentation promises.
const PEAK_MAX_KIB: u64 = 64 << 10;

#[test]
fn a_large_archive_is_never_held_in_memory() {
    let home = home();
    let path = home.directory.path().join("archive.tar");
    let layer_path = home.directory.path().join("layer.tar");
    {
        let mut layer = tar::Builder::new(File::create(&layer_path).unwrap());
        for number in 0..FILES {
            let data: Vec<u8> =
                (0..FILE_BYTES as u32).map(|index| (index.wrapping_mul(2_654_435_761 + number) >> 21) as u8).collect();
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            layer.append_data(&mut header, format!("file-{number}"), &data[..]).unwrap();
        }
        layer.into_inner().unwrap().flush().unwrap();
        let digest = hash(&layer_path);
        let config =
            json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digest]}})
                .to_string();
        let manifest = json!([{"Config": "config.json", "RepoTags": ["big:1"], "Layers": ["layer.tar"]}]).to_string();
        let mut archive = tar::Builder::new(File::create(&path).unwrap());
        archive.append_path_with_name(&layer_path, "layer.tar").unwrap();
        for (name, text) in [("config.json", config), ("manifest.json", manifest)] {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            archive.append_data(&mut header, name, text.as_bytes()).unwrap();
        }
        archive.into_inner().unwrap().flush().unwrap();
    }
    let stream = BufReader::new(File::open(&path).unwrap());
    home.store.load(LoadSource::Stream(Box::new(stream)), &LoadOptions::default(), &mut |_| {}).unwrap();
    let peak = peak_kib();
    assert!(peak < PEAK_MAX_KIB, "the peak was {peak} KiB");
    assert_sound(&home.store);
}

fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Hashes with sha256sum: the crate's own streaming hash is what is under test.
fn hash(path: &std::path::Path) -> Digest {
    let mut child =
        std::process::Command::new("sha256sum").arg(path).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    child.wait().unwrap();
    format!("sha256:{}", &text[..64]).parse().unwrap()
}
