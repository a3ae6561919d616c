//! `cargo xtask fuzz`: the targets under `fuzz/`, built with coverage counters by the stable compiler, each run for a bounded time.
//!
//! ```text
//!  seeds (made here: one for each message of the golden files, each kind of archive, each register) ─┐
//!  corpus of earlier runs (~/.cache/msb/fuzz/<target>) ──────────────────────────────────────────────┴─► libFuzzer ─► crash? failure
//! ```
//!
//! Called by people, by the tier `fuzz` (seconds for each target) and by `cargo xtask soak` (minutes). An input that breaks a target is
//! kept beside the corpus and named; nothing is ever written into the repository.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{binaries, cache, debian, program};

/// Where cargo puts programs that are built for a named target; naming one keeps build programs free of the counters.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// LLVM's coverage counters, as libFuzzer reads them.
const COVERAGE: &str = "-C passes=sancov-module -C llvm-args=-sanitizer-coverage-level=4 \
    -C llvm-args=-sanitizer-coverage-inline-8bit-counters -C llvm-args=-sanitizer-coverage-pc-table \
    -C llvm-args=-sanitizer-coverage-trace-compares -C codegen-units=1 --cfg fuzzing";
/// Memory of one target; what takes more has grown with its input.
const MEMORY_MIB: u32 = 2048;
/// Time of a single input; what takes longer spins.
const INPUT_TIMEOUT_S: u32 = 60;

/// What libFuzzer needs beside the compiler.
pub(crate) const PACKAGES: &[&[debian::Package]] = &[debian::BUILD, debian::FUZZ];

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Run only these targets
    target: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    debian::ensure(PACKAGES)?;
    for_seconds(arguments.seconds, &arguments.target)
}

/// Runs the named targets, or all, one after the other.
///
/// # Errors
/// A target that does not compile or does not exist, or that an input breaks; all others have run by then.
pub(crate) fn for_seconds(seconds: u32, wanted: &[String]) -> Result<()> {
    let folder = build()?;
    let all = targets()?;
    if let Some(unknown) = wanted.iter().find(|name| !all.contains(name)) {
        bail!("there is no fuzz target {unknown}; there are: {}", all.join(", "));
    }
    let mut broken = Vec::new();
    for target in all.iter().filter(|target| wanted.is_empty() || wanted.contains(target)) {
        if let Err(error) = one(&folder.join(target), target, seconds) {
            println!("{error:#}");
            broken.push(target.as_str());
        }
    }
    if !broken.is_empty() {
        bail!("broken by an input: {}", broken.join(", "));
    }
    Ok(())
}

/// The targets are the files.
fn targets() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(cache::repository().join("fuzz/fuzz_targets"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

fn build() -> Result<PathBuf> {
    let folder = cache::target().join("fuzz");
    let mut cargo = binaries::cargo();
    cargo
        .args(["build", "--manifest-path", "fuzz/Cargo.toml", "--locked", "--release", "--target", TARGET])
        .env("CARGO_TARGET_DIR", &folder)
        .env("RUSTFLAGS", COVERAGE);
    program::run(&mut cargo)?;
    Ok(folder.join(TARGET).join("release"))
}

fn one(executable: &Path, target: &str, seconds: u32) -> Result<()> {
    let kept = cache::root()?.join("fuzz").join(target);
    let (corpus, broken) = (kept.join("corpus"), kept.join("broken"));
    std::fs::create_dir_all(&corpus)?;
    std::fs::create_dir_all(&broken)?;
    let seeds = tempfile::tempdir()?;
    for (index, seed) in seeds_of(target)?.iter().enumerate() {
        std::fs::write(seeds.path().join(format!("seed-{index:04}")), seed)?;
    }
    let log = kept.join("log");
    let began = Instant::now();
    let mut fuzzer = program::command(executable);
    fuzzer
        .arg(&corpus)
        .arg(seeds.path())
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg(format!("-timeout={INPUT_TIMEOUT_S}"))
        .arg(format!("-artifact_prefix={}/", broken.display()))
        .args(["-print_final_stats=1", "-len_control=20", "-max_len=16384"])
        .current_dir(seeds.path());
    let output = fuzzer.output().with_context(|| format!("cannot start {}", executable.display()))?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    std::fs::write(&log, &text)?;
    if !output.status.success() {
        let lines: Vec<&str> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(40)..] {
            println!("    {line}");
        }
        bail!(
            "fuzz target {target} ended with {}; the input is kept in {}, the whole log is {}",
            output.status,
            broken.display(),
            log.display()
        );
    }
    let figure = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("stat::{name}:")));
        line.map_or("?", str::trim).to_owned()
    };
    println!(
        "  {target:<16} {:>9} inputs in {:.0} s, {} new kept, nothing broke",
        figure("number_of_executed_units"),
        began.elapsed().as_secs_f64(),
        figure("new_units_added"),
    );
    std::io::stdout().flush()?;
    Ok(())
}

