//! Which credential a registry is shown: an explicit one, a login of msb, the configuration's, docker's, or none.
//!
//! `msb registry login` keeps a password in the session's keyring where there is one, else in `<home>/registries.json`, mode 0600, and
//! says which. The file is the list of logins either way; for those of the keyring it holds the name only.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use msb_protocol::images::{RegistryRow, RegistrySettings, RegistryTable};
use serde::{Deserialize, Serialize};

use crate::error::{ImageError, io_error};
use crate::registry::{Credential, docker_config, keyring};
use crate::store::read_bounded;

/// Version of the file.
const FILE_FORMAT: u32 = 1;
/// Largest file that is read, in bytes.
const FILE_BYTES: u64 = 1 << 20;

/// Where a credential came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CredentialSource {
    /// The session's keyring.
    Keyring,
    /// The file of logins.
    File,
    /// `password_env` of the configuration.
    Config,
    /// Docker's `config.json` or a helper of its.
    Docker,
}

impl CredentialSource {
    /// In a word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Keyring => "keyring",
            Self::File => "file",
            Self::Config => "config",
            Self::Docker => "docker",
        }
    }
}

/// A credential with its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    /// What opens the registry.
    pub credential: Credential,
    /// Where it came from.
    pub source: CredentialSource,
}

#[derive(Default, Serialize, Deserialize)]
struct LoginFile {
    format: u32,
    logins: BTreeMap<String, StoredLogin>,
}

#[derive(Clone, Serialize, Deserialize)]
struct StoredLogin {
    username: String,
    /// Absent: in the keyring.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    password: Option<String>,
}

type Variable = dyn Fn(&str) -> Option<String> + Send + Sync;

/// All places where credentials are.
pub struct CredentialStore {
    file: Option<PathBuf>,
    docker: Option<PathBuf>,
    variable: Box<Variable>,
    keyring: bool,
}

impl CredentialStore {
    /// The credentials of a home, in the environment of this process.
    #[must_use]
    pub fn of_home(home: &Path) -> Self {
        Self::new(home, |name| std::env::var(name).ok())
    }

    /// The credentials of a home, in an environment.
    pub fn new(home: &Path, variable: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Self {
        Self {
            file: Some(home.join("registries.json")),
            docker: docker_config::path(&variable),
            keyring: keyring::available(&variable),
            variable: Box::new(variable),
        }
    }

    /// No credentials at all.
    #[must_use]
    pub fn empty() -> Self {
        Self { file: None, docker: None, variable: Box::new(|_| None), keyring: false }
    }

    /// What a registry is shown when the caller brings nothing.
    #[must_use]
    pub fn find(&self, registry: &str, settings: &RegistrySettings) -> Option<Login> {
        self.logged_in(registry).or_else(|| self.configured(settings)).or_else(|| {
            let credential = docker_config::find(self.docker.as_deref()?, registry)?;
            Some(Login { credential, source: CredentialSource::Docker })
        })
    }

    fn logged_in(&self, registry: &str) -> Option<Login> {
        let stored = self.read().ok()?.logins.remove(registry)?;
        let (password, source) = match stored.password {
            Some(password) => (password, CredentialSource::File),
            None => (keyring::lookup(registry)?, CredentialSource::Keyring),
        };
        Some(Login { credential: Credential::Password { username: stored.username, password }, source })
    }

    fn configured(&self, settings: &RegistrySettings) -> Option<Login> {
        let username = settings.username.clone()?;
        let password = (self.variable)(settings.password_env.as_deref()?).filter(|password| !password.is_empty())?;
        Some(Login { credential: Credential::Password { username, password }, source: CredentialSource::Config })
    }

    /// Keeps a password. Returns where: `keyring`, or the file's path.
    ///
    /// # Errors
    /// `Io` and `DiskFull` for the file.
    pub fn login(&self, registry: &str, username: &str, password: &str) -> Result<String, ImageError> {
        let mut file = self.read()?;
        let in_keyring = self.keyring && keyring::store(registry, password).is_ok();
        let kept = if in_keyring { None } else { Some(password.to_owned()) };
        let login = StoredLogin { username: username.to_owned(), password: kept };
        file.logins.insert(registry.to_owned(), login);
        let path = self.write(&file)?;
        Ok(if in_keyring { "keyring".into() } else { path.display().to_string() })
    }

    /// Forgets a login. Returns whether there was one.
    ///
    /// # Errors
    /// `Credentials` when the keyring refuses, `Io` for the file.
    pub fn logout(&self, registry: &str) -> Result<bool, ImageError> {
        let mut file = self.read()?;
        let Some(stored) = file.logins.remove(registry) else { return Ok(false) };
        if stored.password.is_none() {
            keyring::clear(registry)
                .map_err(|_| ImageError::Credentials(format!("the keyring does not forget {registry}")))?;
        }
        self.write(&file)?;
        Ok(true)
    }

    /// Every registry that there is something for; no secret is read for it.
    ///
    /// # Errors
    /// `Credentials` when the file of logins cannot be understood.
    pub fn list(&self, table: &RegistryTable) -> Result<Vec<RegistryRow>, ImageError> {
        let mut rows: BTreeMap<String, RegistryRow> = BTreeMap::new();
        for name in self.docker.as_deref().map(docker_config::registries).unwrap_or_default() {
            row(&mut rows, &name).source = CredentialSource::Docker.as_str().into();
        }
        for (name, settings) in table {
            let row = row(&mut rows, name);
            row.mirrors.clone_from(&settings.mirrors);
            row.insecure = settings.insecure;
            if let (Some(username), Some(_)) = (&settings.username, &settings.password_env) {
                row.username.clone_from(username);
                row.source = CredentialSource::Config.as_str().into();
            }
        }
        for (name, stored) in self.read()?.logins {
            let row = row(&mut rows, &name);
            let source = if stored.password.is_some() { CredentialSource::File } else { CredentialSource::Keyring };
            row.source = source.as_str().into();
            row.username = stored.username;
        }
        Ok(rows.into_values().collect())
    }

    fn read(&self) -> Result<LoginFile, ImageError> {
        let Some(path) = &self.file else { return Ok(LoginFile::default()) };
        if !path.exists() {
            return Ok(LoginFile::default());
        }
        let bytes = read_bounded(path, FILE_BYTES)?;
        // What cannot be understood is not written over: it may be another version's.
        let file: LoginFile = serde_json::from_slice(&bytes)
            .map_err(|_| ImageError::Credentials(format!("{} cannot be understood", path.display())))?;
        if file.format > FILE_FORMAT {
            return Err(ImageError::Credentials(format!("{} is of a later msb", path.display())));
        }
        Ok(file)
    }

    fn write(&self, file: &LoginFile) -> Result<PathBuf, ImageError> {
        let path = self.file.clone().ok_or_else(|| ImageError::Credentials("there is no file for them".into()))?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder).map_err(|error| io_error("create", folder, error))?;
        let text = serde_json::to_vec_pretty(&LoginFile { format: FILE_FORMAT, logins: file.logins.clone() })
            .map_err(|error| ImageError::Credentials(error.to_string()))?;
        let mut temporary = tempfile::Builder::new()
            .permissions(Permissions::from_mode(0o600))
            .tempfile_in(folder)
            .map_err(|error| io_error("create a file in", folder, error))?;
        temporary.write_all(&text).map_err(|error| io_error("write", &path, error))?;
        temporary.as_file().sync_all().map_err(|error| io_error("write", &path, error))?;
        temporary.persist(&path).map_err(|error| io_error("create", &path, error.error))?;
        Ok(path)
    }
}

