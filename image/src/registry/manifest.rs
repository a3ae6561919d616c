//! What a registry answers for a name: an image manifest, or an index to choose from. Pure; every word of it may be a lie.
//!
//! Docker's schema 2 and OCI have the same shape, so one set of types reads both. Which of the two shapes a document has is told by its
//! fields; one that has both is refused, because two readers could see two images in it (CVE-2021-41190).

use serde::Deserialize;

use crate::archive::Platform;
use crate::digest::Digest;
use crate::error::ImageError;
use crate::limits::Limits;

/// The media types that a pull understands, as an `Accept` header.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
/// Marks what belongs to a build's provenance and not to the image.
const ATTESTATION_ANNOTATION: &str = "vnd.docker.reference.type";
/// Longest media type that is kept.
const MEDIA_TYPE_LEN_MAX: usize = 255;

/// A document of a registry.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Document {
    Manifest(Manifest),
    /// What fits the wanted platform.
    Index(Blob),
}

/// An image.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) media_type: String,
    pub(crate) config: Blob,
    pub(crate) layers: Vec<Blob>,
}

/// A promise of content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) bytes: u64,
    pub(crate) media_type: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    config: Option<RawBlob>,
    #[serde(default)]
    layers: Option<Vec<RawBlob>>,
    #[serde(default)]
    manifests: Option<Vec<RawEntry>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawBlob {
    #[serde(default)]
    media_type: Option<String>,
    digest: String,
    size: u64,
}

#[derive(Deserialize)]
struct RawEntry {
    #[serde(flatten)]
    blob: RawBlob,
    #[serde(default)]
    platform: Option<RawPlatform>,
    #[serde(default)]
    annotations: Option<std::collections::BTreeMap<String, serde_json::Value>>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: Option<String>,
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    variant: Option<String>,
}

/// Reads a document. `content_type` is what the registry called it.
pub(crate) fn parse(
    bytes: &[u8],
    content_type: &str,
    wanted: &Platform,
    limits: &Limits,
) -> Result<Document, ImageError> {
    let bad = |reason: String| ImageError::Manifest(reason);
    let raw: Raw = serde_json::from_slice(bytes).map_err(|error| bad(format!("it cannot be read: {error}")))?;
    if raw.schema_version != 2 {
        return Err(bad(format!("its schema version is {}, only 2 is supported", raw.schema_version)));
    }
    let media_type = raw.media_type.unwrap_or_else(|| content_type.split(';').next().unwrap_or_default().to_owned());
    let media_type = plain_media_type(Some(media_type))?;
    match (raw.config, raw.layers, raw.manifests) {
        (Some(config), Some(layers), None) => {
            let limit = limits.layers;
            if layers.len() as u64 > limit {
                return Err(ImageError::Limit { what: "an image".into(), limit, unit: " layers" });
            }
            let config = blob(config)?;
            if config.bytes > limits.metadata_bytes {
                let limit = limits.metadata_bytes;
                return Err(ImageError::Limit { what: "the image configuration".into(), limit, unit: " bytes" });
            }
            let layers = layers.into_iter().map(blob).collect::<Result<Vec<_>, _>>()?;
            for layer in &layers {
                if !crate::archive::is_layer_type(&layer.media_type) {
                    return Err(bad(format!("a layer has type {:?}, which is no file system layer", layer.media_type)));
                }
                if layer.bytes > limits.blob_bytes {
                    let limit = limits.blob_bytes;
                    return Err(ImageError::Limit { what: "a layer".into(), limit, unit: " bytes" });
                }
            }
            // A manifest without a type of its own is what OCI allows it to be.
            let media_type = if media_type.is_empty() || media_type == "application/json" {
                crate::archive::OCI_MANIFEST.to_owned()
            } else {
                media_type
            };
            Ok(Document::Manifest(Manifest { media_type, config, layers }))
        }
        (None, None, Some(entries)) => choose(entries, wanted, limits).map(Document::Index),
        (None, None, None) => Err(bad("it is neither an image nor an index".into())),
        _ => Err(bad("it is an image and an index at once, or half of one".into())),
    }
}

/// The entry for the wanted platform: the first that fits.
fn choose(entries: Vec<RawEntry>, wanted: &Platform, limits: &Limits) -> Result<Blob, ImageError> {
    let limit = limits.archive_images;
    if entries.len() as u64 > limit {
        return Err(ImageError::Limit { what: "an index".into(), limit, unit: " images" });
    }
    let mut available = Vec::new();
    for entry in entries {
        if entry.annotations.is_some_and(|annotations| annotations.contains_key(ATTESTATION_ANNOTATION)) {
            continue;
        }
        let platform = entry.platform.map(|platform| Platform {
            os: short(platform.os),
            architecture: short(platform.architecture),
            variant: platform.variant.map(|variant| short(Some(variant))).filter(|variant| !variant.is_empty()),
        });
        match platform {
            // How attestations are marked when they carry no annotation.
            Some(platform) if platform.os == "unknown" => {}
            Some(platform) if !wanted.accepts(&platform) => available.push(platform.to_string()),
            _ => return blob(entry.blob),
        }
    }
    available.sort();
    available.dedup();
    available.truncate(20);
    Err(ImageError::RegistryPlatform { wanted: wanted.to_string(), available })
}

