//! Mounts of a sandbox and patches of its root, as users write them and as a spec stores them. Parsers of the command line's forms are
//! here so that every client has the same grammar. Nothing here touches a file.
//!
//! ```text
//!  -v SRC:DST[:OPTS]            SRC with a leading '/' or '.' is a path of the host, else the name of a volume (docker's rule)
//!  --mount-named NAME:DST[:kind=dir|disk,size=SIZE,quota=SIZE,OPTS]
//!  --mount-disk FILE:DST[:OPTS]
//!  --tmpfs PATH[:SIZE][:OPTS]   OPTS may have size=SIZE
//!  OPTS                         ro rw noexec nosuid nodev, separated by commas
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{ApiError, ErrorCode};
use crate::id::SandboxName;
use crate::quantity::parse_mib;
use crate::spec::{ROOT_SIZE_MIB_MAX, ROOT_SIZE_MIB_MIN};

/// Most mounts of one sandbox.
pub const MOUNTS_MAX: usize = 64;
/// Most patches of one sandbox.
pub const PATCHES_MAX: usize = 256;
/// Most bytes of all patches of one sandbox: they travel in one message to the agent.
pub const PATCHES_LEN_MAX: usize = 1 << 20;
/// Size of a disk volume in MiB when nobody says.
pub const VOLUME_SIZE_MIB_DEFAULT: u32 = 1 << 10;
/// Where scripts of the user are in the root; it is on PATH.
pub const SCRIPTS_DIRECTORY: &str = "/.msb/scripts";
/// Words of the options, for hints.
const OPTIONS_HINT: &str = "options are ro, rw, noexec, nosuid and nodev, separated by commas";

/// How something is mounted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MountOptions {
    /// Nothing can be written.
    pub read_only: bool,
    /// No program can be executed.
    pub no_exec: bool,
    /// Set-user-id bits and file capabilities give nothing.
    pub no_suid: bool,
    /// Device nodes cannot be opened.
    pub no_dev: bool,
}

impl MountOptions {
    /// The options as words, `ro` or `rw` first.
    #[must_use]
    pub fn words(self) -> Vec<&'static str> {
        let mut words = vec![if self.read_only { "ro" } else { "rw" }];
        words.extend(
            [(self.no_exec, "noexec"), (self.no_suid, "nosuid"), (self.no_dev, "nodev")]
                .into_iter()
                .filter_map(|(set, word)| set.then_some(word)),
        );
        words
    }

    /// Both sets together.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self {
            read_only: self.read_only || other.read_only,
            no_exec: self.no_exec || other.no_exec,
            no_suid: self.no_suid || other.no_suid,
            no_dev: self.no_dev || other.no_dev,
        }
    }
}

impl fmt::Display for MountOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words().join(","))
    }
}

/// The kinds of named volumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VolumeKind {
    /// A directory of the host, shared: several sandboxes may use it at once.
    #[default]
    Dir,
    /// A disk image with an ext4 of its own: one sandbox at a time.
    Disk,
}

impl VolumeKind {
    /// The kind as text.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dir => "dir",
            Self::Disk => "disk",
        }
    }
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum MountSource {
    /// A directory of the host, by its absolute path.
    Directory {
        /// The path.
        path: String,
    },
    /// A file of the host, by its absolute path.
    File {
        /// The path.
        path: String,
    },
    /// A named volume; made on first use.
    Named {
        /// Its name.
        #[schema(value_type = String)]
        name: SandboxName,
        /// Its kind; none: what it is, or a directory if it is made now.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        volume: Option<VolumeKind>,
        /// Size in MiB of a disk that is made now.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size_mib: Option<u32>,
        /// What a directory may hold in MiB, as far as this sandbox fills it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        quota_mib: Option<u32>,
    },
    /// A disk image of the host, by its absolute path: raw, with an ext4.
    Disk {
        /// The path.
        path: String,
    },
    /// Memory of the guest.
    Tmpfs {
        /// Its size in MiB; none: half of the guest's memory.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size_mib: Option<u32>,
    },
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(from = "StoredMount")]
pub struct Mount {
    /// Where it is seen in the sandbox, an absolute path.
    pub target: String,
    /// What it is.
    pub source: MountSource,
    /// How.
    pub options: MountOptions,
}

