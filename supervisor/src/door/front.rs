//! The front door: `msbd --host`, started by systemd as root.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use msb_actors::vm::scope::Manager;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::paths::Surroundings;
use nix::unistd::{Gid, Group, Uid, User};

use super::{DOOR_SOCKET, Word, keeper, say, scopes};
use crate::server;

/// State of all users, one directory each.
pub const STATE_DIR: &str = "/var/lib/msb";
/// Sockets of all users.
pub const RUN_DIR: &str = "/run/msb";
/// Who may use the service.
pub const GROUP: &str = "msb";
/// Time for a user's service to open its door.
const START_TIMEOUT: Duration = Duration::from_secs(80);
/// util-linux's, which every Debian has.
const SETPRIV: &str = "/usr/bin/setpriv";
/// Time for a user's sandboxes to stop when the host goes down.
const STOP_TIMEOUT: Duration = Duration::from_secs(110);
/// Connections that are being handed over at once; more are closed.
const HANDING_OVER_MAX: usize = 256;

/// Where the door stands; tests put it elsewhere.
#[derive(Clone, Debug)]
pub struct Place {
    /// In place of [`STATE_DIR`].
    pub state_dir: PathBuf,
    /// In place of [`RUN_DIR`].
    pub run_dir: PathBuf,
    /// In place of [`GROUP`].
    pub group: String,
}

/// The users' services.
pub(super) struct Users {
    pub(super) place: Place,
    pub(super) program: PathBuf,
    /// Who makes scopes, where systemd has started this door.
    pub(super) manager: Option<Manager>,
    /// One at a time starts a user's service.
    starting: Mutex<HashMap<u32, Arc<Mutex<()>>>>,
    /// How often a user's service has ended soon after its start, one time after the other.
    pub(super) crashes: Mutex<HashMap<u32, u32>>,
}

/// Serves until it is told to end: then the users' services end too, and their sandboxes go on.
///
/// # Errors
/// `permission_denied` for anybody but root, `home_unusable`, `daemon_running`.
pub fn serve(place: Place) -> Result<(), ApiError> {
    let users = Arc::new(prepare(place)?);
    let socket = users.place.run_dir.join("msbd.sock");
    let listener = match server::inherited()? {
        Some(listener) => listener,
        None => {
            let listener = server::bind(&socket)?;
            share(&socket, &users.place.group).map_err(|error| unusable(&socket, &error))?;
            listener
        }
    };
    scopes::serve(&users)?;
    // Sandboxes with the policies `always` and `unless-stopped` come back without anybody asking.
    for uid in users.known() {
        let users = users.clone();
        std::thread::spawn(move || {
            if let Err(error) = users.door(uid, true) {
                tracing::error!(uid, %error, "the service of a user does not start");
            }
        });
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| ApiError::internal(format!("no runtime: {error}")))?;
    let accepting = users.clone();
    std::thread::spawn(move || accept(&listener, &accepting));
    runtime.block_on(crate::systemd::ready_and_alive());
    tracing::info!("told to end; sandboxes go on");
    for uid in users.known() {
        // One that does not answer has nothing to be told.
        if let Ok(door) = users.connect(uid) {
            let _ = say(&door, Word::End, None);
        }
    }
    Ok(())
}

/// Stops the sandboxes of every user with a flush, and waits for it.
///
/// # Errors
/// `permission_denied` for anybody but root.
pub fn stop_sandboxes(place: Place) -> Result<(), ApiError> {
    // Scopes are being stopped just now: what is started here stays with this process.
    let users = Arc::new(Users { manager: None, ..prepare(place)? });
    let door = |uid| match users.connect(uid) {
        Ok(door) => Some(door),
        // A service that was stopped before leaves its machines to the next one.
        Err(_) if users.has_machines(uid) => users
            .door(uid, false)
            .inspect_err(|error| tracing::error!(uid, %error, "nobody can stop the sandboxes of a user"))
            .ok(),
        Err(_) => None,
    };
    let doors: Vec<_> = users.known().into_iter().filter_map(|uid| Some((uid, door(uid)?))).collect();
    for (_, door) in &doors {
        let _ = say(door, Word::StopSandboxes, None);
    }
    let deadline = Instant::now() + STOP_TIMEOUT;
    for (uid, mut door) in doors {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let answered = door.set_read_timeout(Some(left)).and_then(|()| io::Read::read(&mut door, &mut [0u8]));
        if !matches!(answered, Ok(1)) {
            tracing::warn!(uid, ?answered, "the sandboxes of a user did not stop in time");
        }
    }
    Ok(())
}

