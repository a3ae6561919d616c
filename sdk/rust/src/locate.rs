//! Which service a client uses, and starting one when none answers.
//!
//! ```text
//!  MSB_HOST set ── yes ─► connect, or fail: the user named it
//!      │ no
//!  the user's socket answers ── yes ─► use it
//!      │ no
//!  the host's socket is there and lets us in (group msb), and MSB_HOME is not set ── yes ─► use it
//!      │ no
//!  take $MSB_HOME/start.lock ──► socket answers by now? ── yes ─► use it (another client was faster)
//!                                   │ no
//!                    start msbd in a session of its own, log to $MSB_HOME/msbd.log, wait until it answers
//! ```
//!
//! The program is `MSB_DAEMON`, else `msbd` in `MSB_PATH` (or beside the program it names), beside our own executable, or in `PATH`.
//! Nothing here is left behind on failure but the log. It never stops or replaces a daemon.

use std::collections::HashMap;
use std::ffi::{CString, OsString};
use std::fs::{File, TryLockError};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::paths::{HOST_SOCKET, HomeLayout, SOCKET_PATH_LEN_MAX, Surroundings};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags};
use nix::sys::signal::{SigSet, Signal};

use crate::client::{Client, OpenError, is_absence, open_failed};
use crate::error::Error;

/// Time for a daemon to answer after it was started.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// Time in which a service that hangs up without a word is taken for one that is just ending.
const ENDING_PATIENCE: Duration = Duration::from_secs(2);
/// Longest wait for the host's service, whose door may have to start ours first.
const HOST_PATIENCE: Duration = Duration::from_secs(90);
/// Size of the log at which the next start moves it aside, in bytes.
const LOG_LEN_MAX: u64 = 16 << 20;
/// Lines of the log that an error shows.
const LOG_TAIL_LINES: usize = 20;
/// What keeps the daemon small after it has loaded an image: few arenas, and large pieces that go back to the system (mallopt(3)).
const ALLOCATOR: [(&str, &str); 2] = [("MALLOC_ARENA_MAX", "2"), ("MALLOC_MMAP_THRESHOLD_", "131072")];
/// `POSIX_SPAWN_SETSID` of glibc 2.26 and newer (spawn.h): the child leads a new session, so it outlives our terminal.
const POSIX_SPAWN_SETSID: i32 = 0x80;