fn row<'r>(rows: &'r mut BTreeMap<String, RegistryRow>, name: &str) -> &'r mut RegistryRow {
    rows.entry(name.to_owned()).or_insert_with(|| RegistryRow { registry: name.to_owned(), ..RegistryRow::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_sources_is_login_configuration_docker_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let docker = dir.path().join("docker");
        fs::create_dir(&docker).unwrap();
        fs::write(docker.join("config.json"), r#"{"auths":{"r.test":{"auth":"ZG9ja2VyOnB3"}}}"#).unwrap();
        let folder = docker.display().to_string();
        let store = CredentialStore::new(dir.path(), move |name| match name {
            "DOCKER_CONFIG" => Some(folder.clone()),
            "R_PASSWORD" => Some("from-env".into()),
            _ => None,
        });
        let settings = RegistrySettings {
            username: Some("config".into()),
            password_env: Some("R_PASSWORD".into()),
            ..RegistrySettings::default()
        };
        let who = |settings: &RegistrySettings| {
            store.find("r.test", settings).map(|login| (login.credential.user().to_owned(), login.source))
        };
        assert!(store.find("other.test", &RegistrySettings::default()).is_none());
        assert_eq!(who(&RegistrySettings::default()), Some(("docker".into(), CredentialSource::Docker)));
        assert_eq!(who(&settings), Some(("config".into(), CredentialSource::Config)));
        let place = store.login("r.test", "login", "pw").unwrap();
        assert_eq!(who(&settings), Some(("login".into(), CredentialSource::File)));
        assert_eq!(fs::metadata(&place).unwrap().permissions().mode() & 0o777, 0o600);
        let table = [("r.test".to_owned(), settings.clone())].into();
        let listed = store.list(&table).unwrap();
        assert_eq!((listed.len(), listed[0].username.as_str(), listed[0].source.as_str()), (1, "login", "file"));
        assert!(!serde_json::to_string(&listed).unwrap().contains("pw"));
        assert!(store.logout("r.test").unwrap() && !store.logout("r.test").unwrap());
        assert_eq!(who(&settings), Some(("config".into(), CredentialSource::Config)));
    }

    #[test]
    fn a_file_that_is_not_understood_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registries.json");
        let store = CredentialStore::new(dir.path(), |_| None);
        for text in ["{", r#"{"format":2,"logins":{}}"#] {
            fs::write(&path, text).unwrap();
            assert!(store.login("r.test", "me", "pw").is_err());
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
