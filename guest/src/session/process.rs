//! One process of a session: pipes or a terminal, its cgroup, its start and how it ended. Made by `pump`'s callers, owned by the pump.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use msb_protocol::error::ErrorCode;
use msb_protocol::guest::{ExecConfig, Exited, TerminalSize};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{WaitId, WaitIdOptions, WaitIdStatus};
use rustix::pty::OpenptFlags;

use super::Guest;
use crate::account;
use crate::cgroup::SessionGroup;
use crate::command::{self, Command};
use crate::failure::GuestError;
use crate::sys::{self, Spawn, SpawnError, Step};

/// Size of a pipe: fewer switches between process and agent than the default of 64 KiB.
const PIPE_LEN: usize = 256 << 10;

/// A process with the agent's ends of its streams, all non-blocking.
#[derive(Debug)]
pub struct Process {
    /// Its process id, which is also its group's and session's.
    pub pid: u32,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
    /// Where its input is written; none if it has none or it was closed.
    pub stdin: Option<OwnedFd>,
    /// Where stdout and stderr are read; a terminal has only the first.
    pub outputs: [Option<OwnedFd>; 2],
    /// Its cgroup, if the guest has them.
    pub group: Option<SessionGroup>,
    terminal: Option<OwnedFd>,
}

/// The child's ends.
struct ChildEnds {
    stdio: [OwnedFd; 3],
    terminal: bool,
}

impl Process {
    /// Starts a process. `group_name` names its cgroup; `create_workdir` makes a missing working directory, as docker does for a
    /// container's own.
    ///
    /// # Errors
    /// Typed as the guest border has it: `exec_not_found`, `exec_not_executable`, `user_not_found`, `path_not_found`,
    /// `invalid_config`, `exec_failed`.
    pub fn start(guest: &Guest, exec: &ExecConfig, group_name: &str, create_workdir: bool) -> Result<Self, GuestError> {
        let command = prepare(guest, exec)?;
        if create_workdir && let Ok(path) = command.workdir.to_str() {
            // If it cannot be made, the change of directory says so with the better words.
            let _ = guest.root.create_directories(Path::new(path), 0o755);
        }
        let (mut process, ends) = match exec.terminal {
            Some(size) => Self::with_terminal(guest, size, command.identity.uid)?,
            None => Self::with_pipes(guest, exec.stdin)?,
        };
        process.group = match &guest.workload {
            Some(workload) => Some(
                workload.session(group_name).map_err(|error| from_io("cannot make the session's cgroup", &error))?,
            ),
            None => None,
        };
        let stdio = [ends.stdio[0].as_fd(), ends.stdio[1].as_fd(), ends.stdio[2].as_fd()];
        let mut plan = plan(guest, &command, stdio, process.group.as_ref());
        plan.terminal = ends.terminal;
        let mut outcome = sys::spawn(&plan);
        if exec.login && exec.workdir.is_empty() && outcome.as_ref().is_err_and(|error| error.step == Step::Workdir) {
            // A user whose home is missing or closed to them still may log in, as with sshd(8).
            plan.workdir = c"/";
            outcome = sys::spawn(&plan);
        }
        match outcome {
            Ok(child) => {
                process.pid = child.pid;
                process.pidfd = child.pidfd;
                Ok(process)
            }
            Err(error) => {
                if let (Some(workload), Some(group)) = (&guest.workload, process.group.take()) {
                    workload.discard(group);
                }
                Err(describe(error, exec, &command))
            }
        }
    }