/// A mount as specs have it, old ones too: these had a boolean in place of the options.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredMount {
    target: String,
    source: MountSource,
    #[serde(default)]
    options: Option<MountOptions>,
    #[serde(default)]
    readonly: bool,
}

impl From<StoredMount> for Mount {
    fn from(stored: StoredMount) -> Self {
        let legacy = MountOptions { read_only: stored.readonly, ..MountOptions::default() };
        Self { target: stored.target, source: stored.source, options: stored.options.unwrap_or(legacy) }
    }
}

impl fmt::Display for Mount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            MountSource::Directory { path } | MountSource::File { path } => write!(f, "{path} on {}", self.target),
            MountSource::Disk { path } => write!(f, "disk {path} on {}", self.target),
            MountSource::Named { name, quota_mib: Some(quota), .. } => {
                write!(f, "volume {name} with at most {quota} MiB on {}", self.target)
            }
            MountSource::Named { name, .. } => write!(f, "volume {name} on {}", self.target),
            MountSource::Tmpfs { size_mib: Some(size) } => write!(f, "tmpfs of {size} MiB on {}", self.target),
            MountSource::Tmpfs { size_mib: None } => write!(f, "tmpfs on {}", self.target),
        }
    }
}

fn refuse<T>(message: String, hint: &str) -> Result<T, ApiError> {
    Err(ApiError::new(ErrorCode::InvalidConfig, message).with_hint(hint))
}

/// Options with the `key=value` pairs among them that the caller knows.
struct Words<'a> {
    options: MountOptions,
    values: Vec<(&'a str, &'a str)>,
}

fn parse_words<'a>(text: &'a str, keys: &[&str], whole: &str) -> Result<Words<'a>, ApiError> {
    let mut words = Words { options: MountOptions::default(), values: Vec::new() };
    let mut seen: Vec<&str> = Vec::new();
    let mut hint = OPTIONS_HINT.to_owned();
    if !keys.is_empty() {
        hint = format!("{hint}, and {}=", keys.join("=, "));
    }
    for word in text.split(',') {
        let key = word.split_once('=').map_or(word, |(key, _)| key);
        if seen.contains(&key) {
            return refuse(format!("option {key:?} is given twice in {whole:?}"), "give it once");
        }
        if (key == "ro" && seen.contains(&"rw")) || (key == "rw" && seen.contains(&"ro")) {
            return refuse(
                format!("{whole:?} has both ro and rw"),
                "choose one; rw is what a mount is without options",
            );
        }
        seen.push(key);
        match (word, word.split_once('=')) {
            ("ro", _) => words.options.read_only = true,
            ("rw", _) => {}
            ("noexec", _) => words.options.no_exec = true,
            ("nosuid", _) => words.options.no_suid = true,
            ("nodev", _) => words.options.no_dev = true,
            ("exec" | "suid" | "dev", _) => {
                return refuse(
                    format!("{whole:?} has the option {word:?}"),
                    &format!("leave it out: a mount is so without no{word}"),
                );
            }
            (_, Some((key, value))) if keys.contains(&key) => words.values.push((key, value)),
            _ => return refuse(format!("{word:?} in {whole:?} is no option of a mount"), &hint),
        }
    }
    Ok(words)
}

/// Options without values; none are the defaults.
fn plain_options(words: Option<&str>, whole: &str) -> Result<MountOptions, ApiError> {
    words.map_or(Ok(MountOptions::default()), |words| parse_words(words, &[], whole).map(|words| words.options))
}

/// `SRC:DST[:OPTS]` in its parts.
fn split<'a>(text: &'a str, form: &str) -> Result<(&'a str, &'a str, Option<&'a str>), ApiError> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match parts.as_slice() {
        [source, target] => (*source, *target, None),
        [source, target, options] => (*source, *target, Some(*options)),
        _ => return refuse(format!("{text:?} is no mount"), &format!("write it as {form}")),
    };
    if source.is_empty() || target.is_empty() || options == Some("") {
        return refuse(format!("{text:?} has an empty part"), &format!("write it as {form}"));
    }
    if options.is_none() && target.contains(',') {
        let (path, rest) = target.split_once(',').unwrap_or((target, ""));
        return refuse(
            format!("the path {target:?} has a comma"),
            &format!("options follow a colon: {source}:{path}:{rest}"),
        );
    }
    Ok((source, target, options))
}

