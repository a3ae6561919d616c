//! Where things are: pure functions from the environment to paths. Nothing here touches the file system.

use std::path::{Path, PathBuf};

/// Longest path of a Unix socket in bytes (unix(7): `sun_path` is 108 with its zero byte).
pub const SOCKET_PATH_LEN_MAX: usize = 107;

/// Longest path of a socket below the runtime directory in bytes: `/vm/`, 16 digits, `/` and a name of 27.
const BELOW_RUNTIME_LEN_MAX: usize = 48;

/// The socket of the host's service.
pub const HOST_SOCKET: &str = "/run/msb/msbd.sock";

/// What of the environment decides about paths; passed in so that tests can turn it.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// `MSB_HOME`.
    pub msb_home: Option<PathBuf>,
    /// `HOME`.
    pub home: Option<PathBuf>,
    /// `XDG_RUNTIME_DIR`.
    pub xdg_runtime_dir: Option<PathBuf>,
    /// `MSB_HOST`: socket of the service to use.
    pub msb_host: Option<PathBuf>,
    /// The user's id.
    pub uid: u32,
}

impl Surroundings {
    /// Reads the process's environment; `uid` is the caller's.
    #[must_use]
    pub fn from_environment(uid: u32) -> Self {
        let path = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self {
            msb_home: path("MSB_HOME"),
            home: path("HOME"),
            xdg_runtime_dir: path("XDG_RUNTIME_DIR"),
            msb_host: path("MSB_HOST"),
            uid,
        }
    }

    /// `MSB_HOME`, else `~/.msb`.
    #[must_use]
    pub fn home_dir(&self) -> PathBuf {
        match (&self.msb_home, &self.home) {
            (Some(dir), _) => dir.clone(),
            (None, Some(home)) => home.join(".msb"),
            (None, None) => PathBuf::from(format!("/tmp/msb-home-{}", self.uid)),
        }
    }

    /// The directory of Unix sockets: `$XDG_RUNTIME_DIR/msb`, else `$MSB_HOME/run`, else (where that is too long for a socket's path)
    /// `/tmp/msb-UID`. Outside of its home, a home that is not the default one gets a directory of its own, so that two services never
    /// share a socket.
    #[must_use]
    pub fn runtime_dir(&self) -> PathBuf {
        let base = match &self.xdg_runtime_dir {
            Some(dir) => dir.join("msb"),
            None => {
                let inside = self.home_dir().join("run");
                if inside.as_os_str().len() + BELOW_RUNTIME_LEN_MAX <= SOCKET_PATH_LEN_MAX {
                    return inside;
                }
                PathBuf::from(format!("/tmp/msb-{}", self.uid))
            }
        };
        match &self.msb_home {
            Some(home) if self.home.as_ref().is_none_or(|user| *home != user.join(".msb")) => {
                base.join(format!("h{:016x}", fnv1a(home.as_os_str().as_encoded_bytes())))
            }
            _ => base,
        }
    }

    /// The socket of the control API.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.msb_host.clone().unwrap_or_else(|| self.runtime_dir().join("msbd.sock"))
    }
}

/// The directories and files below a home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HomeLayout {
    /// The home itself.
    pub home: PathBuf,
}

impl HomeLayout {
    /// The layout below `home`.
    pub fn new(home: impl Into<PathBuf>) -> Self {
        Self { home: home.into() }
    }
    /// The journal.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.home.join("state").join("msb.redb")
    }
    /// The lock that makes a daemon the only one of this home.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.home.join("msbd.lock")
    }
    /// The daemon's log when it was started on demand.
    #[must_use]
    pub fn daemon_log(&self) -> PathBuf {
        self.home.join("msbd.log")
    }
    /// The image store.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.home.join("images")
    }
    /// All sandboxes.
    #[must_use]
    pub fn sandboxes(&self) -> PathBuf {
        self.home.join("sandboxes")
    }
    /// One sandbox.
    #[must_use]
    pub fn sandbox(&self, name: &crate::id::SandboxName) -> PathBuf {
        self.sandboxes().join(name.as_str())
    }
    /// The keys that may log in to sandboxes by SSH.
    #[must_use]
    pub fn authorized_keys(&self) -> PathBuf {
        self.home.join("ssh").join("authorized_keys")
    }

    /// All named volumes.
    #[must_use]
    pub fn volumes(&self) -> PathBuf {
        self.home.join("volumes")
    }
    /// All snapshots.
    #[must_use]
    pub fn snapshots(&self) -> PathBuf {
        self.home.join("snapshots")
    }
    /// Disks of ready forks.
    #[must_use]
    pub fn pool(&self) -> PathBuf {
        self.home.join("pool")
    }
    /// The configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.home.join("config.toml")
    }
}

/// Where a sandbox's Unix sockets live: below the runtime directory by identity, because names are long and socket paths short.
#[must_use]
pub fn sandbox_run_dir(runtime_dir: &Path, id: crate::id::SandboxId) -> PathBuf {
    // The last 64 bits of a version 7 UUID are random; 16 digits of them are unique enough for one host and short enough for a socket path.
    let digits = id.0.simple().to_string();
    runtime_dir.join("vm").join(&digits[16..])
}

/// FNV-1a, 64 bits: a short stable name for a path. Not for anything an attacker may choose.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn surroundings() -> Surroundings {
        Surroundings {
            home: Some("/home/u".into()),
            xdg_runtime_dir: Some("/run/user/7".into()),
            uid: 7,
            ..Default::default()
        }
    }

    #[test]
    fn defaults_are_in_the_users_directories() {
        let s = surroundings();
        assert_eq!(s.home_dir(), Path::new("/home/u/.msb"));
        assert_eq!(s.control_socket(), Path::new("/run/user/7/msb/msbd.sock"));
        let bare = Surroundings { uid: 7, ..Default::default() };
        assert_eq!(bare.control_socket(), Path::new("/tmp/msb-home-7/run/msbd.sock"));
        let no_session = Surroundings { xdg_runtime_dir: None, ..surroundings() };
        assert_eq!(no_session.control_socket(), Path::new("/home/u/.msb/run/msbd.sock"));
        let long =
            Surroundings { home: Some("/home".to_owned().repeat(12).into()), xdg_runtime_dir: None, ..surroundings() };
        assert_eq!(long.control_socket(), Path::new("/tmp/msb-7/msbd.sock"));
    }

    #[test]
    fn another_home_has_another_socket_and_the_default_written_out_has_not() {
        let written_out = Surroundings { msb_home: Some("/home/u/.msb".into()), ..surroundings() };
        assert_eq!(written_out.control_socket(), surroundings().control_socket());
        let one = Surroundings { msb_home: Some("/a".into()), ..surroundings() };
        let two = Surroundings { msb_home: Some("/b".into()), ..surroundings() };
        assert_ne!(one.control_socket(), two.control_socket());
        assert_ne!(one.control_socket(), surroundings().control_socket());
    }

    #[test]
    fn socket_paths_fit_where_they_must() {
        let s = Surroundings { msb_home: Some("/x".repeat(400).into()), uid: u32::MAX, ..Default::default() };
        let dir = sandbox_run_dir(&s.runtime_dir(), crate::id::SandboxId::generate());
        let socket = dir.join(crate::vmm::CONTROL_SOCKET);
        assert!(socket.as_os_str().len() <= SOCKET_PATH_LEN_MAX, "{}", socket.display());
    }
}