fn short(text: Option<String>) -> String {
    text.unwrap_or_default().chars().filter(|c| !c.is_control()).take(32).collect()
}

fn blob(raw: RawBlob) -> Result<Blob, ImageError> {
    let digest = raw.digest.parse().map_err(|error| ImageError::Manifest(format!("a digest in it: {error}")))?;
    Ok(Blob { digest, bytes: raw.size, media_type: plain_media_type(raw.media_type)? })
}

fn plain_media_type(text: Option<String>) -> Result<String, ImageError> {
    let text = text.unwrap_or_default();
    if text.len() > MEDIA_TYPE_LEN_MAX || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(ImageError::Manifest("a media type in it is not one".into()));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Document, ImageError> {
        let wanted = Platform { os: "linux".into(), architecture: "amd64".into(), variant: None };
        parse(text.as_bytes(), "application/json", &wanted, &Limits::default())
    }

    const A: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    #[test]
    fn both_families_of_manifests_are_read() {
        for (own, layer) in [
            ("application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.layer.v1.tar+zstd"),
            (
                "application/vnd.docker.distribution.manifest.v2+json",
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
            ),
        ] {
            let text = format!(
                r#"{{"schemaVersion":2,"mediaType":"{own}","config":{{"mediaType":"c","digest":"{A}","size":3}},
                "layers":[{{"mediaType":"{layer}","digest":"{B}","size":5}}],"annotations":{{"x":"y"}}}}"#
            );
            let Document::Manifest(manifest) = read(&text).unwrap() else { panic!("{text}") };
            assert_eq!((manifest.media_type.as_str(), manifest.config.bytes, manifest.layers[0].bytes), (own, 3, 5));
        }
    }

    #[test]
    fn of_an_index_the_first_that_fits_is_taken_and_attestations_are_not_seen() {
        let entry = |digest: &str, rest: &str| {
            format!(
                r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":1{rest}}}"#
            )
        };
        let index = |entries: &[String]| format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
        let attestation = entry(
            A,
            r#","platform":{"os":"linux","architecture":"amd64"},"annotations":{"vnd.docker.reference.type":"attestation-manifest"}"#,
        );
        let unknown = entry(A, r#","platform":{"os":"unknown","architecture":"unknown"}"#);
        let arm = entry(A, r#","platform":{"os":"linux","architecture":"arm64","variant":"v8"}"#);
        let ours = entry(B, r#","platform":{"os":"linux","architecture":"amd64"}"#);
        let Document::Index(chosen) = read(&index(&[attestation.clone(), unknown, arm.clone(), ours])).unwrap() else {
            panic!("an index")
        };
        assert_eq!(chosen.digest.to_string(), B);
        let error = read(&index(&[attestation, arm])).unwrap_err().to_string();
        assert!(error.contains("linux/amd64") && error.contains("linux/arm64/v8"), "{error}");
    }

    #[test]
    fn what_is_hostile_is_refused_with_its_reason() {
        let layers = |count: usize| {
            let one = format!(r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{A}","size":1}}"#);
            vec![one; count].join(",")
        };
        let manifest = |config: &str, layers: &str, rest: &str| {
            format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{layers}]{rest}}}"#)
        };
        let config = format!(r#"{{"digest":"{A}","size":3}}"#);
        let huge = format!(r#"{{"digest":"{A}","size":99999999999}}"#);
        for (text, reason) in [
            ("{}".to_owned(), "cannot be read"),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(), "schema version is 1"),
            (r#"{"schemaVersion":2}"#.to_owned(), "neither an image nor an index"),
            (manifest(&config, "", r#","manifests":[]"#), "at once"),
            (manifest(&config, &layers(10_000), ""), "limit of 512 layers"),
            (manifest(&huge, "", ""), "limit of"),
            (manifest(&config, &layers(1).replace("layer.v1.tar", "config.v1+json"), ""), "no file system layer"),
            (manifest(&config.replace("sha256", "md5"), "", ""), "digest"),
            (manifest(&config.replace(":3", ":-3"), "", ""), "cannot be read"),
            (manifest(&config, "", r#","mediaType":"a\nb""#), "media type"),
        ] {
            let error = read(&text).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400)) {
            let _ = parse(&bytes, "", &Platform::host(), &Limits::default());
        }
    }
}