fn parse_size(value: &str, whole: &str) -> Result<u32, ApiError> {
    match parse_mib(value) {
        Ok(0) => refuse(format!("the size in {whole:?} is 0"), "give a size, as in 64M"),
        Ok(size) => Ok(size),
        Err(error) => refuse(format!("in {whole:?}: {error}"), "give a size, as in 64M"),
    }
}

/// Whether the source of `-v` is a path, by docker's rule.
#[must_use]
pub fn is_path(source: &str) -> bool {
    source.starts_with(['/', '.', '~'])
}

impl Mount {
    /// `-v SRC:DST[:OPTS]`. Paths stay as they are written: the caller knows its own directory, and whether one is a file.
    ///
    /// # Errors
    /// `invalid_config` or `invalid_name`, with a hint.
    pub fn parse_volume(text: &str) -> Result<Self, ApiError> {
        let (source, target, options) = split(text, "SRC:DST[:OPTS]")?;
        if !is_path(source) {
            return Self::parse_named(text);
        }
        let options = plain_options(options, text)?;
        Ok(Self { target: target.into(), source: MountSource::Directory { path: source.into() }, options })
    }

    /// `--mount-named NAME:DST[:kind=dir|disk,size=SIZE,quota=SIZE,OPTS]`.
    ///
    /// # Errors
    /// As [`Mount::parse_volume`].
    pub fn parse_named(text: &str) -> Result<Self, ApiError> {
        let (source, target, options) = split(text, "NAME:DST[:kind=dir|disk,size=SIZE,quota=SIZE,OPTS]")?;
        let name = volume_name(source)?;
        let words = options.map(|words| parse_words(words, &["kind", "size", "quota"], text)).transpose()?;
        let (mut volume, mut size_mib, mut quota_mib) = (None, None, None);
        for (key, value) in words.iter().flat_map(|words| &words.values) {
            match (*key, *value) {
                ("kind", "dir") => volume = Some(VolumeKind::Dir),
                ("kind", "disk") => volume = Some(VolumeKind::Disk),
                ("size", value) => size_mib = Some(parse_size(value, text)?),
                ("quota", value) => quota_mib = Some(parse_size(value, text)?),
                _ => return refuse(format!("{value:?} is no kind of volume"), "it is kind=dir or kind=disk"),
            }
        }
        if size_mib.is_some() && volume != Some(VolumeKind::Disk) {
            return refuse(format!("{text:?} has a size and is no disk"), "only kind=disk has a size");
        }
        if quota_mib.is_some() && volume == Some(VolumeKind::Disk) {
            return refuse(format!("{text:?} has a quota and is a disk"), "a disk ends at its size; give size=");
        }
        let options = words.map(|words| words.options).unwrap_or_default();
        Ok(Self { target: target.into(), source: MountSource::Named { name, volume, size_mib, quota_mib }, options })
    }

    /// `--mount-disk FILE:DST[:OPTS]`.
    ///
    /// # Errors
    /// As [`Mount::parse_volume`].
    pub fn parse_disk(text: &str) -> Result<Self, ApiError> {
        let (source, target, options) = split(text, "FILE:DST[:OPTS]")?;
        let options = plain_options(options, text)?;
        Ok(Self { target: target.into(), source: MountSource::Disk { path: source.into() }, options })
    }

    /// `--mount-dir SRC:DST[:OPTS]` and `--mount-file SRC:DST[:OPTS]`: the source is a path whatever it looks like.
    ///
    /// # Errors
    /// As [`Mount::parse_volume`].
    pub fn parse_path(text: &str, file: bool) -> Result<Self, ApiError> {
        let (source, target, options) = split(text, "SRC:DST[:OPTS]")?;
        let options = plain_options(options, text)?;
        let path = source.to_owned();
        let source = if file { MountSource::File { path } } else { MountSource::Directory { path } };
        Ok(Self { target: target.into(), source, options })
    }

