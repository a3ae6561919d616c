//! The image configuration, cut down to what starting a sandbox needs.
//!
//! Read with types of our own and not oci-spec's: docker writes `null` where the specification has lists and maps, and an
//! unknown field must never make an image unusable. OCI image-spec, config.md.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::ImageError;
use crate::limits::CONFIG_ENTRIES;

/// Defaults that an image gives to what runs in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Operating system, as `linux`.
    pub os: String,
    /// Architecture in Go's words, as `amd64`.
    pub architecture: String,
    /// CPU variant, as `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// When the image was built, RFC 3339 as the builder wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// Who built it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// Words put before the command.
    pub entrypoint: Vec<String>,
    /// Default command, or default arguments of the entrypoint.
    pub command: Vec<String>,
    /// Environment as `KEY=value`, in the image's order.
    pub environment: Vec<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty means root.
    pub user: String,
    /// Working directory; empty means `/`.
    pub working_directory: String,
    /// Signal that asks the workload to end, as `SIGTERM` or a number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Exposed ports, as `80/tcp`.
    pub exposed_ports: Vec<String>,
    /// Paths that the image declares as volumes.
    pub volumes: Vec<String>,
    /// Digests of the uncompressed layers, bottom first.
    pub diff_ids: Vec<Digest>,
    /// How the image came about, oldest step first.
    #[serde(default)]
    pub history: Vec<HistoryStep>,
}

/// One line of an image's history.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryStep {
    /// When, RFC 3339 as the builder wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// The build instruction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    /// The builder's remark.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    /// The step made no layer.
    #[serde(default)]
    pub empty_layer: bool,
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    os: Option<String>,
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    variant: Option<String>,
    #[serde(default)]
    created: Option<String>,
    #[serde(default)]
    author: Option<String>,
    #[serde(default)]
    config: Option<Execution>,
    rootfs: RootFs,
    #[serde(default)]
    history: Option<Vec<HistoryStep>>,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Option<Vec<String>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Execution {
    user: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    env: Option<Vec<String>>,
    entrypoint: Option<Words>,
    cmd: Option<Words>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    working_dir: Option<String>,
    labels: Option<BTreeMap<String, Option<String>>>,
    stop_signal: Option<String>,
}

/// Old docker versions wrote a lone string where the specification has a list.
#[derive(Deserialize)]
#[serde(untagged)]
enum Words {
    Many(Vec<String>),
    One(String),
}

impl From<Words> for Vec<String> {
    fn from(words: Words) -> Self {
        match words {
            Words::Many(words) => words,
            Words::One(word) => vec![word],
        }
    }
}

impl ImageConfig {
    /// Reads a configuration blob.
    ///
    /// # Errors
    /// `Archive` when it is not JSON of the right shape, `Limit` when it has too many entries.
    pub fn parse(bytes: &[u8]) -> Result<Self, ImageError> {
        let document: Document = serde_json::from_slice(bytes)
            .map_err(|error| ImageError::Archive(format!("the image configuration cannot be read: {error}")))?;
        let execution = document.config.unwrap_or_default();
        let diff_ids = document
            .rootfs
            .diff_ids
            .unwrap_or_default()
            .iter()
            .map(|text| {
                text.parse()
                    .map_err(|error| ImageError::Archive(format!("the image configuration has a bad diff_id: {error}")))
            })
            .collect::<Result<Vec<Digest>, _>>()?;
        let config = Self {
            os: document.os.unwrap_or_default(),
            architecture: document.architecture.unwrap_or_default(),
            variant: document.variant.filter(|variant| !variant.is_empty()),
            created: document.created,
            author: document.author.filter(|author| !author.is_empty()),
            entrypoint: execution.entrypoint.map(Into::into).unwrap_or_default(),
            command: execution.cmd.map(Into::into).unwrap_or_default(),
            environment: execution.env.unwrap_or_default(),
            user: execution.user.unwrap_or_default(),
            working_directory: execution.working_dir.unwrap_or_default(),
            stop_signal: execution.stop_signal.filter(|signal| !signal.is_empty()),
            labels: execution
                .labels
                .unwrap_or_default()
                .into_iter()
                .map(|(key, value)| (key, value.unwrap_or_default()))
                .collect(),
            exposed_ports: execution.exposed_ports.unwrap_or_default().into_keys().collect(),
            volumes: execution.volumes.unwrap_or_default().into_keys().collect(),
            diff_ids,
            history: document.history.unwrap_or_default(),
        };
        for (what, count) in [
            ("entrypoint", config.entrypoint.len()),
            ("command", config.command.len()),
            ("environment", config.environment.len()),
            ("labels", config.labels.len()),
            ("exposed ports", config.exposed_ports.len()),
            ("volumes", config.volumes.len()),
            ("history", config.history.len()),
            ("diff_ids", config.diff_ids.len()),
        ] {
            if count > CONFIG_ENTRIES {
                return Err(ImageError::Limit {
                    what: format!("the image configuration's {what}"),
                    limit: CONFIG_ENTRIES as u64,
                    unit: " entries",
                });
            }
        }
        Ok(config)
    }