    /// Starts this program with a word, confined as a session's process is but in no cgroup of the workload's: that may be frozen.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_own(guest: &Guest, word: &str) -> Result<Self, GuestError> {
        let exec = ExecConfig { argv: vec!["msb-agent".into(), word.into()], ..ExecConfig::default() };
        let command = prepare(guest, &exec)?;
        let program = rustix::fs::open("/proc/self/exe", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| GuestError::exec("cannot open the agent's own program", errno))?;
        let (mut process, ends) = Self::with_pipes(guest, false)?;
        let stdio = [ends.stdio[0].as_fd(), ends.stdio[1].as_fd(), ends.stdio[2].as_fd()];
        let plan = Spawn { program: Some(program.as_fd()), ..plan(guest, &command, stdio, None) };
        let child = sys::spawn(&plan).map_err(|error| describe(error, &exec, &command))?;
        (process.pid, process.pidfd) = (child.pid, child.pidfd);
        Ok(process)
    }

    fn with_pipes(guest: &Guest, stdin: bool) -> Result<(Self, ChildEnds), GuestError> {
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|errno| GuestError::exec("cannot make a pipe", errno));
        let (stdin_read, stdin_write) = if stdin {
            let (read, write) = pipe()?;
            let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE_LEN);
            (read, Some(nonblocking(write)?))
        } else {
            (guest.null_device()?, None)
        };
        let (stdout_read, stdout_write) = pipe()?;
        let (stderr_read, stderr_write) = pipe()?;
        for end in [&stdout_read, &stderr_read] {
            // A smaller pipe is slower and nothing else.
            let _ = rustix::pipe::fcntl_setpipe_size(end, PIPE_LEN);
        }
        let outputs = [Some(nonblocking(stdout_read)?), Some(nonblocking(stderr_read)?)];
        let stdio = [stdin_read, stdout_write, stderr_write];
        Ok((Self::unborn(stdin_write, outputs, None, guest)?, ChildEnds { stdio, terminal: false }))
    }

    fn with_terminal(guest: &Guest, size: TerminalSize, owner: u32) -> Result<(Self, ChildEnds), GuestError> {
        let failed = |errno| GuestError::exec("cannot make a terminal", errno);
        let duplicate = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 3).map_err(failed);
        let master = match &guest.terminals {
            Some(devpts) => {
                rustix::fs::openat(devpts, "ptmx", OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
            }
            None => rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC),
        }
        .map_err(failed)?;
        rustix::pty::unlockpt(&master).map_err(failed)?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).map_err(failed)?;
        rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(owner)), None).map_err(failed)?;
        let master = nonblocking(master)?;
        let process = Self::unborn(Some(duplicate(&master)?), [Some(duplicate(&master)?), None], Some(master), guest)?;
        process.resize(size);
        let stdio = [duplicate(&slave)?, duplicate(&slave)?, slave];
        Ok((process, ChildEnds { stdio, terminal: true }))
    }

    /// The agent's half before there is a process.
    fn unborn(
        stdin: Option<OwnedFd>,
        outputs: [Option<OwnedFd>; 2],
        terminal: Option<OwnedFd>,
        guest: &Guest,
    ) -> Result<Self, GuestError> {
        Ok(Self { pid: 0, pidfd: guest.null_device()?, stdin, outputs, group: None, terminal })
    }

    /// Whether it has a terminal.
    pub fn has_terminal(&self) -> bool {
        self.terminal.is_some()
    }

    /// Sets the terminal's size; sizes out of range are brought into it.
    pub fn resize(&self, size: TerminalSize) {
        let cells = |count: u32| u16::try_from(count.clamp(1, u32::from(u16::MAX))).unwrap_or(u16::MAX);
        if let Some(terminal) = &self.terminal {
            let size = rustix::termios::Winsize {
                ws_row: cells(size.rows),
                ws_col: cells(size.columns),
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            // It can only fail when the terminal is gone, and then nobody sees it.
            let _ = rustix::termios::tcsetwinsize(terminal, size);
        }
    }

    /// Sends a signal to its process group. Call it only before the process was waited for.
    pub fn signal(&self, number: i32) {
        // The group may be gone already: then nothing is left to signal.
        let _ = sys::kill_group(self.pid, number);
    }

    /// Kills everything that belongs to the session.
    pub fn kill_all(&self) {
        let by_group = self.group.as_ref().is_some_and(|group| group.kill().is_ok());
        if !by_group {
            let _ = sys::kill_group(self.pid, libc::SIGKILL);
        }
    }

    /// Collects the end of the process if it has ended.
    pub fn try_wait(&self) -> Option<Exited> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
            Ok(status) => status.map(|status| self.end_of(&status)),
            Err(Errno::INTR) => None,
            // Somebody else waited for it, which nothing in this program does: its true end is unknown, but it is over.
            Err(_) => Some(Exited { code: 255, ..Exited::default() }),
        }
    }

    fn end_of(&self, status: &WaitIdStatus) -> Exited {
        Exited {
            code: status.exit_status().unwrap_or_default(),
            signal: status.terminating_signal().unwrap_or_default(),
            core_dumped: status.dumped(),
            oom_killed: self.group.as_ref().is_some_and(SessionGroup::was_oom_killed),
            timed_out: false,
        }
    }

    /// Bytes that wait in its outputs.
    pub fn waiting(&self) -> [u64; 2] {
        let count =
            |output: &Option<OwnedFd>| output.as_ref().and_then(|fd| rustix::io::ioctl_fionread(fd).ok()).unwrap_or(0);
        [count(&self.outputs[0]), count(&self.outputs[1])]
    }

    /// The descriptor of an output while it is open.
    pub fn output(&self, index: usize) -> Option<BorrowedFd<'_>> {
        self.outputs.get(index).and_then(Option::as_ref).map(AsFd::as_fd)
    }
}

