//! Image references as docker writes them: `busybox` means `docker.io/library/busybox:latest`.
//!
//! Grammar of the distribution project's reference package. Parsing is pure; it never asks a registry or the store.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::digest::Digest;
use crate::error::ImageError;

const DEFAULT_REGISTRY: &str = "docker.io";
const DEFAULT_NAMESPACE: &str = "library/";
const DEFAULT_TAG: &str = "latest";
/// Longest registry and repository together.
const NAME_MAX_BYTES: usize = 255;
/// Longest tag.
const TAG_MAX_BYTES: usize = 128;

/// A complete image reference: registry, repository, and a tag or digest or both.
///
/// `Display` writes the complete form, [`short`](Self::short) what people type.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageReference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl ImageReference {
    /// Registry host with port, `docker.io` when none was given.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Repository path, with `library/` where docker puts it.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; `latest` when neither tag nor digest was given.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The manifest digest, if the reference pins one.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The form people type: `busybox:latest`, `ghcr.io/team/tool:1`.
    #[must_use]
    pub fn short(&self) -> String {
        let mut text = String::new();
        if self.registry == DEFAULT_REGISTRY {
            text.push_str(self.repository.strip_prefix(DEFAULT_NAMESPACE).unwrap_or(&self.repository));
        } else {
            text.push_str(&self.registry);
            text.push('/');
            text.push_str(&self.repository);
        }
        self.push_suffix(&mut text);
        text
    }

    /// The name alone, for a reference that has one and pins no digest.
    #[must_use]
    pub fn tagged(&self) -> Option<Self> {
        (self.tag.is_some() && self.digest.is_none()).then(|| self.clone())
    }

    fn push_suffix(&self, text: &mut String) {
        if let Some(tag) = &self.tag {
            text.push(':');
            text.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            text.push('@');
            text.push_str(&digest.to_string());
        }
    }
}

impl FromStr for ImageReference {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        parse(text).map_err(|reason| ImageError::InvalidReference { text: text.chars().take(300).collect(), reason })
    }
}

fn parse(text: &str) -> Result<ImageReference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => {
            (rest, Some(digest.parse::<Digest>().map_err(|_| "the digest is not sha256: and 64 hex digits")?))
        }
        None => (text, None),
    };
    // A colon after the last slash starts the tag; one before it belongs to the registry's port.
    let (name, tag) = match rest.rfind(':') {
        Some(colon) if !rest[colon..].contains('/') => (&rest[..colon], Some(&rest[colon + 1..])),
        _ => (rest, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (registry, path) = match name.split_once('/') {
        Some((first, path)) if is_registry(first) => (first, path),
        _ => (DEFAULT_REGISTRY, name),
    };
    // docker's old spelling of its own registry.
    let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
    check_registry(registry)?;
    check_path(path)?;
    let repository = if registry == DEFAULT_REGISTRY && !path.contains('/') {
        format!("{DEFAULT_NAMESPACE}{path}")
    } else {
        path.to_string()
    };
    if registry.len() + repository.len() + 1 > NAME_MAX_BYTES {
        return Err("the name is longer than 255 bytes");
    }
    let tag = match (tag, digest) {
        (Some(tag), _) => Some(tag.to_string()),
        (None, None) => Some(DEFAULT_TAG.to_string()),
        (None, Some(_)) => None,
    };
    Ok(ImageReference { registry: registry.to_string(), repository, tag, digest })
}

/// Whether the part before the first slash is a registry and not a namespace.
fn is_registry(first: &str) -> bool {
    first.contains(['.', ':']) || first == "localhost" || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn check_registry(registry: &str) -> Result<(), &'static str> {
    const REASON: &str = "the registry is not a host name with an optional port";
    let (host, port) = if let Some(rest) = registry.strip_prefix('[') {
        let (address, after) = rest.split_once(']').ok_or(REASON)?;
        address.parse::<std::net::Ipv6Addr>().map_err(|_| REASON)?;
        ("", if after.is_empty() { None } else { Some(after.strip_prefix(':').ok_or(REASON)?) })
    } else {
        match registry.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (registry, None),
        }
    };
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return Err(REASON);
    }
    if registry.starts_with('[') {
        return Ok(());
    }
    let label_ok = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if host.split('.').all(label_ok) { Ok(()) } else { Err(REASON) }
}

fn check_path(path: &str) -> Result<(), &'static str> {
    if path.is_empty() {
        return Err("the name is empty");
    }
    if path.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("the name must be lower case");
    }
    if path.split('/').all(is_path_component) {
        Ok(())
    } else {
        Err("the name takes lower-case letters and digits, joined by '.', '_', '__' or '-' and separated by '/'")
    }
}