fn prepare(place: Place) -> Result<Users, ApiError> {
    if !Uid::effective().is_root() {
        return Err(ApiError::new(ErrorCode::PermissionDenied, "only root opens the door of the host"));
    }
    for (path, mode) in [
        (place.state_dir.clone(), 0o711),
        (place.state_dir.join("users"), 0o711),
        (place.run_dir.clone(), 0o755),
        (place.run_dir.join("users"), 0o711),
    ] {
        directory(&path, mode, 0, 0).map_err(|error| unusable(&path, &error))?;
    }
    let program =
        std::env::current_exe().map_err(|error| ApiError::internal(format!("msbd does not find itself: {error}")))?;
    Ok(Users {
        place,
        program,
        manager: Manager::of_this_service(),
        starting: Mutex::default(),
        crashes: Mutex::default(),
    })
}

fn unusable(path: &Path, error: &io::Error) -> ApiError {
    ApiError::new(ErrorCode::HomeUnusable, format!("{}: {error}", path.display()))
}

/// Makes a directory in one of ours, with this owner and mode, or refuses what stands in its place.
fn directory(path: &Path, mode: u32, uid: u32, gid: u32) -> io::Result<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {
            chown(path, Some(uid), Some(gid))?;
            return std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode));
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    let found = std::fs::symlink_metadata(path)?;
    if !found.is_dir() || found.uid() != uid {
        return Err(io::Error::other(format!("is not a directory of the user {uid}")));
    }
    Ok(())
}

/// Opens the socket to the group.
fn share(socket: &Path, group: &str) -> io::Result<()> {
    let Some(group) = Group::from_name(group).map_err(io::Error::from)? else {
        tracing::warn!(group, "there is no such group: only root can use the service");
        return Ok(());
    };
    chown(socket, None, Some(group.gid.as_raw()))?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o660))
}

