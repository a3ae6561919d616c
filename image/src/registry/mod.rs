//! Pulling from registries: OCI distribution 1.1 and Docker's schema 2.
//!
//! ```text
//!  name ─► sources: mirrors, then the registry itself ─► manifest (index → platform) ─► configuration
//!                                                                │
//!              for each layer, four at a time                    ▼
//!        store has it ──────────────────────────────────────► hold it
//!        another pull fetches it ─► wait for that one ───────► hold it
//!        else GET, from where partial/<hex> ends ─► hash + write + unpack at once ─► blobs/, layers/
//!                 ▲ cut, 429, 5xx: wait, ask again                                       │
//!                 └──────────────────────────────────────        all there ─► merge ─► record
//! ```
//!
//! Called by the daemon's image actor on blocking threads. Own client on `reqwest` and not `oci-client`: that one reads manifests, tokens and
//! error texts of any size into memory and hides `Retry-After`. Nothing here logs or shows a secret, and nothing that a registry sends is
//! believed before its digest agrees.

pub(crate) mod challenge;
mod credentials;
mod docker_config;
mod download;
mod keyring;
pub(crate) mod manifest;
mod pull;
mod retry;
mod secret_program;
mod wire;

use std::fmt;

use msb_protocol::images::{RegistrySettings, RegistryTable};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::error::ImageError;
use crate::reference::ImageReference;
use wire::{Attempt, Waiter, Wire};

pub use credentials::{CredentialSource, CredentialStore, Login};
pub use pull::{PullEvent, PullOptions, PulledImage};
pub use retry::RetryPolicy;

/// What opens a registry.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// Name and password.
    Password {
        /// The user's name.
        username: String,
        /// The password or access token.
        password: String,
    },
    /// A token that buys tokens, as docker's credential helpers give them.
    IdentityToken {
        /// The token.
        token: String,
    },
}

impl Credential {
    /// The user's name, where there is one.
    #[must_use]
    pub fn user(&self) -> &str {
        match self {
            Self::Password { username, .. } => username,
            Self::IdentityToken { .. } => "",
        }
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential").field("user", &self.user()).finish_non_exhaustive()
    }
}

/// What vouches for a registry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trust {
    /// Plain HTTP, and certificates that nobody vouches for.
    pub insecure: bool,
    /// Certificates in PEM form that are trusted beside the system's.
    pub ca_certs: Option<String>,
}

/// One place to ask for an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Host with port, or a URL without a path.
    pub origin: String,
    /// What vouches for it.
    pub trust: Trust,
    /// What opens it.
    pub credential: Option<Credential>,
}

/// What a caller says of one pull or login, over what is configured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Explicit {
    /// In place of every stored credential, for the registry itself.
    pub credential: Option<Credential>,
    /// Plain HTTP, and certificates that nobody vouches for.
    pub insecure: bool,
    /// Certificates in PEM form.
    pub ca_certs: Option<String>,
}

/// Where to ask for `reference`: its registry's mirrors in their order, then the registry itself.
///
/// # Errors
/// `Registry` when a configured file of certificates cannot be read.
pub fn sources(
    reference: &ImageReference,
    table: &RegistryTable,
    explicit: &Explicit,
    credentials: &CredentialStore,
) -> Result<Vec<Source>, ImageError> {
    let registry = reference.registry();
    let settings = settings_of(table, registry);
    let mut sources = Vec::new();
    for mirror in &settings.mirrors {
        let host = mirror.split_once("://").map_or(mirror.as_str(), |(_, host)| host).trim_end_matches('/');
        let own = settings_of(table, host);
        sources.push(Source {
            origin: mirror.clone(),
            trust: trust(host, &own, &Explicit::default())?,
            credential: credentials.find(host, &own).map(|login| login.credential),
        });
    }
    sources.push(Source {
        origin: registry.to_owned(),
        trust: trust(registry, &settings, explicit)?,
        credential: match &explicit.credential {
            Some(credential) => Some(credential.clone()),
            None => credentials.find(registry, &settings).map(|login| login.credential),
        },
    });
    Ok(sources)
}