    /// `--tmpfs PATH[:SIZE][:OPTS]`.
    ///
    /// # Errors
    /// As [`Mount::parse_volume`].
    pub fn parse_tmpfs(text: &str) -> Result<Self, ApiError> {
        let mut parts = text.split(':');
        let target = parts.next().unwrap_or_default();
        let rest: Vec<&str> = parts.collect();
        let is_size = |part: &str| part.starts_with(|c: char| c.is_ascii_digit());
        let (size, options) = match rest.as_slice() {
            [] => (None, None),
            [one] if is_size(one) => (Some(*one), None),
            [one] => (None, Some(*one)),
            [size, options] => (Some(*size), Some(*options)),
            _ => return refuse(format!("{text:?} is no tmpfs"), "write it as PATH[:SIZE][:OPTS]"),
        };
        if rest.is_empty() && target.contains(',') {
            let (path, rest) = target.split_once(',').unwrap_or((target, ""));
            return refuse(
                format!("the path {target:?} has a comma"),
                &format!("options follow a colon: {path}:{rest}"),
            );
        }
        let mut size_mib = size.map(|size| parse_size(size, text)).transpose()?;
        let words = options.map(|words| parse_words(words, &["size"], text)).transpose()?;
        for (_, value) in words.iter().flat_map(|words| &words.values) {
            if size_mib.is_some() {
                return refuse(format!("{text:?} has two sizes"), "give it once, as in /cache:64M:noexec");
            }
            size_mib = Some(parse_size(value, text)?);
        }
        let options = words.map(|words| words.options).unwrap_or_default();
        Ok(Self { target: target.into(), source: MountSource::Tmpfs { size_mib }, options })
    }

    /// Checks a mount against what a sandbox has already.
    fn check(&self) -> Result<(), ApiError> {
        check_target(&self.target, "a mount")?;
        // What the guest's own file systems cover would not be seen, or would hide what programs and the profile rely on.
        let inside = |directory: &str| {
            self.target == directory || self.target.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'))
        };
        if (inside("/proc") || inside("/sys") || inside("/dev")) && !inside("/dev/shm") {
            return refuse(
                format!("nothing can be mounted at {}: the guest's own file systems are there", self.target),
                "choose a path outside of /proc, /sys and /dev; /dev/shm is allowed",
            );
        }
        match &self.source {
            MountSource::Directory { path } | MountSource::File { path } | MountSource::Disk { path } => {
                check_target(path, "the source of a mount").map(drop)
            }
            MountSource::Named { size_mib: Some(size), .. }
                if !(ROOT_SIZE_MIB_MIN..=ROOT_SIZE_MIB_MAX).contains(size) =>
            {
                refuse(
                    format!("a disk of {size} MiB cannot be made"),
                    &format!("give {ROOT_SIZE_MIB_MIN} to {ROOT_SIZE_MIB_MAX} MiB"),
                )
            }
            MountSource::Named { .. } | MountSource::Tmpfs { .. } => Ok(()),
        }
    }
}

/// The name of a volume: the rule is that of sandboxes.
///
/// # Errors
/// `invalid_name`.
pub fn volume_name(text: &str) -> Result<SandboxName, ApiError> {
    SandboxName::parse(text).map_err(|mut error| {
        error.message = error.message.replacen("sandbox name", "volume name", 1);
        error.hint = format!("{}; a path begins with '/' or './'", error.hint);
        error
    })
}

/// Absolute, bounded, normal, and not the root itself.
fn check_target(path: &str, what: &str) -> Result<(), ApiError> {
    let normal = path.starts_with('/')
        && path.len() <= 4096
        && !path.contains('\0')
        && !path.trim_end_matches('/').is_empty()
        && !path.split('/').any(|part| part == ".." || part == ".");
    if normal {
        Ok(())
    } else {
        refuse(
            format!("the path {path:?} of {what} is not absolute, or is /, or has . or .. in it"),
            "give a whole path, as in /data",
        )
    }
}