    /// The words that start the image's workload: entrypoint, then `arguments` or the image's own command.
    ///
    /// Empty when the image names none and `arguments` is empty.
    #[must_use]
    pub fn command_line(&self, arguments: &[String]) -> Vec<String> {
        let tail = if arguments.is_empty() { &self.command[..] } else { arguments };
        self.entrypoint.iter().chain(tail).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_docker_writes_is_read() {
        let config = ImageConfig::parse(
            br#"{"architecture":"amd64","os":"linux","created":"2024-01-01T00:00:00Z","config":{"Cmd":["sh"],"Env":["A=1","PATH=/bin"],
            "Entrypoint":null,"Volumes":null,"Labels":{"a":"b"},"ExposedPorts":{"80/tcp":{}},"User":"1:2","WorkingDir":"/w","StopSignal":"SIGINT",
            "OnBuild":null,"ArgsEscaped":true},"rootfs":{"type":"layers","diff_ids":[]},"history":[{"created_by":"x","empty_layer":true}],"new":1}"#,
        )
        .unwrap();
        assert_eq!(config.command, ["sh"]);
        assert_eq!(config.environment, ["A=1", "PATH=/bin"]);
        assert_eq!(config.exposed_ports, ["80/tcp"]);
        assert_eq!(config.labels["a"], "b");
        assert_eq!((config.user.as_str(), config.working_directory.as_str()), ("1:2", "/w"));
        assert_eq!(config.stop_signal.as_deref(), Some("SIGINT"));
        assert!(config.history[0].empty_layer);
        assert_eq!(config.command_line(&[]), ["sh"]);
        assert_eq!(config.command_line(&["ls".into()]), ["ls"]);
    }

    #[test]
    fn a_minimal_configuration_is_enough_and_a_wrong_one_is_an_error() {
        assert!(ImageConfig::parse(br#"{"rootfs":{}}"#).unwrap().entrypoint.is_empty());
        let words = ImageConfig::parse(br#"{"config":{"Cmd":"one"},"rootfs":{}}"#).unwrap();
        assert_eq!(words.command, ["one"]);
        for bad in [&b""[..], b"{}", b"[]", br#"{"rootfs":{"diff_ids":["md5:0"]}}"#, br#"{"rootfs":{"diff_ids":[1]}}"#]
        {
            assert!(ImageConfig::parse(bad).is_err());
        }
        let many = format!(r#"{{"config":{{"Env":[{}"x"]}},"rootfs":{{}}}}"#, "\"x\",".repeat(CONFIG_ENTRIES));
        assert!(matches!(ImageConfig::parse(many.as_bytes()), Err(ImageError::Limit { .. })));
    }
}
