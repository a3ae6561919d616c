//! Credentials that docker has: `config.json` with its `auths`, `credHelpers` and `credsStore`.
//!
//! Read anew for every pull, never written. A file that cannot be understood holds no credentials.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;

use crate::registry::Credential;
use crate::registry::secret_program;
use crate::store::read_bounded;

/// Largest file that is read, in bytes.
const FILE_BYTES: u64 = 1 << 20;
/// What docker calls Docker Hub in its file.
const HUB_KEY: &str = "https://index.docker.io/v1/";

#[derive(Default, Deserialize)]
#[serde(default)]
struct File {
    auths: BTreeMap<String, Auth>,
    #[serde(rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    #[serde(rename = "identitytoken")]
    identity_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// Where docker's file is in this environment.
pub(super) fn path(variable: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    let folder = set("DOCKER_CONFIG").map(PathBuf::from).or_else(|| Some(Path::new(&set("HOME")?).join(".docker")))?;
    Some(folder.join("config.json"))
}

/// What docker would show this registry.
pub(super) fn find(path: &Path, registry: &str) -> Option<Credential> {
    let file = read(path)?;
    let key = if registry == "docker.io" { HUB_KEY } else { registry };
    let own = file.helpers.iter().find(|(name, _)| same_host(name, registry)).map(|(_, helper)| helper.as_str());
    if let Some(helper) = own.or(file.store.as_deref())
        && let Some(credential) = ask_helper(helper, key)
    {
        return Some(credential);
    }
    let auth = file.auths.iter().find(|(name, _)| same_host(name, registry)).map(|(_, auth)| auth)?;
    credential(auth)
}

/// Registries that the file has something for, without asking a helper.
pub(super) fn registries(path: &Path) -> Vec<String> {
    let file = read(path).unwrap_or_default();
    let mut names: Vec<_> = file.auths.keys().chain(file.helpers.keys()).map(|name| host_of(name)).collect();
    names.sort();
    names.dedup();
    names
}

fn read(path: &Path) -> Option<File> {
    serde_json::from_slice(&read_bounded(path, FILE_BYTES).ok()?).ok()
}

fn credential(auth: &Auth) -> Option<Credential> {
    if let Some(token) = auth.identity_token.clone().filter(|token| !token.is_empty()) {
        return Some(Credential::IdentityToken { token });
    }
    if let Some(packed) = auth.auth.as_deref().filter(|packed| !packed.is_empty()) {
        let text = String::from_utf8(BASE64.decode(packed.trim()).ok()?).ok()?;
        let (username, password) = text.split_once(':')?;
        // docker once wrote zero bytes behind the password.
        let password = password.trim_end_matches('\0').to_owned();
        return Some(Credential::Password { username: username.to_owned(), password });
    }
    Some(Credential::Password { username: auth.username.clone()?, password: auth.password.clone()? })
}

fn ask_helper(name: &str, key: &str) -> Option<Credential> {
    // The name becomes part of a program's name and must not lead elsewhere.
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
        return None;
    }
    match secret_program::ask(&format!("docker-credential-{name}"), &["get"], key.as_bytes()) {
        Ok(answer) => {
            let answer: HelperAnswer = serde_json::from_slice(&answer).ok()?;
            Some(if answer.username == "<token>" {
                Credential::IdentityToken { token: answer.secret }
            } else {
                Credential::Password { username: answer.username, password: answer.secret }
            })
        }
        Err(error) => {
            tracing::debug!(helper = name, ?error, "docker's credential helper has no answer");
            None
        }
    }
}

/// The registry that a key of the file means: docker writes hosts, and URLs for what is older.
fn host_of(key: &str) -> String {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    let host = rest.split('/').next().unwrap_or_default();
    match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".into(),
        host => host.into(),
    }
}

fn same_host(key: &str, registry: &str) -> bool {
    host_of(key) == registry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str, registry: &str) -> Option<Credential> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        find(&path, registry)
    }

    #[test]
    fn auths_in_all_their_forms() {
        let password = |username: &str, password: &str| {
            Some(Credential::Password { username: username.into(), password: password.into() })
        };
        // "me:a:b" in base 64.
        let packed =
            r#"{"auths":{"r.test:5000":{"auth":"bWU6YTpi"},"https://index.docker.io/v1/":{"auth":"bWU6YTpi"}}}"#;
        assert_eq!(found(packed, "r.test:5000"), password("me", "a:b"));
        assert_eq!(found(packed, "docker.io"), password("me", "a:b"));
        assert_eq!(found(packed, "r.test"), None);
        assert_eq!(
            found(r#"{"auths":{"https://r.test/v2/":{"username":"u","password":"p"}}}"#, "r.test"),
            password("u", "p")
        );
        assert_eq!(
            found(r#"{"auths":{"r.test":{"auth":"","identitytoken":"t"}}}"#, "r.test"),
            Some(Credential::IdentityToken { token: "t".into() })
        );
        for bad in ["", "[]", "{}", r#"{"auths":{"r.test":{}}}"#, r#"{"auths":{"r.test":{"auth":"!"}}}"#] {
            assert_eq!(found(bad, "r.test"), None, "{bad}");
        }
    }

    #[test]
    fn a_helper_without_an_answer_is_passed_over() {
        let text = r#"{"credsStore":"no-such-of-msb","credHelpers":{"h.test":"../../bin/sh"},"auths":{"r.test":{"auth":"bWU6YTpi"}}}"#;
        assert!(found(text, "r.test").is_some());
        assert_eq!(found(text, "h.test"), None);
    }
}