/// First inputs, so that a short run already takes every road: what well-behaved peers send.
fn seeds_of(target: &str) -> Result<Vec<Vec<u8>>> {
    Ok(match target {
        "guest_frames" => {
            let mut seeds = Vec::new();
            for text in golden("guest-")?.into_iter().chain(golden("host-")?) {
                seeds.push(framed(&hex::decode(text)?));
            }
            seeds
        }
        "control_socket" => {
            let mut seeds: Vec<Vec<u8>> = Vec::new();
            for text in golden("vmm-")? {
                seeds.push(framed(text.as_bytes()));
                seeds.push(text.into_bytes());
            }
            seeds.extend(TEXTS.iter().map(|text| text.as_bytes().to_vec()));
            seeds
        }
        "tar_stream" => tar_streams()?,
        "session_frames" => {
            let mut seeds = Vec::new();
            for text in golden("host-")? {
                seeds.push([&[1], framed(&hex::decode(text)?).as_slice()].concat());
            }
            for stream in tar_streams()? {
                for choice in 0..4 {
                    let mut seed = vec![choice];
                    for piece in stream.chunks(3000) {
                        // HostMessage { stdin: Data { data } } and HostMessage { stdin_eof }, as protobuf.
                        seed.extend(framed(&field(5, &field(1, piece))));
                    }
                    seed.extend(framed(&field(6, &[])));
                    seeds.push(seed);
                }
            }
            seeds
        }
        "registry_json" => registry_answers(),
        "archive" => vec![archive(false)?, archive(true)?, compressed(&archive(true)?)?],
        "mmio_registers" => {
            // Each register written and read, in the order of a driver's set-up (VIRTIO 1.2, section 4.2.3).
            let registers = [
                0x70u16, 0x14, 0x10, 0x24, 0x20, 0x30, 0x34, 0x38, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x44, 0x50,
                0x64, 0x100,
            ];
            let mut seed = Vec::new();
            for register in registers {
                for (is_write, value) in [(0u8, 0u32), (1, 1), (1, 0xf)] {
                    seed.push(is_write);
                    seed.extend_from_slice(&register.to_le_bytes());
                    seed.extend_from_slice(&value.to_le_bytes());
                    seed.push(4);
                }
            }
            vec![seed]
        }
        "network_frames" => network_frames(),
        "dns_messages" => dns_messages(),
        // The rings' inputs are descriptors and bytes of any kind: coverage finds its way from nothing.
        _ => vec![vec![0; 64], (0..=255).collect()],
    })
}

