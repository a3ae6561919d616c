//! Archives made by hand, honest or lying in exactly one place.

use std::collections::BTreeMap;
use std::io::Write;

use msb_image::Digest;
use serde_json::{Value, json};

/// A tar stream of entries made by hand.
pub struct Layer {
    builder: tar::Builder<Vec<u8>>,
}

impl Layer {
    pub fn new() -> Self {
        Self { builder: tar::Builder::new(Vec::new()) }
    }

    /// An entry whose name is written as it is, however wrong.
    pub fn raw(mut self, name: &str, kind: tar::EntryType, link: &str, data: &[u8]) -> Self {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(if kind == tar::EntryType::Directory { 0o755 } else { 0o644 });
        header.set_size(data.len() as u64);
        header.set_mtime(1_700_000_000);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_cksum();
        self.builder.append(&header, data).unwrap();
        self
    }

    pub fn file(self, name: &str, data: &[u8]) -> Self {
        self.raw(name, tar::EntryType::Regular, "", data)
    }

    pub fn directory(self, name: &str) -> Self {
        self.raw(name, tar::EntryType::Directory, "", b"")
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.raw(name, tar::EntryType::Symlink, target, b"")
    }

    pub fn hard_link(self, name: &str, target: &str) -> Self {
        self.raw(name, tar::EntryType::Link, target, b"")
    }

    /// A character device 0:0.
    pub fn null_device(mut self, name: &str) -> Self {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).unwrap();
        header.set_entry_type(tar::EntryType::Char);
        header.set_mode(0o600);
        header.set_size(0);
        header.set_device_major(0).unwrap();
        header.set_device_minor(0).unwrap();
        header.set_cksum();
        self.builder.append(&header, &[][..]).unwrap();
        self
    }

    /// A PAX header for the next entry.
    pub fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.builder.append_pax_extensions(records.iter().copied()).unwrap();
        self
    }

    pub fn finish(self) -> Vec<u8> {
        self.builder.into_inner().unwrap()
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// Files of an outer archive, in the order of their names unless said otherwise.
pub type Files = BTreeMap<String, Vec<u8>>;

/// Packs files in the given order.
pub fn pack<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Vec<u8> {
    let mut layer = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(data.len() as u64);
        layer.append_data(&mut header, name, data).unwrap();
    }
    layer.into_inner().unwrap()
}

pub fn pack_files(files: &Files) -> Vec<u8> {
    pack(files.iter().map(|(name, data)| (name.as_str(), data.as_slice())))
}

/// The configuration of layers that are given uncompressed.
pub fn config(layers: &[Vec<u8>]) -> Value {
    json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"], "Labels": {"team": "ml"}, "User": "1000"},
        "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|layer| Digest::of(layer).to_string()).collect::<Vec<_>>()},
    })
}

/// A docker archive in the old layout.
pub fn docker(name: &str, layers: &[Vec<u8>]) -> Files {
    let config = serde_json::to_vec(&config(layers)).unwrap();
    let config_name = format!("{}.json", Digest::of(&config).hex());
    let mut files = Files::new();
    let mut paths = Vec::new();
    for (index, layer) in layers.iter().enumerate() {
        let path = format!("{index:064x}/layer.tar");
        files.insert(path.clone(), layer.clone());
        paths.push(path);
    }
    files.insert(
        "manifest.json".into(),
        serde_json::to_vec(&json!([{"Config": config_name, "RepoTags": [name], "Layers": paths}])).unwrap(),
    );
    files.insert(config_name, config);
    files
}

/// Adds a blob under its digest and returns its descriptor.
pub fn add_blob(files: &mut Files, media_type: &str, bytes: Vec<u8>) -> Value {
    let digest = Digest::of(&bytes);
    let descriptor = json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()});
    files.insert(format!("blobs/sha256/{}", digest.hex()), bytes);
    descriptor
}

pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// Adds an image with compressed layers and returns the descriptor of its manifest.
pub fn add_image(files: &mut Files, config: &Value, layers: &[Vec<u8>], compress: fn(&[u8]) -> Vec<u8>) -> Value {
    let layers: Vec<_> = layers.iter().map(|layer| add_blob(files, LAYER, compress(layer))).collect();
    let config = add_blob(files, CONFIG, serde_json::to_vec(config).unwrap());
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
    add_blob(files, MANIFEST, serde_json::to_vec(&manifest).unwrap())
}

/// Finishes an OCI layout with these descriptors.
pub fn add_index(files: &mut Files, manifests: Vec<Value>) {
    files.insert("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec());
    files
        .insert("index.json".into(), serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": manifests})).unwrap());
}

pub fn named(mut descriptor: Value, name: &str) -> Value {
    descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": name});
    descriptor
}

/// An OCI layout with one image.
pub fn oci(name: &str, layers: &[Vec<u8>], compress: fn(&[u8]) -> Vec<u8>) -> Files {
    let mut files = Files::new();
    let manifest = add_image(&mut files, &config(layers), layers, compress);
    add_index(&mut files, vec![named(manifest, name)]);
    files
}
