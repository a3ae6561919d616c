//! The sandbox's host key and the keys that may log in.
//!
//! The host key is made once, ed25519, in OpenSSH's own form with mode 0600, and survives restarts. Authorized keys are in the form of
//! sshd(8), one public key per line; a line with options is refused as a whole, because an option msb would not obey could be a
//! restriction somebody relies on.

use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};
use russh::keys::ssh_key::{HashAlg, LineEnding};
use russh::keys::{PrivateKey, PublicKey};

/// Largest file of keys that is read, in bytes.
const KEYS_LEN_MAX: u64 = 1 << 20;
/// Most authorized keys.
const KEYS_COUNT_MAX: usize = 1024;

/// Why keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Others can read or write a private file.
    #[error("{} can be used by others (mode {mode:04o}); make it 0600", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It is no key.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A line of authorized keys cannot be used.
    #[error("line {line}: {reason}")]
    Line {
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// More keys than anybody needs.
    #[error("more than {KEYS_COUNT_MAX} keys")]
    TooMany,
    /// The system gives no random numbers.
    #[error("no random numbers: {0}")]
    Random(std::io::Error),
}

/// The key by which a sandbox proves to be itself.
#[derive(Clone, Debug)]
pub struct HostKey(PrivateKey);

impl HostKey {
    /// Reads the key, or makes it if there is none. Two makers at once end up with one key.
    ///
    /// # Errors
    /// [`KeyError`] if it cannot be read, made, or is open to others.
    pub fn load_or_create(path: &Path) -> Result<Self, KeyError> {
        match read_private(path) {
            Ok(text) => Self::parse(path, &text),
            Err(KeyError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Self::create(path),
            Err(error) => Err(error),
        }
    }

    fn parse(path: &Path, text: &str) -> Result<Self, KeyError> {
        let malformed = |reason: String| KeyError::Malformed { path: path.into(), reason };
        let key = PrivateKey::from_openssh(text).map_err(|error| malformed(error.to_string()))?;
        if key.is_encrypted() {
            return Err(malformed("the host key has a passphrase".into()));
        }
        Ok(Self(key))
    }

    fn create(path: &Path) -> Result<Self, KeyError> {
        let file = |source| KeyError::File { path: path.into(), source };
        let seed = random_seed()?;
        let keypair = KeypairData::from(Ed25519Keypair::from_seed(&seed));
        let malformed =
            |error: russh::keys::ssh_key::Error| KeyError::Malformed { path: path.into(), reason: error.to_string() };
        let key = PrivateKey::new(keypair, "msb").map_err(malformed)?;
        let text = key.to_openssh(LineEnding::LF).map_err(malformed)?;
        let beside = path.with_extension(format!("new{}", std::process::id()));
        let written =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside).and_then(|mut out| {
                out.write_all(text.as_bytes())?;
                out.sync_all()
            });
        // link(2) fails if somebody was faster; theirs is then the key.
        let linked = written.and_then(|()| std::fs::hard_link(&beside, path));
        let _ = std::fs::remove_file(&beside);
        match linked {
            Ok(()) => Ok(Self(key)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Self::parse(path, &read_private(path)?),
            Err(error) => Err(file(error)),
        }
    }

    /// The public half as in `known_hosts`, without a comment: `ssh-ed25519 AAAA…`.
    #[must_use]
    pub fn public_line(&self) -> String {
        let mut public = self.0.public_key().clone();
        public.set_comment("");
        public.to_openssh().unwrap_or_default().trim().to_owned()
    }

    /// `SHA256:…`, as ssh shows it.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        self.0.fingerprint(HashAlg::Sha256).to_string()
    }

    pub(crate) fn private(&self) -> PrivateKey {
        self.0.clone()
    }
}

/// What a new ed25519 key is made from.
pub(crate) fn random_seed() -> Result<[u8; 32], KeyError> {
    let mut seed = [0u8; 32];
    let got = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| KeyError::Random(error.into()))?;
    if got == seed.len() { Ok(seed) } else { Err(KeyError::Random(std::io::ErrorKind::UnexpectedEof.into())) }
}