/// Variables a daemon started on demand keeps. Everything else of the caller's environment, secrets among it, stays out of a
/// process that lives for months.
const KEPT_VARIABLES: &[&str] = &[
    "HOME",
    "PATH",
    "USER",
    "LOGNAME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "TMPDIR",
    "XDG_RUNTIME_DIR",
    "RUST_BACKTRACE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];

/// Finds and starts services. Fields are public so that a test or an unusual program can turn each.
#[derive(Clone, Debug)]
pub struct Locator {
    /// What decides about paths.
    pub surroundings: Surroundings,
    /// The daemon's program (`MSB_DAEMON`).
    pub daemon: Option<PathBuf>,
    /// Directory of msb's programs, or one of them (`MSB_PATH`).
    pub runtime_path: Option<PathBuf>,
    /// Directory of our own executable.
    pub executable_dir: Option<PathBuf>,
    /// Directories of `PATH`.
    pub search_path: Vec<PathBuf>,
    /// The socket of the host's service, for those who may use it.
    pub host_socket: PathBuf,
    /// Time for a started daemon to answer.
    pub start_timeout: Duration,
}

impl Locator {
    /// From the process's environment.
    #[must_use]
    pub fn from_environment() -> Self {
        let path = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self {
            surroundings: Surroundings::from_environment(rustix::process::getuid().as_raw()),
            daemon: path("MSB_DAEMON"),
            runtime_path: path("MSB_PATH"),
            executable_dir: std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned)),
            search_path: std::env::var_os("PATH")
                .map(|value| std::env::split_paths(&value).collect())
                .unwrap_or_default(),
            host_socket: path("MSB_HOST_SOCKET").unwrap_or_else(|| HOST_SOCKET.into()),
            start_timeout: START_TIMEOUT,
        }
    }

    /// The service of the host, if there is one and we may use it. Somebody who names a home of their own wants no other. One that is there
    /// and does not answer is an error: a service of our own in its place would hide every sandbox that the host's has.
    async fn host_service(&self) -> Result<Option<Client>, Error> {
        if self.surroundings.msb_home.is_some() {
            return Ok(None);
        }
        let (until, mut pause) = (Instant::now() + ENDING_PATIENCE, Pause::default());
        loop {
            // Only root listens there: anybody else is refused.
            match Client::open_within(&self.host_socket, Some(0), HOST_PATIENCE).await {
                Ok(client) => return Ok(Some(client)),
                Err(OpenError::Io(_)) => return Ok(None),
                Err(OpenError::Lost(_)) if Instant::now() < until => pause.next().await,
                Err(OpenError::Lost(error) | OpenError::Answer(error)) => return Err(error),
            }
        }
    }

    /// The service that answers now; `None` if none does. Starts nothing.
    ///
    /// # Errors
    /// `permission_denied`, `unsupported_operation`; `daemon_unavailable` if `MSB_HOST` names a socket that does not answer.
    pub async fn find(&self) -> Result<Option<Client>, Error> {
        let socket = self.surroundings.control_socket();
        if socket.as_os_str().len() > SOCKET_PATH_LEN_MAX {
            let message =
                format!("the path of the socket is too long: {} (max {SOCKET_PATH_LEN_MAX} bytes)", socket.display());
            return Err(Error::unavailable(message));
        }
        let named = self.surroundings.msb_host.is_some();
        let owner = if named { None } else { Some(self.surroundings.uid) };
        let (until, mut pause) = (Instant::now() + ENDING_PATIENCE, Pause::default());
        let opened = loop {
            match Client::open(&socket, owner).await {
                Err(OpenError::Lost(_)) if Instant::now() < until => pause.next().await,
                opened => break opened,
            }
        };
        match opened {
            Ok(client) => Ok(Some(client)),
            Err(OpenError::Io(error)) if named && is_absence(&error) => Err(match open_failed(&socket, &error) {
                Error::Client(error) => Error::Client(
                    error.with_hint("MSB_HOST names this socket: start the service behind it, or unset MSB_HOST"),
                ),
                other => other,
            }),
            Err(OpenError::Io(error)) if is_absence(&error) => self.host_service().await,
            Err(OpenError::Io(error)) => Err(open_failed(&socket, &error)),
            Err(OpenError::Lost(error) | OpenError::Answer(error)) => Err(error),
        }
    }

    /// The service that answers, started if there is none.
    ///
    /// # Errors
    /// Those of [`Locator::find`]; `runtime_not_found` if there is no msbd to start, `home_unusable`, and `daemon_unavailable`
    /// with the end of its log if it does not come up.
    pub async fn connect(&self) -> Result<Client, Error> {
        match self.find().await? {
            Some(client) => Ok(client.found_by(self)),
            None => Ok(self.start().await?.found_by(self)),
        }
    }

    /// The daemon's program.
    ///
    /// # Errors
    /// `runtime_not_found` naming the places that were looked at.
    pub fn daemon_program(&self) -> Result<PathBuf, Error> {
        let is_program = |path: &Path| path.metadata().is_ok_and(|data| data.is_file());
        if let Some(daemon) = &self.daemon {
            return if is_program(daemon) {
                Ok(absolute(daemon))
            } else {
                Err(not_found(format!("MSB_DAEMON names {}, which is no file", daemon.display())))
            };
        }
        if let Some(path) = &self.runtime_path {
            let dir = if path.is_dir() { path.clone() } else { path.parent().map(Path::to_owned).unwrap_or_default() };
            let program = dir.join("msbd");
            return if is_program(&program) {
                Ok(absolute(&program))
            } else {
                Err(not_found(format!("MSB_PATH names {}, where there is no msbd", path.display())))
            };
        }
        let mut dirs = self.executable_dir.iter().chain(&self.search_path);
        match dirs.find_map(|dir| Some(dir.join("msbd")).filter(|program| is_program(program))) {
            Some(program) => Ok(absolute(&program)),
            None => {
                let own = self.executable_dir.as_deref().unwrap_or(Path::new("?"));
                Err(not_found(format!("the program msbd is neither in {} nor in PATH", own.display())))
            }
        }
    }

    /// The command line's program: beside the daemon's, else in `PATH`, else by its name alone.
    #[must_use]
    pub fn command_program(&self) -> PathBuf {
        let beside = self.daemon_program().ok().and_then(|daemon| Some(daemon.parent()?.to_owned()));
        let mut dirs = beside.iter().chain(&self.search_path).map(|dir| dir.join("msb"));
        dirs.find(|program| program.is_file()).map_or_else(|| "msb".into(), |program| absolute(&program))
    }

    async fn start(&self) -> Result<Client, Error> {
        let program = self.daemon_program()?;
        let layout = HomeLayout::new(self.surroundings.home_dir());
        make_home(&layout.home)?;
        let deadline = Instant::now() + self.start_timeout;
        let lock_path = layout.home.join("start.lock");
        let lock = private_file()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(|error| home_unusable(&lock_path, &error))?;
        let mut pause = Pause::default();
        // Whoever holds the lock is starting a daemon: take it over if that works, the daemon it starts if that is faster.
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => pause.next().await,
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::unavailable("another client has been starting msbd for too long"));
                }
                Err(TryLockError::Error(error)) => return Err(home_unusable(&lock_path, &error)),
            }
            if let Some(client) = self.find().await? {
                return Ok(client);
            }
        }
        if let Some(client) = self.find().await? {
            return Ok(client);
        }
        let log = layout.daemon_log();
        let log_start = prepare_log(&log)?;
        let child = spawn(&program, &log).map_err(|error| {
            let message = format!("cannot start {}: {error}", program.display());
            Error::Client(ApiError::new(ErrorCode::DaemonUnavailable, message))
        })?;
        let mut pause = Pause::default();
        loop {
            pause.next().await;
            // The look at the process comes first: a daemon that ended because another one serves this home leaves that one answering.
            let ended = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::NOHANG).ok().flatten();
            match self.find().await {
                Ok(Some(client)) => return Ok(client),
                Ok(None) => {}
                Err(error) if ended.is_some() => return Err(error),
                // Half-started: the socket exists, the daemon does not answer on it yet.
                Err(_) => {}
            }
            if let Some((_, status)) = ended {
                let how = match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => format!("with code {code}"),
                    (None, Some(signal)) => format!("by signal {signal}"),
                    (None, None) => "at once".to_owned(),
                };
                return Err(start_failed(format!("msbd ended {how} while it was starting"), &log, log_start));
            }
            if Instant::now() >= deadline {
                return Err(start_failed(
                    format!("msbd did not answer within {} s", self.start_timeout.as_secs()),
                    &log,
                    log_start,
                ));
            }
        }
    }
}