/// The path without doubled and trailing slashes, for comparisons.
#[must_use]
pub fn normal(path: &str) -> String {
    path.split('/').filter(|part| !part.is_empty()).fold(String::new(), |whole, part| whole + "/" + part)
}

/// Checks all mounts of a sandbox.
///
/// # Errors
/// `invalid_config` naming the mount.
pub fn check_mounts(mounts: &[Mount]) -> Result<(), ApiError> {
    if mounts.len() > MOUNTS_MAX {
        return refuse(format!("{} mounts are too many", mounts.len()), &format!("at most {MOUNTS_MAX}"));
    }
    let mut targets = Vec::with_capacity(mounts.len());
    for mount in mounts {
        mount.check()?;
        let target = normal(&mount.target);
        if targets.contains(&target) {
            return refuse(format!("two mounts are on {target}"), "give each its own path");
        }
        targets.push(target);
    }
    Ok(())
}

/// One change of the root before the first workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Patch {
    /// A file or link of the host, or one below a directory of it.
    File {
        /// Where it goes.
        path: String,
        /// Its bytes, in JSON as hexadecimal digits.
        #[serde(with = "hex_bytes")]
        #[schema(value_type = String)]
        content: Vec<u8>,
        /// Its mode.
        mode: u32,
    },
    /// A symbolic link.
    Link {
        /// Where it goes.
        path: String,
        /// What it says.
        to: String,
    },
    /// A directory with its parents.
    Mkdir {
        /// Where.
        path: String,
        /// Its mode.
        mode: u32,
    },
    /// Remove a file, or a directory with everything in it; one that is not there is no error.
    Remove {
        /// Which.
        path: String,
    },
}

impl Patch {
    /// The path that it changes.
    #[must_use]
    pub fn path(&self) -> &str {
        match self {
            Self::File { path, .. } | Self::Link { path, .. } | Self::Mkdir { path, .. } | Self::Remove { path } => {
                path
            }
        }
    }
}

/// Bytes in JSON as a text of hexadecimal digits: half the length of a list of numbers.
pub mod hex_bytes {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// Writes them.
    ///
    /// # Errors
    /// The serialiser's.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |value: u8| char::from(DIGITS[usize::from(value & 15)]);
        let text: String = bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect();
        serializer.serialize_str(&text)
    }

    /// Reads them.
    ///
    /// # Errors
    /// For anything but pairs of digits.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        let pair = |pair: &[u8]| {
            let value = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
            match pair {
                [high, low] => Some(value(*high)? << 4 | value(*low)?),
                _ => None,
            }
        };
        text.as_bytes()
            .chunks(2)
            .map(pair)
            .collect::<Option<_>>()
            .ok_or_else(|| D::Error::custom("no hexadecimal bytes"))
    }
}