fn accept(listener: &UnixListener, users: &Arc<Users>) {
    let busy = Arc::new(AtomicUsize::new(0));
    for connection in listener.incoming() {
        let connection = match connection {
            Ok(connection) => connection,
            Err(error) => {
                // Out of descriptors, most likely: they come back.
                tracing::warn!(%error, "a connection could not be taken");
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        if busy.fetch_add(1, Ordering::Relaxed) >= HANDING_OVER_MAX {
            busy.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (users, leaving) = (users.clone(), busy.clone());
        // A user whose service has to be started first holds nobody else up.
        let started = std::thread::Builder::new().spawn(move || {
            if let Err(error) = users.hand_over(&connection) {
                tracing::warn!(%error, "a connection could not be handed over");
            }
            leaving.fetch_sub(1, Ordering::Relaxed);
        });
        if started.is_err() {
            busy.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Users {
    fn home(&self, uid: u32) -> PathBuf {
        self.place.state_dir.join("users").join(uid.to_string())
    }

    fn run_dir(&self, uid: u32) -> PathBuf {
        self.place.run_dir.join("users").join(uid.to_string())
    }

    /// The users that have a home here.
    fn known(&self) -> Vec<u32> {
        let entries = std::fs::read_dir(self.place.state_dir.join("users"));
        entries.into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }

    /// The sockets of a user's service.
    fn sockets(&self, uid: u32) -> PathBuf {
        let own = Surroundings {
            msb_home: Some(self.home(uid)),
            home: None,
            xdg_runtime_dir: Some(self.run_dir(uid)),
            msb_host: None,
            uid,
        };
        own.runtime_dir()
    }

    /// Whether there may be machines of a user.
    fn has_machines(&self, uid: u32) -> bool {
        std::fs::read_dir(self.sockets(uid).join("vm")).is_ok_and(|mut entries| entries.next().is_some())
    }

    /// A way into the service of a user, if it runs.
    pub(super) fn connect(&self, uid: u32) -> io::Result<UnixStream> {
        let door = UnixStream::connect(self.sockets(uid).join(DOOR_SOCKET))?;
        // The directory is the user's, who could have laid a link to somebody else's socket there.
        let peer = rustix::net::sockopt::socket_peercred(&door)?;
        if peer.uid.as_raw() != uid {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "another user's process answers at the door"));
        }
        Ok(door)
    }

    /// A way into the service of a user. `fresh` replaces one that an earlier front door has started, so that it runs this version.
    pub(super) fn door(self: &Arc<Self>, uid: u32, fresh: bool) -> io::Result<UnixStream> {
        let lock = {
            let mut starting = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
            starting.entry(uid).or_default().clone()
        };
        let _alone = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now() + START_TIMEOUT;
        match self.connect(uid) {
            Ok(door) if !fresh => return Ok(door),
            Ok(door) => keeper::end_peer(uid, &door)?,
            Err(_) => {}
        }
        let mut child = self.start(uid)?;
        loop {
            if let Ok(door) = self.connect(uid) {
                keeper::keep(self, uid, child);
                return Ok(door);
            }
            if let Some(status) = child.try_wait()? {
                return Err(io::Error::other(format!("the service of user {uid} ended at once: {status}")));
            }
            if Instant::now() >= deadline {
                child.kill()?;
                child.wait()?;
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("the service of user {uid} does not open its door"),
                ));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts the service of a user as that user, with nothing of root's but the settings that are named `MSB_…`.
    fn start(&self, uid: u32) -> io::Result<std::process::Child> {
        let user = User::from_uid(Uid::from_raw(uid)).map_err(io::Error::from)?;
        // A user without an entry has the group of its own number and no other.
        let gid = user.as_ref().map_or(Gid::from_raw(uid), |user| user.gid).as_raw();
        let (home, run_dir) = (self.home(uid), self.run_dir(uid));
        for path in [&home, &run_dir] {
            directory(path, 0o700, uid, gid)?;
        }
        let mut command = match &self.manager {
            Some(manager) => {
                let mut command = manager.command(&format!("msb-user-{uid}-{}.scope", uuid::Uuid::new_v4().simple()));
                command.arg(SETPRIV);
                command
            }
            None => Command::new(SETPRIV),
        };
        command.arg(format!("--reuid={uid}")).arg(format!("--regid={gid}"));
        command.arg(if user.is_some() { "--init-groups" } else { "--clear-groups" });
        command.args(["--inh-caps=-all", "--", "env", "-i"]);
        for (name, value) in std::env::vars().filter(|(name, _)| passed_on(name)) {
            command.arg(format!("{name}={value}"));
        }
        let mut own = |name: &str, value: &Path| {
            command.arg(format!("{name}={}", value.display()));
        };
        own("MSB_HOME", &home);
        own("XDG_RUNTIME_DIR", &run_dir);
        own("PATH", Path::new("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"));
        command.arg(&self.program).arg("--behind-door");
        if self.manager.is_some() {
            command.arg("--door-scopes").arg(scopes::socket(&self.place));
        }
        command.stdin(Stdio::null()).current_dir("/");
        command.spawn()
    }

    fn hand_over(self: &Arc<Self>, connection: &UnixStream) -> io::Result<()> {
        let uid = rustix::net::sockopt::socket_peercred(connection)?.uid.as_raw();
        let door = self.door(uid, false)?;
        match say(&door, Word::Connection, Some(connection)) {
            Ok(()) => Ok(()),
            // It ended in between: the next one takes the connection.
            Err(_) => say(&self.door(uid, false)?, Word::Connection, Some(connection)),
        }
    }
}

/// Settings of root's that users' services get: all of msb's but those that say where it is.
fn passed_on(name: &str) -> bool {
    name.starts_with("MSB_") && !["MSB_HOME", "MSB_HOST", "MSB_DAEMON", "MSB_PATH"].contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_of_somebody_else_is_refused() {
        let top = tempfile::tempdir().unwrap();
        let own = Uid::effective().as_raw();
        let path = top.path().join("u");
        directory(&path, 0o711, own, Gid::effective().as_raw()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o711);
        directory(&path, 0o711, own, Gid::effective().as_raw()).unwrap();
        assert!(directory(&path, 0o711, own.wrapping_add(1), 0).is_err());
        std::os::unix::fs::symlink("/tmp", top.path().join("link")).unwrap();
        assert!(directory(&top.path().join("link"), 0o711, own, 0).is_err());
    }

    #[test]
    fn only_settings_are_passed_on() {
        for (name, passed) in
            [("MSB_ENGINE", true), ("MSB_HOME", false), ("MSB_HOST", false), ("SECRET", false), ("PATH", false)]
        {
            assert_eq!(passed_on(name), passed, "{name}");
        }
    }
}