/// `[a-z0-9]+` runs joined by `.`, `_`, `__` or dashes.
fn is_path_component(component: &str) -> bool {
    let bytes = component.as_bytes();
    let mut at = 0;
    loop {
        let run = bytes[at..].iter().take_while(|b| b.is_ascii_lowercase() || b.is_ascii_digit()).count();
        if run == 0 {
            return false;
        }
        at += run;
        let separator = bytes[at..].iter().take_while(|b| matches!(b, b'.' | b'_' | b'-')).count();
        match &bytes[at..at + separator] {
            [] => return at == bytes.len(),
            b"." | b"_" | b"__" => {}
            dashes if dashes.iter().all(|b| *b == b'-') => {}
            _ => return false,
        }
        at += separator;
    }
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let mut bytes = tag.bytes();
    let first_ok = bytes.next().is_some_and(word);
    if first_ok && tag.len() <= TAG_MAX_BYTES && bytes.all(|b| word(b) || matches!(b, b'.' | b'-')) {
        Ok(())
    } else {
        Err("a tag has 1 to 128 letters, digits, '_', '.' or '-' and starts with neither '.' nor '-'")
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = format!("{}/{}", self.registry, self.repository);
        self.push_suffix(&mut text);
        f.write_str(&text)
    }
}

impl Serialize for ImageReference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ImageReference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn references_are_completed_as_docker_does() {
        for (typed, complete, short) in [
            ("busybox", "docker.io/library/busybox:latest", "busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36", "busybox:1.36"),
            ("team/app", "docker.io/team/app:latest", "team/app:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
            ("index.docker.io/library/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
            ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
            ("localhost:5000/a/b:v1", "localhost:5000/a/b:v1", "localhost:5000/a/b:v1"),
            ("127.0.0.1:5000/x", "127.0.0.1:5000/x:latest", "127.0.0.1:5000/x:latest"),
            ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
            ("ghcr.io/a__b/c-d.e_f", "ghcr.io/a__b/c-d.e_f:latest", "ghcr.io/a__b/c-d.e_f:latest"),
        ] {
            let reference: ImageReference = typed.parse().unwrap();
            assert_eq!(reference.to_string(), complete, "{typed}");
            assert_eq!(reference.short(), short, "{typed}");
            assert_eq!(short.parse::<ImageReference>().unwrap(), reference);
        }
        let pinned: ImageReference = format!("busybox@sha256:{HEX}").parse().unwrap();
        assert_eq!(pinned.to_string(), format!("docker.io/library/busybox@sha256:{HEX}"));
        assert_eq!(pinned.tag(), None);
        let both: ImageReference = format!("busybox:1@sha256:{HEX}").parse().unwrap();
        assert_eq!(both.tag(), Some("1"));
        assert_eq!(both.digest(), Some(Digest::of(b"")));
    }

    #[test]
    fn what_docker_refuses_is_refused() {
        let long_tag = format!("a:{}", "x".repeat(129));
        let long_name = "a/".repeat(127) + "abc";
        for bad in [
            "",
            ":",
            "a:",
            "@",
            "Busybox",
            "a//b",
            "/a",
            "a/",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a.-b",
            "a b",
            "a:b:c",
            "a:-x",
            "a@sha256:12",
            "a@md5:00",
            "localhost:99999/x",
            "[::g]/x",
            "http://x/y",
            "<none>:<none>",
            "ex_ample.com:80/x",
            "a\0",
            "é",
            &long_tag,
            &long_name,
        ] {
            assert!(matches!(bad.parse::<ImageReference>(), Err(ImageError::InvalidReference { .. })), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_printing_parses_back(text in "\\PC{0,60}") {
            if let Ok(reference) = text.parse::<ImageReference>() {
                prop_assert_eq!(&reference.to_string().parse::<ImageReference>().unwrap(), &reference);
                prop_assert_eq!(&reference.short().parse::<ImageReference>().unwrap(), &reference);
            }
        }

        #[test]
        fn plausible_references_round_trip(text in "([a-z]{1,4}[.:][0-9]{1,3}/)?[a-z0-9._-]{1,6}(/[a-z0-9._-]{1,6}){0,2}(:[A-Za-z0-9._-]{1,5})?") {
            if let Ok(reference) = text.parse::<ImageReference>() {
                prop_assert_eq!(&reference.short().parse::<ImageReference>().unwrap(), &reference);
            }
        }
    }
}
