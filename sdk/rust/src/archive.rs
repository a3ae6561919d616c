//! Whether the images of an archive on this machine are in the store already, so that nothing has to be sent. Reads the lists of a docker
//! archive and seeks over everything else; what is not understood at once is simply not known.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use msb_protocol::control::ImageSummary;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::client::Client;

/// Entries of an archive that are looked at.
const ENTRIES_MAX: usize = 4096;
/// Bytes of a list or a configuration that are read.
const DOCUMENT_BYTES_MAX: u64 = 4 << 20;

/// What an archive says of one image.
#[derive(Debug, PartialEq, Eq)]
struct Claim {
    reference: String,
    /// Digest of the configuration.
    config: String,
}

/// What an archive says of all its images, and the digests of manifests in its index, if it has one.
#[derive(Debug, PartialEq, Eq)]
struct Claims {
    images: Vec<Claim>,
    manifests: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ManifestEntry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
}

/// The images of a docker archive if each is in the store under the same name, with the same configuration and all its parts. The file
/// is at its beginning afterwards.
pub async fn known(client: &Client, archive: &File) -> Option<Vec<ImageSummary>> {
    let file = archive.try_clone().ok()?;
    let claims = tokio::task::spawn_blocking(move || claims(file)).await.ok()??;
    let mut images: Vec<ImageSummary> = Vec::new();
    for claim in claims.images {
        let detail = client.image(&claim.reference).await.ok()?;
        let listed = claims.manifests.as_ref().is_none_or(|digests| digests.contains(&detail.summary.digest));
        if !detail.complete || !listed || detail.config.digest != claim.config {
            return None;
        }
        if images.iter().all(|image| image.digest != detail.summary.digest) {
            images.push(detail.summary);
        }
    }
    Some(images)
}

fn claims(mut file: File) -> Option<Claims> {
    let found = read(&mut file);
    file.seek(SeekFrom::Start(0)).ok()?;
    found
}

fn read(file: &mut File) -> Option<Claims> {
    file.seek(SeekFrom::Start(0)).ok()?;
    let mut places = HashMap::new();
    let mut archive = tar::Archive::new(&mut *file);
    for (count, entry) in archive.entries_with_seek().ok()?.enumerate() {
        let entry = entry.ok()?;
        if count >= ENTRIES_MAX {
            return None;
        }
        if entry.header().entry_type().is_file() {
            let path = entry.path().ok()?;
            let name = path.strip_prefix("./").unwrap_or(&path).to_str()?.to_owned();
            places.insert(name, (entry.raw_file_position(), entry.size()));
        }
    }
    let mut document = |name: &str| -> Option<Vec<u8>> {
        let (offset, len) = *places.get(name)?;
        if len > DOCUMENT_BYTES_MAX {
            return None;
        }
        file.seek(SeekFrom::Start(offset)).ok()?;
        let mut bytes = vec![0; usize::try_from(len).ok()?];
        file.read_exact(&mut bytes).ok()?;
        Some(bytes)
    };
    let entries: Vec<ManifestEntry> = serde_json::from_slice(&document("manifest.json")?).ok()?;
    let mut images = Vec::new();
    for entry in entries {
        let digest: String =
            Sha256::digest(document(&entry.config)?).iter().map(|byte| format!("{byte:02x}")).collect();
        let references = entry.repo_tags.filter(|tags| !tags.is_empty())?;
        images.extend(references.into_iter().map(|reference| Claim { reference, config: format!("sha256:{digest}") }));
    }
    let manifests = match document("index.json") {
        Some(bytes) => {
            let index: Index = serde_json::from_slice(&bytes).ok()?;
            Some(index.manifests.into_iter().map(|manifest| manifest.digest).collect())
        }
        None => None,
    };
    (!images.is_empty()).then_some(Claims { images, manifests })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(entries: &[(&str, &[u8])]) -> File {
        let mut builder = tar::Builder::new(tempfile::tempfile().unwrap());
        for (name, bytes) in entries {
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, *bytes).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn an_archive_is_asked_for_names_and_configurations_and_left_at_its_beginning() {
        let manifest = br#"[{"Config":"c.json","RepoTags":["a:1","b:2"],"Layers":["l.tar"]}]"#;
        let mut file = archive(&[("./l.tar", &[7; 9000]), ("c.json", b"{}"), ("./manifest.json", manifest)]);
        let found = claims(file.try_clone().unwrap()).unwrap();
        let config = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
        let shown: Vec<_> =
            found.images.iter().map(|claim| (claim.reference.as_str(), claim.config.as_str())).collect();
        assert_eq!(shown, [("a:1", config), ("b:2", config)]);
        assert_eq!((found.manifests, file.stream_position().unwrap()), (None, 0));
        let index = br#"{"manifests":[{"digest":"sha256:1"}]}"#;
        let file = archive(&[("index.json", index), ("c.json", b"{}"), ("manifest.json", manifest)]);
        assert_eq!(claims(file).unwrap().manifests, Some(vec!["sha256:1".to_owned()]));
    }

    #[test]
    fn what_is_not_understood_is_not_known() {
        let nameless = br#"[{"Config":"c.json","RepoTags":null,"Layers":[]}]"#;
        for entries in [
            &[][..],
            &[("manifest.json", &b"[]"[..])],
            &[("manifest.json", b"nonsense")],
            &[("c.json", b"{}"), ("manifest.json", nameless)],
            &[("manifest.json", br#"[{"Config":"missing","RepoTags":["a:1"],"Layers":[]}]"#)],
        ] {
            assert_eq!(claims(archive(entries)), None);
        }
        let mut noise = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut noise, &[0x5a; 4096]).unwrap();
        assert_eq!(claims(noise), None);
    }
}