/// Checks all patches of a sandbox.
///
/// # Errors
/// `invalid_config` naming the path.
pub fn check_patches(patches: &[Patch]) -> Result<(), ApiError> {
    let bytes: usize = patches
        .iter()
        .map(|patch| patch.path().len() + if let Patch::File { content, .. } = patch { content.len() } else { 0 })
        .sum();
    if patches.len() > PATCHES_MAX || bytes > PATCHES_LEN_MAX {
        return refuse(
            format!("{} patches with {bytes} bytes are too many", patches.len()),
            &format!(
                "at most {PATCHES_MAX} with {PATCHES_LEN_MAX} bytes; mount a directory with -v in place of copying"
            ),
        );
    }
    patches.iter().try_for_each(|patch| check_target(patch.path(), "a patch"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(mount: Result<Mount, ApiError>) -> String {
        mount.map_or_else(|error| format!("! {} ({})", error.message, error.hint), |m| format!("{m} ({})", m.options))
    }

    #[test]
    fn volumes_are_paths_or_names_by_dockers_rule() {
        for (text, expected) in [
            ("/a:/b", "/a on /b (rw)"),
            ("./a:/b:ro", "./a on /b (ro)"),
            ("../a:/b:ro,noexec,nosuid,nodev", "../a on /b (ro,noexec,nosuid,nodev)"),
            ("data:/b", "volume data on /b (rw)"),
            ("data:/b:nodev,rw", "volume data on /b (rw,nodev)"),
        ] {
            assert_eq!(shown(Mount::parse_volume(text)), expected, "{text}");
        }
    }

    #[test]
    fn wrong_options_are_refused_with_a_hint() {
        for (text, part) in [
            ("/a:/b:ro,rw", "has both ro and rw"),
            ("/a:/b:ro,ro", "given twice"),
            ("/a:/b:suid", "without nosuid"),
            ("/a:/b:z", "is no option"),
            ("/a:/b,ro", "/a:/b:ro"),
            ("/a:/b:size=1", "is no option"),
            ("/a", "SRC:DST"),
            ("/a:/b:ro:x", "SRC:DST"),
            (":/b", "empty part"),
            ("/a:/b:", "empty part"),
            ("a b:/b", "volume name"),
            ("data:/b:size=1G", "only kind=disk"),
            ("data:/b:kind=tape", "kind=dir or kind=disk"),
            ("data:/b:kind=disk,size=0", "is 0"),
            ("data:/b:kind=disk,quota=1G", "a disk ends at its size"),
        ] {
            let text = (text, shown(Mount::parse_volume(text)));
            assert!(text.1.starts_with('!') && text.1.contains(part), "{text:?}");
        }
    }

    #[test]
    fn tmpfs_has_one_size_wherever_it_stands() {
        for (text, expected) in [
            ("/t", "tmpfs on /t (rw)"),
            ("/t:64M", "tmpfs of 64 MiB on /t (rw)"),
            ("/t:64M:noexec", "tmpfs of 64 MiB on /t (rw,noexec)"),
            ("/t:rw,size=64m", "tmpfs of 64 MiB on /t (rw)"),
        ] {
            assert_eq!(shown(Mount::parse_tmpfs(text)), expected, "{text}");
        }
        for text in ["/t:1M:size=2M", "/t:size=1M,size=2M", "/t,ro", "/t:ro,rw", "/t:1Q", "/t:a:b:c"] {
            assert!(Mount::parse_tmpfs(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_old_boolean_is_read_and_never_written() {
        let old = r#"{"target":"/d","source":{"kind":"directory","path":"/s"},"readonly":true}"#;
        let mount: Mount = serde_json::from_str(old).unwrap();
        assert_eq!(mount.options.to_string(), "ro");
        assert!(!serde_json::to_string(&mount).unwrap().contains("readonly"));
        let both = r#"{"target":"/d","source":{"kind":"tmpfs"},"readonly":true,"options":{"no_dev":true}}"#;
        let mount: Mount = serde_json::from_str(both).unwrap();
        assert_eq!(mount.options.to_string(), "rw,nodev");
    }

    #[test]
    fn patches_round_trip_and_are_bounded() {
        let patch = Patch::File { path: "/f".into(), content: vec![0, 0x7f, 0xff], mode: 0o755 };
        let json = serde_json::to_string(&patch).unwrap();
        assert!(json.contains("007fff"), "{json}");
        assert_eq!(serde_json::from_str::<Patch>(&json).unwrap(), patch);
        assert!(serde_json::from_str::<Patch>(&json.replace("007fff", "7fx")).is_err());
        check_patches(std::slice::from_ref(&patch)).unwrap();
        let large = Patch::File { path: "/f".into(), content: vec![0; PATCHES_LEN_MAX], mode: 0 };
        assert!(check_patches(&[large]).is_err());
        assert!(check_patches(&[Patch::Remove { path: "/".into() }]).is_err());
    }

    #[test]
    fn targets_are_whole_distinct_and_outside_of_the_guests_own() {
        let tmpfs = |target: &str| Mount::parse_tmpfs(target).unwrap();
        let check = |targets: &[&str]| check_mounts(&targets.iter().map(|t| tmpfs(t)).collect::<Vec<_>>());
        check(&["/a", "/a/b", "/dev/shm"]).unwrap();
        for bad in [&["/"][..], &["a"], &["/a/../b"], &["/proc/x"], &["/dev"], &["/a", "//a/"]] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }
}