/// One authorized key, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySummary {
    /// Its algorithm, as in the file.
    pub algorithm: String,
    /// `SHA256:…`
    pub fingerprint: String,
    /// Its comment, without what could drive a terminal.
    pub comment: String,
}

/// The keys that may log in.
#[derive(Clone, Debug, Default)]
pub struct AuthorizedKeys(Vec<PublicKey>);

impl AuthorizedKeys {
    /// Reads a file; a file that does not exist authorizes nobody.
    ///
    /// # Errors
    /// [`KeyError`], naming the line.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        match read_private(path) {
            Ok(text) => Self::parse(&text),
            Err(KeyError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    /// Reads keys, one per line; empty lines and comments are passed over.
    ///
    /// # Errors
    /// [`KeyError`], naming the line.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let mut keys = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line_text = line.trim();
            if line_text.is_empty() || line_text.starts_with('#') {
                continue;
            }
            let refuse = |reason: &str| KeyError::Line { line: at + 1, reason: reason.into() };
            let kind = line_text.split_whitespace().next().unwrap_or_default();
            if kind == "ssh-rsa" {
                return Err(refuse("RSA keys are not accepted; use ed25519 or ecdsa"));
            }
            if !(kind.starts_with("ssh-") || kind.starts_with("ecdsa-") || kind.starts_with("sk-")) {
                return Err(refuse("it does not begin with a key type; options are not supported"));
            }
            let key = PublicKey::from_openssh(line_text).map_err(|_| refuse("it is not a public key"))?;
            if keys.len() == KEYS_COUNT_MAX {
                return Err(KeyError::TooMany);
            }
            keys.push(key);
        }
        Ok(Self(keys))
    }

    /// Whether a key may log in. Every key is compared in full, so that the time tells nothing.
    #[must_use]
    pub fn holds(&self, key: &PublicKey) -> bool {
        let Ok(wanted) = key.to_bytes() else { return false };
        self.0.iter().fold(false, |found, known| {
            let known = known.to_bytes().unwrap_or_default();
            let same_length = known.len() == wanted.len();
            let difference = known.iter().zip(&wanted).fold(0u8, |sum, (a, b)| sum | (a ^ b));
            found | (same_length & (difference == 0))
        })
    }

    /// These keys and others.
    #[must_use]
    pub fn with(mut self, others: &Self) -> Self {
        self.0.extend(others.0.iter().cloned());
        self
    }

    /// Each key, for people.
    #[must_use]
    pub fn summaries(&self) -> Vec<KeySummary> {
        let summary = |key: &PublicKey| KeySummary {
            algorithm: key.algorithm().to_string(),
            fingerprint: key.fingerprint(HashAlg::Sha256).to_string(),
            comment: key.comment().to_string().chars().filter(|c| !c.is_control()).take(256).collect(),
        };
        self.0.iter().map(summary).collect()
    }

    /// Adds keys to a file, which is made with its directory if there is none, and gives back those that were not in it. Either all
    /// are added or none.
    ///
    /// # Errors
    /// [`KeyError`]; the file is as it was.
    pub fn add(path: &Path, more: &Self) -> Result<Self, KeyError> {
        let file = |source| KeyError::File { path: path.into(), source };
        if let Some(directory) = path.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(file)?;
        }
        let mut text = match read_private(path) {
            Ok(text) => text,
            Err(KeyError::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error),
        };
        let mut known = Self::parse(&text)?;
        let mut added = Self::default();
        for key in &more.0 {
            if known.holds(key) {
                continue;
            }
            if known.0.len() == KEYS_COUNT_MAX {
                return Err(KeyError::TooMany);
            }
            if !text.is_empty() && !text.ends_with('\n') {
                text.push('\n');
            }
            let line = key
                .to_openssh()
                .map_err(|error| KeyError::Malformed { path: path.into(), reason: error.to_string() })?;
            text.push_str(line.trim());
            text.push('\n');
            known.0.push(key.clone());
            added.0.push(key.clone());
        }
        if !added.is_empty() {
            let beside = path.with_extension(format!("new{}", std::process::id()));
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&beside)
                .and_then(|mut out| {
                    out.write_all(text.as_bytes())?;
                    out.sync_all()
                })
                .and_then(|()| std::fs::rename(&beside, path))
                .map_err(file)?;
        }
        Ok(added)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nobody may log in.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Reads a file that only its owner may use.