/// One answer for each path through the reading of what a registry says: both families, indexes, what is refused and why.
fn registry_answers() -> Vec<Vec<u8>> {
    let digest = digest(b"");
    let blob = |kind: &str, rest: &str| format!(r#"{{"mediaType":"{kind}","digest":"{digest}","size":7{rest}}}"#);
    let manifest = |own: &str, config: &str, layers: &[&str]| {
        let layers: Vec<_> = layers.iter().map(|kind| blob(kind, "")).collect();
        let layers = layers.join(",");
        format!(r#"{{"schemaVersion":2,"mediaType":"{own}","config":{},"layers":[{layers}]}}"#, blob(config, ""))
    };
    let index = |own: &str, entries: &[String]| {
        format!(r#"{{"schemaVersion":2,"mediaType":"{own}","manifests":[{}]}}"#, entries.join(","))
    };
    let (oci, docker) = ("application/vnd.oci.image", "application/vnd.docker.distribution");
    let oci_manifest = format!("{oci}.manifest.v1+json");
    let layers = ["", "+gzip", "+zstd"].map(|packing| format!("{oci}.layer.v1.tar{packing}"));
    let platform = |os: &str, architecture: &str, rest: &str| {
        blob(&oci_manifest, &format!(r#","platform":{{"os":"{os}","architecture":"{architecture}"{rest}}}"#))
    };
    let attestation = blob(
        &oci_manifest,
        r#","platform":{"os":"unknown","architecture":"unknown"},"annotations":{"vnd.docker.reference.type":"attestation-manifest"}"#,
    );
    let whole = manifest(&oci_manifest, &format!("{oci}.config.v1+json"), &layers.each_ref().map(String::as_str));
    let seeds = [
        manifest(
            &format!("{docker}.manifest.v2+json"),
            "application/vnd.docker.container.image.v1+json",
            &["application/vnd.docker.image.rootfs.diff.tar.gzip"],
        ),
        index(&format!("{docker}.manifest.list.v2+json"), &[platform("linux", "amd64", "")]),
        index(
            &format!("{oci}.index.v1+json"),
            &[attestation.clone(), platform("linux", "arm64", r#","variant":"v8""#), platform("linux", "amd64", "")],
        ),
        index(&format!("{oci}.index.v1+json"), &[blob(&format!("{oci}.index.v1+json"), "")]),
        index(&format!("{oci}.index.v1+json"), &[attestation, platform("windows", "amd64", "")]),
        whole.replace(r#""size":7"#, r#""size":99999999999999"#),
        whole.replace(r#""size":7"#, r#""size":-7"#),
        whole.replace("sha256", "sha512"),
        whole.replace("layer.v1", "config.v1"),
        whole.replace(r#""schemaVersion":2"#, r#""schemaVersion":1"#),
        whole.replace(r#""layers""#, r#""manifests":[],"layers""#),
        whole,
        format!(
            r#"{{"architecture":"amd64","os":"linux","variant":"v3","created":"2024-01-01T00:00:00Z","author":"a","config":{{"User":"1:1","Env":["A=b"],"Entrypoint":["/a"],"Cmd":["b"],"Volumes":{{"/v":{{}}}},"WorkingDir":"/w","Labels":{{"k":"v"}},"StopSignal":"SIGINT","ExposedPorts":{{"80/tcp":{{}}}}}},"rootfs":{{"type":"layers","diff_ids":["{digest}"]}},"history":[{{"created_by":"x","empty_layer":true}}]}}"#
        ),
        r#"{"token":"abc.def","expires_in":60}"#.to_owned(),
        r#"{"access_token":"abc"}"#.to_owned(),
        r#"{"errors":[{"code":"DENIED","message":"no"}]}"#.to_owned(),
        r#"Bearer realm="https://a/t",service="s",scope="repository:a:pull""#.to_owned(),
        "Basic realm=\"x\", Bearer realm=\"https://a\\\"b\"".to_owned(),
        "120".to_owned(),
        "Sun, 06 Nov 1994 08:49:37 GMT".to_owned(),
    ];
    seeds.map(String::into_bytes).to_vec()
}

/// What users type and write that is parsed.
const TEXTS: &[&str] = &[
    "box-1.2_a",
    "512M",
    "1.5G",
    "10m30s",
    "[engine]\ndefault = \"qemu\"\n",
    r#"{"spec":{"image":"busybox","name":"a","cpus":1,"memory_mib":64}}"#,
    r#"{"type":"exec","exec":{"command":["sh"],"stdin":true}}"#,
    r#"{"type":"signal","number":9}"#,
];

/// The second words of the lines of every golden file whose name begins so.
fn golden(prefix: &str) -> Result<Vec<String>> {
    let folder = cache::repository().join("protocol/tests/golden");
    let mut texts = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            let file = std::fs::read_to_string(entry.path())?;
            texts.extend(file.lines().filter_map(|line| line.split_once(' ')).map(|(_, text)| text.to_owned()));
        }
    }
    Ok(texts)
}

/// As the frame codec writes it: the length, big-endian, and the bytes.
fn framed(body: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(body.len()).unwrap_or_default().to_be_bytes().to_vec();
    frame.extend_from_slice(body);
    frame
}

/// Streams of every kind of entry: what well-behaved peers send, and what they never do.
fn tar_streams() -> Result<Vec<Vec<u8>>> {
    let mut hostile = tar::Builder::new(Vec::new());
    for (path, kind, link) in [
        ("a", tar::EntryType::Directory, ""),
        ("a/link", tar::EntryType::Symlink, "../../outside"),
        ("a/link/evil", tar::EntryType::Regular, ""),
        ("a/hard", tar::EntryType::Link, "a/link/mine"),
        ("a/null", tar::EntryType::Char, ""),
        ("way-out/evil", tar::EntryType::Regular, ""),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_size(0);
        hostile.append_link(&mut header, path, link).or_else(|_| hostile.append_data(&mut header, path, &[][..]))?;
    }
    let mut long = tar::Builder::new(Vec::new());
    let records: [(&str, &[u8]); 3] =
        [("mtime", b"1600000000.123456789"), ("SCHILY.xattr.user.a", b"b"), ("path", b"a/from-pax")];
    long.append_pax_extensions(records)?;
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(4);
    long.append_data(&mut header, format!("a/{}", "n".repeat(150)), &b"long"[..])?;
    Ok(vec![
        tar_of(&[("a/", b""), ("a/b/", b""), ("a/b/c", b"content"), ("a/d", &[0; 2000])])?,
        tar_of(&[("a", b"one file")])?,
        hostile.into_inner()?,
        long.into_inner()?,
        sparse_tar()?,
    ])
}

/// A file with holes, in the form of GNU.sparse 1.0.
fn sparse_tar() -> Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    let records: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"a"),
        ("GNU.sparse.realsize", b"1000000"),
    ];
    builder.append_pax_extensions(records)?;
    let mut content = b"2\n4096\n5\n1000000\n0\n".to_vec();
    content.resize(512, 0);
    content.extend_from_slice(b"bytes");
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_size(content.len() as u64);
    builder.append_data(&mut header, "GNUSparseFile.0/a", content.as_slice())?;
    Ok(builder.into_inner()?)
}

/// One frame of each kind that a guest sends, alone and all in a row; the target puts addresses and lengths right.
fn network_frames() -> Vec<Vec<u8>> {
    let ethernet = |kind: [u8; 2], packet: &[u8]| [&[0; 12], &kind[..], packet].concat();
    let ipv4 = |protocol: u8, to: [u8; 4], payload: &[u8]| {
        let header = [&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0, 0, 0, 0, 0][..], &to].concat();
        ethernet([8, 0], &[&header, payload].concat())
    };
    let ipv6 = |next: u8, payload: &[u8]| {
        let mut header = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        header.extend([0; 16]);
        header.extend([0x26, 6, 0x47, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x11, 0x11]);
        ethernet([0x86, 0xdd], &[&header, payload].concat())
    };
    let tcp = |port: u16, flags: u8| {
        let port = port.to_be_bytes();
        vec![0x9c, 0x40, port[0], port[1], 0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]
    };
    let udp = |port: u16, payload: &[u8]| {
        let (port, length) = (port.to_be_bytes(), (payload.len() as u16 + 8).to_be_bytes());
        [&[0x9c, 0x41, port[0], port[1], length[0], length[1], 0, 0][..], payload].concat()
    };
    let (syn, ack, fin, reset) = (2, 0x10, 0x11, 4);
    let frames = [
        ipv4(6, [1, 1, 1, 1], &tcp(445, syn)),
        ipv4(6, [1, 1, 1, 1], &tcp(445, ack)),
        ipv4(6, [1, 1, 1, 1], &tcp(445, fin)),
        ipv4(6, [1, 1, 1, 1], &tcp(445, reset)),
        ipv4(6, [10, 0, 0, 1], &tcp(80, syn)),
        ipv6(6, &tcp(445, syn)),
        ipv4(17, [1, 1, 1, 1], &udp(445, b"datagram")),
        ipv4(17, [172, 16, 0, 1], &udp(53, &query(b"example"))),
        ipv6(17, &udp(445, b"datagram")),
        ipv4(1, [1, 1, 1, 1], &[8, 0, 0, 0, 0, 1, 0, 1, b'p', b'i', b'n', b'g']),
        ipv6(58, &[128, 0, 0, 0, 0, 1, 0, 1, b'p']),
        ethernet([8, 6], &[0, 1, 8, 0, 6, 4, 0, 1, 0, 0, 0, 0, 0, 0, 172, 16, 0, 2, 0, 0, 0, 0, 0, 0, 172, 16, 0, 1]),
    ];
    let turns = frames.map(|frame| [&[0, 10, 0][..], &(frame.len() as u16).to_le_bytes(), &frame].concat());
    let mut seeds = turns.to_vec();
    seeds.push(turns.concat());
    seeds
}

/// A query of DNS for the address of one label.
fn query(label: &[u8]) -> Vec<u8> {
    let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, label.len() as u8];
    message.extend_from_slice(label);
    message.extend([0, 0, 1, 0, 1]);
    message
}

/// Queries, and answers of each kind: an address, a private one, an error, a truncated one, a name that points at itself.
fn dns_messages() -> Vec<Vec<u8>> {
    let head = |flags: [u8; 2], answers: u8| [&[0, 0][..], &flags, &[0, 1, 0, answers, 0, 0, 0, 0]].concat();
    let record = |data: &[u8]| [&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, data.len() as u8][..], data].concat();
    let alias = [0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, 2, 0xc0, 12];
    let answers = [
        [head([0x81, 0x80], 1), record(&[1, 1, 1, 1])].concat(),
        [head([0x81, 0x80], 1), record(&[10, 0, 0, 1])].concat(),
        head([0x81, 0x83], 0),
        head([0x81, 0x82], 0),
        head([0x83, 0x80], 0),
        [head([0x81, 0x80], 1), alias.to_vec()].concat(),
    ];
    let part = |honest: bool, bytes: &[u8]| {
        let length = bytes.len() as u16 | u16::from(honest) << 15;
        [&length.to_le_bytes()[..], bytes].concat()
    };
    let mut seeds = vec![part(false, &query(b"example"))];
    seeds.extend(answers.map(|answer| [part(false, &query(b"example")), part(true, &answer)].concat()));
    seeds
}

/// One length-delimited field of a protobuf message.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    let mut len = content.len();
    while len >= 0x80 {
        bytes.push(0x80 | (len & 0x7f) as u8);
        len >>= 7;
    }
    bytes.push(len as u8);
    bytes.extend_from_slice(content);
    bytes
}

/// A small image archive of one layer: docker's form, or the OCI layout.
fn archive(oci: bool) -> Result<Vec<u8>> {
    let layer = tar_of(&[("etc/", b""), ("etc/passwd", b"root:x:0:0::/root:/bin/sh\n"), ("etc/.wh.gone", b"")])?;
    let diff_id = digest(&layer);
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Cmd":["sh"]}},"rootfs":{{"type":"layers","diff_ids":["{diff_id}"]}}}}"#
    );
    if !oci {
        let manifest = br#"[{"Config":"c.json","RepoTags":["a:latest"],"Layers":["l.tar"]}]"#;
        return tar_of(&[("manifest.json", manifest), ("c.json", config.as_bytes()), ("l.tar", &layer)]);
    }
    let descriptor = |kind: &str, bytes: &[u8]| {
        let media_type = format!("application/vnd.oci.image.{kind}");
        format!(r#"{{"mediaType":"{media_type}","digest":"{}","size":{}}}"#, digest(bytes), bytes.len())
    };
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{},"layers":[{}]}}"#,
        descriptor("config.v1+json", config.as_bytes()),
        descriptor("layer.v1.tar", &layer)
    );
    let index =
        format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, descriptor("manifest.v1+json", manifest.as_bytes()));
    let path = |bytes: &[u8]| format!("blobs/{}", digest(bytes).replace(':', "/"));
    tar_of(&[
        ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
        ("index.json", index.as_bytes()),
        (&path(manifest.as_bytes()), manifest.as_bytes()),
        (&path(config.as_bytes()), config.as_bytes()),
        (&path(&layer), &layer),
    ])
}

fn digest(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

fn tar_of(entries: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in entries {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        header.set_entry_type(if name.ends_with('/') { tar::EntryType::Directory } else { tar::EntryType::Regular });
        builder.append_data(&mut header, name, *content)?;
    }
    Ok(builder.into_inner()?)
}

fn compressed(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_a_program_of_the_fuzz_package_and_has_seeds() {
        let manifest = std::fs::read_to_string(cache::repository().join("fuzz/Cargo.toml")).expect("manifest");
        for target in targets().expect("targets") {
            assert!(manifest.contains(&format!("name = \"{target}\"")), "{target}");
            assert!(!seeds_of(&target).expect("seeds").is_empty(), "{target}");
        }
    }
}
