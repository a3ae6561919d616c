//! Settings: one table of keys, the layers they come from, and which layer won.
//!
//! A flag wins over an `MSB_*` variable, that over `$MSB_HOME/config.toml`, that over `/etc/msb/config.toml`, that over the
//! default. Callers read the files; this module parses and merges. An unknown key or a wrong value names its file and line.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{ApiError, ErrorCode};
use crate::images::RegistryTable;
use crate::quantity;

/// What kind of value a setting takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SettingKind {
    /// A whole number in a range, both ends included.
    Number {
        /// Least value.
        min: u64,
        /// Most value.
        max: u64,
    },
    /// A size ([`quantity::parse_bytes`]).
    Size,
    /// A duration ([`quantity::parse_duration_ms`]).
    Duration,
    /// One of these words.
    Word(&'static [&'static str]),
    /// A path.
    Path,
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Dotted key in the file.
    pub key: &'static str,
    /// Environment variable.
    pub variable: &'static str,
    /// What it takes.
    pub kind: SettingKind,
    /// Value when no layer says; empty: unset.
    pub default: &'static str,
    /// What it means.
    pub meaning: &'static str,
}

/// Every setting, in the order of the documentation.
pub const SETTINGS: &[Setting] = &[
    Setting {
        key: "log_level",
        variable: "MSB_LOG_LEVEL",
        kind: SettingKind::Word(&["error", "warn", "info", "debug", "trace"]),
        default: "info",
        meaning: "how much msbd and msb-vmm log",
    },
    Setting {
        key: "engine",
        variable: "MSB_ENGINE",
        kind: SettingKind::Word(&["auto", "kvm", "qemu"]),
        default: "auto",
        meaning: "engine of sandboxes for which nobody names one",
    },
    Setting {
        key: "kernel",
        variable: "MSB_KERNEL",
        kind: SettingKind::Path,
        default: "",
        meaning: "guest kernel in place of the installed one",
    },
    Setting {
        key: "qemu",
        variable: "MSB_QEMU",
        kind: SettingKind::Path,
        default: "",
        meaning: "QEMU program in place of qemu-system-x86_64 in PATH",
    },
    Setting {
        key: "boot_timeout",
        variable: "MSB_BOOT_TIMEOUT",
        kind: SettingKind::Duration,
        default: "60s",
        meaning: "time for the guest's agent to be ready",
    },
    Setting {
        key: "disk_full_timeout",
        variable: "MSB_DISK_FULL_TIMEOUT",
        kind: SettingKind::Duration,
        default: "60s",
        meaning: "time that guest writes wait for room on a full host disk before they fail",
    },
    Setting {
        key: "sandbox.cpus",
        variable: "MSB_CPUS",
        kind: SettingKind::Number { min: 1, max: 32 },
        default: "1",
        meaning: "virtual CPUs",
    },
    Setting {
        key: "sandbox.memory",
        variable: "MSB_MEMORY",
        kind: SettingKind::Size,
        default: "512M",
        meaning: "memory of the guest",
    },
    Setting {
        key: "sandbox.root_size",
        variable: "MSB_ROOT_SIZE",
        kind: SettingKind::Size,
        default: "8G",
        meaning: "size of the writable root; it takes host space only as it fills",
    },
    Setting {
        key: "sandbox.stop_grace",
        variable: "MSB_STOP_GRACE",
        kind: SettingKind::Duration,
        default: "8s",
        meaning: "time between the stop signal and the kill",
    },
    Setting {
        key: "images.keep_size",
        variable: "MSB_IMAGES_KEEP_SIZE",
        kind: SettingKind::Size,
        default: "",
        meaning: "after a pull or load, remove the longest unused images until their blobs take no more than this; unset: never",
    },
    Setting {
        key: "images.free_reserve",
        variable: "MSB_IMAGES_FREE_RESERVE",
        kind: SettingKind::Size,
        default: "",
        meaning: "after a pull or load, remove the longest unused images until this much of the disk is free; unset: never",
    },
    Setting {
        key: "metrics.sample_interval",
        variable: "MSB_METRICS_SAMPLE_INTERVAL",
        kind: SettingKind::Duration,
        default: "1s",
        meaning: "time between two samples of a virtual machine; less than 100ms counts as that, more than 10s as 10s",
    },
    Setting {
        key: "logs.size_max",
        variable: "MSB_LOG_SIZE_MAX",
        kind: SettingKind::Size,
        default: "10M",
        meaning: "size at which a sandbox's log is rotated",
    },
    Setting {
        key: "logs.files_max",
        variable: "MSB_LOG_FILES_MAX",
        kind: SettingKind::Number { min: 1, max: 100 },
        default: "3",
        meaning: "rotated logs kept for each sandbox",
    },
];