/// How a command becomes a process of this guest.
pub(super) fn plan<'a>(
    guest: &'a Guest,
    command: &'a Command,
    stdio: [BorrowedFd<'a>; 3],
    group: Option<&'a SessionGroup>,
) -> Spawn<'a> {
    Spawn {
        program: None,
        candidates: &command.candidates,
        argv: &command.argv,
        env: &command.env,
        stdio,
        terminal: false,
        root: guest.enter_root.then(|| guest.root.directory()),
        workdir: &command.workdir,
        uid: command.identity.uid,
        gid: command.identity.gid,
        groups: &command.identity.groups,
        limits: &command.limits,
        cgroup: group.map(SessionGroup::directory),
        cgroup_namespace: guest.workload.as_ref().map(|workload| workload.namespace()),
        confinement: guest.enter_root.then(|| guest.security.confinement()),
    }
}

fn nonblocking(fd: OwnedFd) -> Result<OwnedFd, GuestError> {
    rustix::io::ioctl_fionbio(&fd, true).map_err(|errno| GuestError::exec("cannot set up a stream", errno))?;
    Ok(fd)
}

pub(crate) fn from_io(what: &str, error: &io::Error) -> GuestError {
    GuestError::system(ErrorCode::ExecFailed, what, error.raw_os_error().unwrap_or(libc::EIO))
}

/// The texts of /etc/passwd and /etc/group; empty where the image has none.
pub(crate) fn read_accounts(guest: &Guest) -> Result<(Vec<u8>, Vec<u8>), GuestError> {
    let read = |path: &str| match guest.root.read(Path::new(path), account::FILE_LEN_MAX) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(GuestError {
            code: ErrorCode::ExecFailed,
            message: format!("cannot read {path} of the sandbox: {error}"),
            errno: error.raw_os_error().unwrap_or_default(),
        }),
    };
    Ok((read("/etc/passwd")?, read("/etc/group")?))
}

/// Reads the account files and puts the command together.
pub(super) fn prepare(guest: &Guest, exec: &ExecConfig) -> Result<Command, GuestError> {
    let (passwd, group) = read_accounts(guest)?;
    command::prepare(&guest.config, exec, &passwd, &group)
}

/// The words for a failed start.
fn describe(error: SpawnError, exec: &ExecConfig, command: &Command) -> GuestError {
    let name: String = exec.argv.first().map(|name| name.chars().take(256).collect()).unwrap_or_default();
    let quoted = |text: &str| format!("'{text}'");
    match error.step {
        Step::NotFound if name.contains('/') => GuestError {
            errno: error.errno,
            ..GuestError::new(ErrorCode::ExecNotFound, format!("'{name}' does not exist in the sandbox"))
        },
        Step::NotFound => GuestError {
            errno: error.errno,
            ..GuestError::new(ErrorCode::ExecNotFound, format!("'{name}' is in no directory of PATH"))
        },
        Step::NotExecutable => {
            GuestError::system(ErrorCode::ExecNotExecutable, &format!("cannot execute {}", quoted(&name)), error.errno)
        }
        Step::Interpreter => {
            let message = format!("cannot execute '{name}': its interpreter does not exist in the sandbox");
            GuestError { errno: error.errno, ..GuestError::new(ErrorCode::ExecNotExecutable, message) }
        }
        Step::Workdir => {
            let workdir = quoted(&command.workdir.to_string_lossy());
            GuestError::system(
                ErrorCode::PathNotFound,
                &format!("cannot enter the working directory {workdir}"),
                error.errno,
            )
        }
        Step::Execute => {
            GuestError::system(ErrorCode::ExecFailed, &format!("cannot execute {}", quoted(&name)), error.errno)
        }
        step => GuestError::system(
            ErrorCode::ExecFailed,
            &format!("cannot start {} (step {step:?})", quoted(&name)),
            error.errno,
        ),
    }
}