fn read_private(path: &Path) -> Result<String, KeyError> {
    let file = |source| KeyError::File { path: path.into(), source };
    let open = std::fs::File::open(path).map_err(file)?;
    let mode = open.metadata().map_err(file)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeyError::Open { path: path.into(), mode });
    }
    let mut text = String::new();
    open.take(KEYS_LEN_MAX + 1).read_to_string(&mut text).map_err(file)?;
    if text.len() as u64 > KEYS_LEN_MAX {
        return Err(KeyError::Malformed {
            path: path.into(),
            reason: format!("it is larger than {KEYS_LEN_MAX} bytes"),
        });
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn public(seed: u8) -> PublicKey {
        let pair = KeypairData::from(Ed25519Keypair::from_seed(&[seed; 32]));
        PrivateKey::new(pair, "test").unwrap().public_key().clone()
    }

    #[test]
    fn keys_are_added_once_and_all_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ssh").join("authorized_keys");
        let both = AuthorizedKeys(vec![public(1), public(2)]);
        assert_eq!(AuthorizedKeys::add(&path, &AuthorizedKeys(vec![public(1)])).unwrap().len(), 1);
        assert_eq!(AuthorizedKeys::add(&path, &both).unwrap().len(), 1);
        assert_eq!(AuthorizedKeys::add(&path, &both).unwrap().len(), 0);
        let kept = AuthorizedKeys::load(&path).unwrap();
        assert!(kept.len() == 2 && kept.holds(&public(1)) && kept.holds(&public(2)));
        std::fs::write(&path, "nonsense\n").unwrap();
        assert!(AuthorizedKeys::add(&path, &both).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "nonsense\n");
    }

    #[test]
    fn a_host_key_is_made_once_and_kept_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host_ed25519");
        let made = HostKey::load_or_create(&path).unwrap();
        let again = HostKey::load_or_create(&path).unwrap();
        assert_eq!(made.fingerprint(), again.fingerprint());
        assert!(made.public_line().starts_with("ssh-ed25519 "));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(HostKey::load_or_create(&path), Err(KeyError::Open { mode: 0o644, .. })));
    }

    #[test]
    fn a_damaged_host_key_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .unwrap()
            .write_all(b"rubbish")
            .unwrap();
        assert!(matches!(HostKey::load_or_create(&path), Err(KeyError::Malformed { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"rubbish");
    }

    #[test]
    fn authorized_keys_are_read_line_by_line() {
        let line = public(1).to_openssh().unwrap();
        let keys = AuthorizedKeys::parse(&format!("# mine\n\n  {line}  \n")).unwrap();
        assert!(keys.len() == 1 && keys.holds(&public(1)) && !keys.holds(&public(2)));
        for (text, wanted) in [
            (
                format!("{line}\ncommand=\"x\" {line}"),
                "line 2: it does not begin with a key type; options are not supported",
            ),
            ("ssh-rsa AAAA".into(), "line 1: RSA keys are not accepted; use ed25519 or ecdsa"),
            ("ssh-ed25519 !!".into(), "line 1: it is not a public key"),
        ] {
            assert_eq!(AuthorizedKeys::parse(&text).unwrap_err().to_string(), wanted);
        }
        assert!(matches!(
            AuthorizedKeys::parse(&format!("{line}\n").repeat(KEYS_COUNT_MAX + 1)),
            Err(KeyError::TooMany)
        ));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_keys_or_an_error_never_a_panic(text in ".{0,200}") {
            let _ = AuthorizedKeys::parse(&text);
        }
    }
}