/// The one key of a file that is no setting: tables of registries.
const REGISTRIES: &str = "registries";

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "from")]
pub enum Origin {
    /// The table.
    Default,
    /// A file and its line, from 1.
    File {
        /// The file's path.
        path: String,
        /// The line, from 1.
        line: usize,
    },
    /// An environment variable.
    Variable {
        /// Its name.
        name: String,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{path}:{line}"),
            Self::Variable { name } => write!(f, "${name}"),
        }
    }
}

/// Merged settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    values: BTreeMap<&'static str, (String, Origin)>,
    registries: RegistryTable,
}

/// The tables of registries in a file; the rest of the file is the settings' business.
#[derive(Deserialize)]
struct RegistryTables {
    #[serde(default)]
    registries: RegistryTable,
}

impl Default for Config {
    fn default() -> Self {
        let values = SETTINGS.iter().map(|s| (s.key, (s.default.to_owned(), Origin::Default))).collect();
        Self { values, registries: RegistryTable::new() }
    }
}

impl Config {
    /// Merges files, lowest layer first, and the environment over them.
    ///
    /// # Errors
    /// `config_file` naming file and line, or the variable.
    pub fn merge(files: &[(&str, &str)], variable: impl Fn(&str) -> Option<String>) -> Result<Self, ApiError> {
        let mut config = Self::default();
        for (path, text) in files {
            config.take_file(path, text)?;
        }
        for setting in SETTINGS {
            if let Some(value) = variable(setting.variable).filter(|value| !value.is_empty()) {
                check(setting, &value).map_err(|why| refuse(format!("${}: {why}", setting.variable)))?;
                config.values.insert(setting.key, (value, Origin::Variable { name: setting.variable.into() }));
            }
        }
        Ok(config)
    }

    fn take_file(&mut self, path: &str, text: &str) -> Result<(), ApiError> {
        let line_of = |at: usize| text[..at.min(text.len())].matches('\n').count() + 1;
        let at = |line: usize, why: &str| refuse(format!("{path}:{line}: {why}"));
        let document: toml::Spanned<toml::de::DeTable<'_>> = toml::de::DeTable::parse(text).map_err(|error| {
            let line = line_of(error.span().map_or(0, |span| span.start));
            at(line, error.message())
        })?;
        let tables: RegistryTables = toml::from_str(text).map_err(|error| {
            let line = line_of(error.span().map_or(0, |span| span.start));
            at(line, error.message())
        })?;
        // A later layer says everything about a registry or nothing.
        self.registries.extend(tables.registries);
        let mut found = Vec::new();
        flatten("", document.get_ref(), &mut found);
        for (key, position, value) in found {
            let line = line_of(position);
            let Some(setting) = SETTINGS.iter().find(|setting| setting.key == key) else {
                let near = SETTINGS.iter().map(|s| s.key).min_by_key(|known| distance(known, &key));
                return Err(at(line, &format!("unknown key '{key}'; did you mean '{}'?", near.unwrap_or_default())));
            };
            let value = value.ok_or_else(|| at(line, &format!("'{key}' takes a text or a number")))?;
            check(setting, &value).map_err(|why| at(line, &format!("'{key}': {why}")))?;
            self.values.insert(setting.key, (value, Origin::File { path: path.into(), line }));
        }
        Ok(())
    }

    /// Settings of registries: the tables `[registries."host:port"]`.
    #[must_use]
    pub fn registries(&self) -> &RegistryTable {
        &self.registries
    }

    /// Every setting with its value and where that came from, in the order of the table. Unset values are empty.
    pub fn iter(&self) -> impl Iterator<Item = (&'static Setting, &str, &Origin)> {
        SETTINGS
            .iter()
            .filter_map(|setting| self.values.get(setting.key).map(|(value, origin)| (setting, value.as_str(), origin)))
    }

    /// The text of a setting; `None` if it is unset or unknown.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(|(value, _)| value.as_str()).filter(|value| !value.is_empty())
    }

    /// A whole number. Values were checked when merged, so what is here parses.
    #[must_use]
    pub fn number(&self, key: &str) -> u64 {
        self.text(key).and_then(|value| value.parse().ok()).unwrap_or_default()
    }

    /// A size in bytes.
    #[must_use]
    pub fn bytes(&self, key: &str) -> u64 {
        self.text(key).and_then(|value| quantity::parse_bytes(value).ok()).unwrap_or_default()
    }

    /// A duration in milliseconds.
    #[must_use]
    pub fn duration_ms(&self, key: &str) -> u64 {
        self.text(key).and_then(|value| quantity::parse_duration_ms(value).ok()).unwrap_or_default()
    }
}

fn refuse(message: String) -> ApiError {
    ApiError::new(ErrorCode::ConfigFile, message)
}