/// Waits between looks: often at first, because a daemon is there within milliseconds.
#[derive(Default)]
struct Pause {
    last_ms: u64,
}

impl Pause {
    async fn next(&mut self) {
        self.last_ms = (self.last_ms * 2).clamp(1, 20);
        tokio::time::sleep(Duration::from_millis(self.last_ms)).await;
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn not_found(message: String) -> Error {
    let hint =
        "install msb (`cargo xtask install --prefix ~/.local` in its repository), or set MSB_PATH to where it is";
    Error::Client(ApiError::new(ErrorCode::RuntimeNotFound, message).with_hint(hint))
}

fn home_unusable(path: &Path, error: &std::io::Error) -> Error {
    Error::Client(ApiError::new(ErrorCode::HomeUnusable, format!("{}: {error}", path.display())))
}

fn make_home(home: &Path) -> Result<(), Error> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(home).map_err(|error| home_unusable(home, &error))
}

fn private_file() -> std::fs::OpenOptions {
    let mut options = File::options();
    options.mode(0o600);
    options
}

/// Makes the log a file that can be appended to; gives its length.
fn prepare_log(log: &Path) -> Result<u64, Error> {
    let open = || private_file().create(true).append(true).open(log).map_err(|error| home_unusable(log, &error));
    let len = |file: &File| file.metadata().map(|data| data.len()).unwrap_or_default();
    let file = open()?;
    if len(&file) < LOG_LEN_MAX {
        return Ok(len(&file));
    }
    let mut old = log.as_os_str().to_owned();
    old.push(".1");
    std::fs::rename(log, old).map_err(|error| home_unusable(log, &error))?;
    open().map(|file| len(&file))
}

fn start_failed(message: String, log: &Path, log_start: u64) -> Error {
    let text = std::fs::read(log).unwrap_or_default();
    let new = text.get(usize::try_from(log_start).unwrap_or(usize::MAX)..).unwrap_or_default();
    let new = String::from_utf8_lossy(new);
    let lines: Vec<&str> = new.lines().collect();
    let tail = lines.iter().skip(lines.len().saturating_sub(LOG_TAIL_LINES)).map(|line| (*line).to_owned());
    let error = ApiError::new(ErrorCode::DaemonUnavailable, message)
        .with_hint(format!("see the end of {}, or run `msbd` in a terminal", log.display()));
    Error::Client(error.with_details(tail))
}

/// Starts the daemon in a session of its own, with a clean environment, signals at their defaults and the log as its output.
fn spawn(program: &Path, log: &Path) -> std::io::Result<rustix::process::Pid> {
    let text =
        |os: OsString| CString::new(os.into_vec()).map_err(|_| std::io::Error::from(std::io::ErrorKind::InvalidInput));
    let null = File::options().read(true).open("/dev/null")?;
    let output = private_file().create(true).append(true).open(log)?;
    let mut actions = PosixSpawnFileActions::init()?;
    actions.add_dup2(null.as_raw_fd(), 0)?;
    actions.add_dup2(output.as_raw_fd(), 1)?;
    actions.add_dup2(output.as_raw_fd(), 2)?;
    let mut attributes = PosixSpawnAttr::init()?;
    let flags = PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF;
    attributes.set_flags(flags | PosixSpawnFlags::from_bits_retain(POSIX_SPAWN_SETSID))?;
    attributes.set_sigmask(&SigSet::empty())?;
    // Rust programs ignore SIGPIPE, nohup ignores SIGHUP; neither is the daemon's wish.
    let mut defaults = SigSet::empty();
    for signal in [Signal::SIGPIPE, Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGCHLD] {
        defaults.add(signal);
    }
    attributes.set_sigdefault(&defaults)?;
    let allocator = ALLOCATOR.map(|(name, value)| (OsString::from(name), OsString::from(value)));
    let environment = allocator
        .into_iter()
        .chain(environment(std::env::vars_os()))
        .map(|(name, value)| {
            let mut entry = name;
            entry.push("=");
            entry.push(value);
            text(entry)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let arguments = [text(program.as_os_str().to_owned())?];
    let child = nix::spawn::posix_spawn(program, &actions, &attributes, &arguments, &environment)?;
    rustix::process::Pid::from_raw(child.as_raw()).ok_or_else(|| std::io::Error::other("no process id"))
}

/// What a daemon keeps of the caller's environment: the listed variables and every `MSB_*` but `MSB_HOST`.
fn environment(all: impl Iterator<Item = (OsString, OsString)>) -> HashMap<OsString, OsString> {
    all.filter(|(name, _)| {
        let ours = name.as_bytes().starts_with(b"MSB_") && name != "MSB_HOST";
        ours || KEPT_VARIABLES.iter().any(|kept| name == *kept)
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locator(home: &Path) -> Locator {
        Locator {
            surroundings: Surroundings {
                msb_home: Some(home.join("home")),
                xdg_runtime_dir: Some(home.join("run")),
                uid: rustix::process::getuid().as_raw(),
                ..Default::default()
            },
            daemon: None,
            runtime_path: None,
            executable_dir: None,
            search_path: Vec::new(),
            host_socket: "/nonexistent/msbd.sock".into(),
            start_timeout: Duration::from_secs(5),
        }
    }

    fn program(path: &Path, script: &str) {
        use std::os::unix::fs::PermissionsExt;
        std::fs::write(path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn the_daemon_is_looked_for_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| {
            let place = dir.path().join(name);
            std::fs::create_dir(&place).unwrap();
            program(&place.join("msbd"), "");
            place
        };
        let (own, path, runtime, named) = (place("own"), place("path"), place("runtime"), place("named"));
        let mut locator = locator(dir.path());
        let error = locator.daemon_program().unwrap_err();
        assert_eq!(error.code(), ErrorCode::RuntimeNotFound);
        assert!(error.hint().contains("MSB_PATH"));
        locator.search_path = vec!["/nowhere".into(), path.clone()];
        assert_eq!(locator.daemon_program().unwrap(), path.join("msbd"));
        locator.executable_dir = Some(own.clone());
        assert_eq!(locator.daemon_program().unwrap(), own.join("msbd"));
        locator.runtime_path = Some(runtime.join("msb"));
        assert_eq!(locator.daemon_program().unwrap(), runtime.join("msbd"));
        locator.daemon = Some(named.join("msbd"));
        assert_eq!(locator.daemon_program().unwrap(), named.join("msbd"));
        // What the user names is used or refused, never passed over.
        locator.daemon = Some(dir.path().join("missing"));
        assert_eq!(locator.daemon_program().unwrap_err().code(), ErrorCode::RuntimeNotFound);
    }

    #[tokio::test]
    async fn a_daemon_that_dies_at_once_is_told_with_the_end_of_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut locator = locator(dir.path());
        program(&dir.path().join("msbd"), "echo the disk is on fire >&2; exit 3");
        locator.daemon = Some(dir.path().join("msbd"));
        let error = locator.connect().await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::DaemonUnavailable);
        assert!(error.to_string().contains("code 3"), "{error}");
        assert_eq!(error.api().details, ["the disk is on fire"]);
    }

    #[tokio::test]
    async fn a_host_whose_service_fails_is_no_reason_for_a_service_of_ones_own() {
        if !rustix::process::getuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut locator = locator(dir.path());
        locator.surroundings.msb_home = None;
        locator.surroundings.home = Some(dir.path().join("user"));
        locator.host_socket = dir.path().join("host.sock");
        program(&dir.path().join("msbd"), &format!("touch {}", dir.path().join("started").display()));
        locator.daemon = Some(dir.path().join("msbd"));
        // A door that can start nobody's service closes what it was handed.
        let door = std::os::unix::net::UnixListener::bind(&locator.host_socket).unwrap();
        std::thread::spawn(move || door.incoming().for_each(drop));
        assert!(locator.connect().await.is_err());
        assert!(!dir.path().join("started").exists());
        // Where there is none, ours is started.
        locator.host_socket = dir.path().join("none.sock");
        assert!(locator.find().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_named_socket_that_does_not_answer_starts_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut locator = locator(dir.path());
        locator.surroundings.msb_host = Some(dir.path().join("none.sock"));
        program(&dir.path().join("msbd"), &format!("touch {}", dir.path().join("started").display()));
        locator.daemon = Some(dir.path().join("msbd"));
        let error = locator.connect().await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::DaemonUnavailable);
        assert!(error.hint().contains("MSB_HOST"));
        assert!(!dir.path().join("started").exists());
    }

    #[test]
    fn secrets_of_the_caller_do_not_reach_the_daemon() {
        let all = [
            ("PATH", "/bin"),
            ("AWS_SECRET_ACCESS_KEY", "x"),
            ("MSB_HOME", "/h"),
            ("MSB_HOST", "/s"),
            ("HOME", "/root"),
        ];
        let kept = environment(all.into_iter().map(|(name, value)| (name.into(), value.into())));
        let mut names: Vec<_> = kept.keys().filter_map(|name| name.to_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["HOME", "MSB_HOME", "PATH"]);
    }
}