/// Asks a registry whether a credential is good.
///
/// # Errors
/// `RegistryDenied` when it is not, `Registry` when that cannot be found out.
pub fn check_login(
    registry: &str,
    table: &RegistryTable,
    explicit: &Explicit,
    runtime: Handle,
) -> Result<(), ImageError> {
    let settings = settings_of(table, registry);
    let trust = trust(registry, &settings, explicit)?;
    let waiter = Waiter { runtime, cancelled: CancellationToken::new(), retry: RetryPolicy::default() };
    let once = |attempt| match attempt {
        Attempt::Again { reason, .. } => ImageError::Registry { registry: registry.to_owned(), reason },
        Attempt::Final(error) => error,
    };
    let wire = Wire::open(waiter, registry, "", &trust, explicit.credential.clone()).map_err(once)?;
    wire.check().map_err(once)
}

/// Reads bytes as every kind of answer that a registry can give: the door of the fuzz target, which looks for panics, endless work and
/// what gets past a limit.
#[doc(hidden)]
pub fn read_as_answers(bytes: &[u8]) {
    let limits = crate::limits::Limits::default();
    // Errors are what most inputs should give.
    if let Ok(manifest::Document::Manifest(read)) =
        manifest::parse(bytes, "", &crate::archive::Platform::host(), &limits)
    {
        let fits = read.layers.iter().all(|layer| layer.bytes <= limits.blob_bytes);
        assert!(fits && read.layers.len() as u64 <= limits.layers && read.config.bytes <= limits.metadata_bytes);
    }
    let _ = crate::config::ImageConfig::parse(bytes);
    let _ = challenge::token(bytes);
    let text = String::from_utf8_lossy(bytes);
    let _ = challenge::parse(text.lines());
    let _ = retry::retry_after(&text, 0);
}

/// The settings of one registry; a host that is not named has none.
fn settings_of(table: &RegistryTable, host: &str) -> RegistrySettings {
    table.get(host).cloned().unwrap_or_default()
}

fn trust(host: &str, settings: &RegistrySettings, explicit: &Explicit) -> Result<Trust, ImageError> {
    let mut pem = explicit.ca_certs.clone().unwrap_or_default();
    if let Some(path) = &settings.ca_certs {
        let read = crate::store::read_bounded(std::path::Path::new(path), 1 << 20);
        let text = read.ok().and_then(|bytes| String::from_utf8(bytes).ok()).ok_or_else(|| ImageError::Registry {
            registry: host.to_owned(),
            reason: format!("its certificates cannot be read from {path}"),
        })?;
        pem.push('\n');
        pem.push_str(&text);
    }
    Ok(Trust {
        insecure: settings.insecure || explicit.insecure,
        ca_certs: Some(pem).filter(|pem| !pem.trim().is_empty()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_asked_first_and_each_has_its_own_settings() {
        let table: RegistryTable = [
            (
                "docker.io".to_owned(),
                RegistrySettings {
                    mirrors: vec!["http://mirror.test:5000".into(), "other.test".into()],
                    ..RegistrySettings::default()
                },
            ),
            ("other.test".to_owned(), RegistrySettings { insecure: true, ..RegistrySettings::default() }),
        ]
        .into();
        let explicit = Explicit {
            credential: Some(Credential::Password { username: "me".into(), password: "secret".into() }),
            ..Explicit::default()
        };
        let credentials = CredentialStore::empty();
        let found = sources(&"busybox".parse().unwrap(), &table, &explicit, &credentials).unwrap();
        let seen: Vec<_> = found
            .iter()
            .map(|source| (source.origin.as_str(), source.trust.insecure, source.credential.is_some()))
            .collect();
        // What was given for the registry is not shown to its mirrors.
        assert_eq!(
            seen,
            [("http://mirror.test:5000", false, false), ("other.test", true, false), ("docker.io", false, true)]
        );
        assert!(!format!("{found:?}").contains("secret"));
    }

    #[test]
    fn certificates_that_cannot_be_read_are_named() {
        let settings = RegistrySettings { ca_certs: Some("/no/such.pem".into()), ..RegistrySettings::default() };
        let table: RegistryTable = [("r.test".to_owned(), settings)].into();
        let reference = "r.test/a:1".parse().unwrap();
        let error = sources(&reference, &table, &Explicit::default(), &CredentialStore::empty()).unwrap_err();
        assert!(error.to_string().contains("/no/such.pem"), "{error}");
    }
}