fn flatten(prefix: &str, table: &toml::de::DeTable<'_>, found: &mut Vec<(String, usize, Option<String>)>) {
    for (key, value) in table {
        if prefix.is_empty() && key.get_ref() == REGISTRIES {
            continue;
        }
        let name = if prefix.is_empty() { key.get_ref().to_string() } else { format!("{prefix}.{}", key.get_ref()) };
        match value.get_ref() {
            toml::de::DeValue::Table(inner) => flatten(&name, inner, found),
            toml::de::DeValue::String(text) => found.push((name, key.span().start, Some(text.to_string()))),
            toml::de::DeValue::Integer(number) => found.push((name, key.span().start, Some(number.to_string()))),
            _ => found.push((name, key.span().start, None)),
        }
    }
}

fn check(setting: &Setting, value: &str) -> Result<(), String> {
    match setting.kind {
        SettingKind::Number { min, max } => match value.parse::<u64>() {
            Ok(number) if (min..=max).contains(&number) => Ok(()),
            _ => Err(format!("{value:?} is not a whole number from {min} to {max}")),
        },
        SettingKind::Size => quantity::parse_bytes(value).map(drop).map_err(|error| error.to_string()),
        SettingKind::Duration => quantity::parse_duration_ms(value).map(drop).map_err(|error| error.to_string()),
        SettingKind::Word(words) if words.contains(&value) => Ok(()),
        SettingKind::Word(words) => Err(format!("{value:?} is not one of {}", words.join(", "))),
        SettingKind::Path if value.contains('\0') => Err("a path cannot have a zero byte".into()),
        SettingKind::Path => Ok(()),
    }
}

/// Levenshtein distance, for "did you mean". Keys are short, files are the user's own.
pub(crate) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let cost = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_pass_their_own_checks() {
        for setting in SETTINGS.iter().filter(|s| !s.default.is_empty()) {
            check(setting, setting.default).unwrap();
        }
    }

    #[test]
    fn later_layers_win_and_remember_where_they_came_from() {
        let system = "engine = \"qemu\"\n[sandbox]\ncpus = 2\nmemory = \"1G\"\n";
        let user = "\n[sandbox]\nmemory = \"256M\"\n";
        let config =
            Config::merge(&[("/etc/c", system), ("~/c", user)], |name| (name == "MSB_CPUS").then(|| "3".into()))
                .unwrap();
        assert_eq!(config.text("engine"), Some("qemu"));
        assert_eq!((config.number("sandbox.cpus"), config.bytes("sandbox.memory")), (3, 256 << 20));
        assert_eq!(config.duration_ms("sandbox.stop_grace"), 8_000);
        let origins: BTreeMap<_, _> = config.iter().map(|(s, _, o)| (s.key, o.to_string())).collect();
        assert_eq!(origins["engine"], "/etc/c:1");
        assert_eq!(origins["sandbox.memory"], "~/c:3");
        assert_eq!(origins["sandbox.cpus"], "$MSB_CPUS");
        assert_eq!(origins["kernel"], "default");
    }

    #[test]
    fn registries_have_tables_of_their_own() {
        let text = "engine = \"qemu\"\n[registries.\"r.test:5000\"]\nmirrors = [\"m.test\"]\ninsecure = true\n";
        let later = "[registries.\"r.test:5000\"]\nusername = \"me\"\npassword_env = \"R\"\n";
        let config = Config::merge(&[("a", text)], |_| None).unwrap();
        assert_eq!(config.registries()["r.test:5000"].mirrors, ["m.test"]);
        assert_eq!(config.text("engine"), Some("qemu"));
        let config = Config::merge(&[("a", text), ("b", later)], |_| None).unwrap();
        let merged = &config.registries()["r.test:5000"];
        assert_eq!((merged.username.as_deref(), merged.mirrors.len(), merged.insecure), (Some("me"), 0, false));
        let wrong = "[registries.r]\ninsecure = true\npassword = \"x\"\n";
        let error = Config::merge(&[("f", wrong)], |_| None).unwrap_err();
        assert!(error.message.starts_with("f:3: unknown field `password`"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, message) in [
            ("engine = \"kvm\"\n\nengin = \"kvm\"\n", "f:3: unknown key 'engin'; did you mean 'engine'?"),
            ("[sandbox]\ncpus = 0\n", "f:2: 'sandbox.cpus': \"0\" is not a whole number from 1 to 32"),
            ("[sandbox]\ncpus = [1]\n", "f:2: 'sandbox.cpus' takes a text or a number"),
            ("engine = \"xen\"\n", "f:1: 'engine': \"xen\" is not one of auto, kvm, qemu"),
        ] {
            let error = Config::merge(&[("f", text)], |_| None).unwrap_err();
            assert_eq!((error.code, error.message.as_str()), (ErrorCode::ConfigFile, message));
        }
        assert!(Config::merge(&[("f", "a = \n")], |_| None).unwrap_err().message.starts_with("f:1: "));
        assert!(
            Config::merge(&[], |name| (name == "MSB_ENGINE").then(|| "xen".into()))
                .unwrap_err()
                .message
                .starts_with("$MSB_ENGINE: ")
        );
    }
}
