//! Starts a process from a program that has threads: one clone3 straight into the cgroup, then only system calls until execve.
//!
//! ```text
//!  parent: builds every string and array ─ clone3 ─ reads the error pipe until it closes (execve worked) or says what failed
//!  child:  signals, session, oom score, cgroup namespace, stdio, chroot, limits, directory, bounding set, identity, capabilities,
//!          no_new_privs, system call filters, execve
//! ```
//!
//! The child allocates nothing, takes no lock and calls no libc function that does: other threads may have held them when it was
//! cloned. For the same reason ids are set with raw system calls (libc's versions signal every thread).

use std::ffi::{CStr, CString, c_char, c_int};
use std::io::Read;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::pipe::{PipeFlags, pipe_with};

use crate::limits::Limit;

/// `_LINUX_CAPABILITY_VERSION_3` (linux/capability.h).
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// What a process must never have again, in the form the child needs: no allocation between clone and execve.
#[derive(Clone, Copy, Debug)]
pub struct Confinement<'a> {
    /// Capabilities that stay, one bit each by number.
    pub capabilities: u64,
    /// Whether set-user-id programs give nothing from here on. Filters need it.
    pub no_new_privileges: bool,
    /// System call filters (seccomp(2)), entered in this order.
    pub filters: &'a [Vec<libc::sock_filter>],
}

/// The header of capset(2).
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: c_int,
}

/// One half of the sets of capset(2).
#[repr(C)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// CLONE_INTO_CGROUP (linux/sched.h); libc has it with a type too small for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What to start. Descriptors are lent; the child has its own copies.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// A program that is open already, in place of the candidates: one from outside the root.
    pub program: Option<BorrowedFd<'a>>,
    /// Paths to try in turn, inside the root.
    pub candidates: &'a [CString],
    /// Arguments.
    pub argv: &'a [CString],
    /// Environment as `NAME=value`.
    pub env: &'a [CString],
    /// Standard input, output and error.
    pub stdio: [BorrowedFd<'a>; 3],
    /// Whether standard input is a terminal that becomes the controlling one.
    pub terminal: bool,
    /// The directory that becomes the root; none: the caller's own.
    pub root: Option<BorrowedFd<'a>>,
    /// Working directory inside the root.
    pub workdir: &'a CStr,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: &'a [u32],
    /// Resource limits.
    pub limits: &'a [Limit],
    /// The cgroup's directory to start in.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// A cgroup namespace to enter.
    pub cgroup_namespace: Option<BorrowedFd<'a>>,
    /// What is taken away; none: nothing.
    pub confinement: Option<Confinement<'a>>,
}

/// A process that was started; whoever holds this must wait for it.
#[derive(Debug)]
pub struct Child {
    /// Its process id, also of its group and session.
    pub pid: u32,
    /// A descriptor that names it whatever becomes of the id.
    pub pidfd: OwnedFd,
}

/// Where it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Making the process itself.
    Clone = 1,
    /// Session, terminal or standard streams.
    Streams = 2,
    /// The cgroup namespace.
    Namespace = 3,
    /// The root directory.
    Root = 4,
    /// A resource limit.
    Limits = 5,
    /// The working directory.
    Workdir = 6,
    /// User, groups or capabilities.
    Identity = 7,
    /// execve: no candidate exists.
    NotFound = 8,
    /// execve: a candidate exists but cannot run.
    NotExecutable = 9,
    /// execve: a candidate's interpreter or loader does not exist.
    Interpreter = 10,
    /// execve: anything else.
    Execute = 11,
}

impl Step {
    fn from_byte(byte: u8) -> Self {
        [
            Self::Clone,
            Self::Streams,
            Self::Namespace,
            Self::Root,
            Self::Limits,
            Self::Workdir,
            Self::Identity,
            Self::NotFound,
            Self::NotExecutable,
            Self::Interpreter,
        ]
        .into_iter()
        .find(|step| *step as u8 == byte)
        .unwrap_or(Self::Execute)
    }
}

/// Why no process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpawnError {
    /// Where it failed.
    pub step: Step,
    /// errno(3).
    pub errno: i32,
}

/// Starts a process. Blocks until it has executed its program or failed to.
///
/// # Errors
/// [`SpawnError`] with the step that failed; nothing is left behind then.
pub fn spawn(plan: &Spawn<'_>) -> Result<Child, SpawnError> {
    let failed = |step, errno: rustix::io::Errno| SpawnError { step, errno: errno.raw_os_error() };
    let (error_read, error_write) = pipe_with(PipeFlags::CLOEXEC).map_err(|errno| failed(Step::Clone, errno))?;
    let argv = pointers(plan.argv);
    let env = pointers(plan.env);
    let mut pidfd: RawFd = -1;
    let mut flags = libc::CLONE_PIDFD as u64;
    if plan.cgroup.is_some() {
        flags |= CLONE_INTO_CGROUP;
    }
    let arguments = libc::clone_args {
        flags,
        pidfd: ptr::from_mut(&mut pidfd) as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: plan.cgroup.map_or(0, |fd| u64::from(fd.as_raw_fd().unsigned_abs())),
    };
    // SAFETY: the arguments are a valid clone_args of the size given, `pidfd` outlives the call, and without CLONE_VM the child has
    // its own copy of all memory: it continues here with a stack of its own, as after fork.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, ptr::from_ref(&arguments), size_of::<libc::clone_args>()) };
    if pid == 0 {
        run_child(plan, &argv, &env, error_write.as_raw_fd());
    }
    drop(error_write);
    let Ok(pid) = u32::try_from(pid) else {
        return Err(SpawnError { step: Step::Clone, errno: nix::errno::Errno::last_raw() });
    };
    // SAFETY: clone3 succeeded with CLONE_PIDFD, so the kernel stored a new descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let mut report = Vec::with_capacity(5);
    let read = std::fs::File::from(error_read).take(5).read_to_end(&mut report);
    match (read, report.as_slice()) {
        (Ok(_), []) => Ok(Child { pid, pidfd }),
        (_, report) => {
            // It is about to exit or is gone already: the wait cannot last.
            let options = rustix::process::WaitIdOptions::EXITED;
            let _ = rustix::process::waitid(rustix::process::WaitId::PidFd(std::os::fd::AsFd::as_fd(&pidfd)), options);
            let errno = report.get(1..5).and_then(|bytes| bytes.try_into().ok()).map_or(libc::EIO, i32::from_ne_bytes);
            Err(SpawnError { step: report.first().map_or(Step::Execute, |byte| Step::from_byte(*byte)), errno })
        }
    }
}

/// A NULL-terminated array of C strings; valid as long as `strings` is.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect()
}

/// The child's whole life before its program.
fn run_child(plan: &Spawn<'_>, argv: &[*const c_char], env: &[*const c_char], report: RawFd) -> ! {
    let failure = match prepare_child(plan) {
        Ok(()) => match plan.program {
            Some(program) => execute_open(program, argv, env),
            None => execute(plan.candidates, argv, env),
        },
        Err(failure) => failure,
    };
    let errno = failure.errno.to_ne_bytes();
    let bytes = [failure.step as u8, errno[0], errno[1], errno[2], errno[3]];
    // SAFETY: `bytes` is valid for its length; _exit runs no handlers and no destructors of the parent's copies.
    unsafe {
        libc::write(report, bytes.as_ptr().cast(), bytes.len());
        libc::_exit(127)
    }
}

fn prepare_child(plan: &Spawn<'_>) -> Result<(), SpawnError> {
    // SAFETY: every call below is a plain system call on memory that this function or the plan owns, and is async-signal-safe; the
    // plan's descriptors are open because the parent holds them while it waits for this child.
    unsafe {
        reset_signals();
        libc::umask(0o022);
        check(Step::Streams, c_long(libc::setsid()))?;
        write_oom_score();
        if let Some(namespace) = plan.cgroup_namespace {
            check(Step::Namespace, c_long(libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWCGROUP)))?;
        }
        for (target, source) in plan.stdio.iter().enumerate() {
            // The targets 0, 1, 2 always fit a c_int.
            check(Step::Streams, c_long(libc::dup2(source.as_raw_fd(), target as c_int)))?;
        }
        if plan.terminal {
            check(Step::Streams, c_long(libc::ioctl(0, libc::TIOCSCTTY, 0)))?;
        }
        // All else is CLOEXEC already; this covers a descriptor that a defect forgot.
        libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        if let Some(root) = plan.root {
            check(Step::Root, c_long(libc::fchdir(root.as_raw_fd())))?;
            check(Step::Root, c_long(libc::chroot(c".".as_ptr())))?;
        }
        for limit in plan.limits {
            let value = libc::rlimit64 { rlim_cur: limit.soft, rlim_max: limit.hard };
            let old: *mut libc::rlimit64 = ptr::null_mut();
            let outcome =
                check(Step::Limits, libc::syscall(libc::SYS_prlimit64, 0, limit.resource, ptr::from_ref(&value), old));
            if !limit.is_default {
                outcome?;
            }
        }
        check(Step::Workdir, c_long(libc::chdir(plan.workdir.as_ptr())))?;
        if let Some(confinement) = &plan.confinement {
            limit_bounding_set(confinement.capabilities)?;
        }
        check(Step::Identity, libc::syscall(libc::SYS_setgroups, plan.groups.len(), plan.groups.as_ptr()))?;
        check(Step::Identity, libc::syscall(libc::SYS_setresgid, plan.gid, plan.gid, plan.gid))?;
        check(Step::Identity, libc::syscall(libc::SYS_setresuid, plan.uid, plan.uid, plan.uid))?;
        if let Some(confinement) = &plan.confinement {
            // Another user than root has lost its capabilities with the change already.
            if plan.uid == 0 {
                set_capabilities(confinement.capabilities)?;
            }
            confine(confinement)?;
        }
        Ok(())
    }
}

/// Takes out of the bounding set whatever is not in the mask. A capability that this kernel does not know is none to take.
fn limit_bounding_set(mask: u64) -> Result<(), SpawnError> {
    for number in 0..64u64 {
        if mask & (1 << number) != 0 {
            continue;
        }
        // SAFETY: prctl with these options takes no pointers.
        let outcome = unsafe { c_long(libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0)) };
        match check(Step::Identity, outcome) {
            Err(SpawnError { errno: libc::EINVAL, .. }) => return Ok(()),
            outcome => outcome?,
        }
    }
    Ok(())
}

/// Effective and permitted become the mask, inheritable and ambient nothing.
fn set_capabilities(mask: u64) -> Result<(), SpawnError> {
    // SAFETY: both structures are laid out as capset(2) reads them and live through the call; prctl takes no pointers.
    unsafe {
        let none: libc::c_ulong = 0;
        check(
            Step::Identity,
            c_long(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, none, none, none)),
        )?;
        let header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
        let mut data = [
            CapabilityData { effective: 0, permitted: 0, inheritable: 0 },
            CapabilityData { effective: 0, permitted: 0, inheritable: 0 },
        ];
        let header_pointer = ptr::from_ref(&header);
        check(Step::Identity, libc::syscall(libc::SYS_capget, header_pointer, data.as_mut_ptr()))?;
        for (half, data) in data.iter_mut().enumerate() {
            let part = (mask >> (32 * half)) as u32;
            data.permitted &= part;
            data.effective = data.permitted;
            data.inheritable = 0;
        }
        check(Step::Identity, libc::syscall(libc::SYS_capset, header_pointer, data.as_ptr()))
    }
}

/// No new privileges, then the filters: nothing after this but execve and the report of its failure.
fn confine(confinement: &Confinement<'_>) -> Result<(), SpawnError> {
    if !confinement.no_new_privileges {
        return Ok(());
    }
    let (one, none): (libc::c_ulong, libc::c_ulong) = (1, 0);
    // SAFETY: prctl with this option takes no pointers.
    check(Step::Identity, unsafe { c_long(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, one, none, none, none)) })?;
    for filter in confinement.filters {
        let Ok(len) = u16::try_from(filter.len()) else {
            return Err(SpawnError { step: Step::Identity, errno: libc::E2BIG });
        };
        // The kernel only reads the program, whatever the type of the pointer says.
        let program = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut() };
        // SAFETY: the program's `len` instructions live in the plan, which outlives the call.
        let outcome = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
        check(Step::Identity, outcome)?;
    }
    Ok(())
}

fn c_long(result: c_int) -> libc::c_long {
    libc::c_long::from(result)
}

fn check(step: Step, result: libc::c_long) -> Result<(), SpawnError> {
    if result == -1 { Err(SpawnError { step, errno: nix::errno::Errno::last_raw() }) } else { Ok(()) }
}

/// No signal blocked, none ignored: Rust's runtime ignores SIGPIPE, which a program must not inherit.
fn reset_signals() {
    // SAFETY: zeroed sigset_t and sigaction are valid (empty set, SIG_DFL), and both live through the calls.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_DFL;
        for signal in 1..=64 {
            // KILL, STOP and the two that libc keeps for itself refuse; they cannot be changed anyway.
            libc::sigaction(signal, ptr::from_ref(&action), ptr::null_mut());
        }
        let empty: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, ptr::from_ref(&empty), ptr::null_mut());
    }
}

/// The agent is exempt from the OOM killer, its children are not. Without /proc (a test in a bare root) nothing is inherited to undo.
fn write_oom_score() {
    // SAFETY: the path is NUL-terminated, the byte is valid, and the descriptor is closed again.
    unsafe {
        let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, b"0".as_ptr().cast(), 1);
            libc::close(fd);
        }
    }
}

/// Executes an open file; comes back only with a failure.
fn execute_open(program: BorrowedFd<'_>, argv: &[*const c_char], env: &[*const c_char]) -> SpawnError {
    // SAFETY: the strings of the NULL-terminated arrays live in the plan, which outlives this call; the descriptor is open.
    let errno = unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            env.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
        nix::errno::Errno::last_raw()
    };
    SpawnError { step: Step::Execute, errno }
}

/// Tries the candidates as execvp(3) does; comes back only with a failure.
fn execute(candidates: &[CString], argv: &[*const c_char], env: &[*const c_char]) -> SpawnError {
    let mut failure = SpawnError { step: Step::NotFound, errno: libc::ENOENT };
    for path in candidates {
        // SAFETY: path and the strings of the NULL-terminated arrays live in the plan, which outlives this call.
        let exists = unsafe {
            libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr());
            let errno = nix::errno::Errno::last_raw();
            let exists = libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::F_OK, 0) == 0;
            match errno {
                libc::ENOENT | libc::ENOTDIR if exists => Some((Step::Interpreter, errno)),
                libc::ENOENT | libc::ENOTDIR | libc::ENAMETOOLONG | libc::ELOOP => None,
                libc::EACCES | libc::ENOEXEC | libc::EISDIR | libc::ELIBBAD | libc::EPERM => {
                    Some((Step::NotExecutable, errno))
                }
                _ => Some((Step::Execute, errno)),
            }
        };
        match exists {
            None => {}
            // A later directory of PATH may hold one that can be executed.
            Some((step @ Step::NotExecutable, errno)) => failure = SpawnError { step, errno },
            Some((step, errno)) => return SpawnError { step, errno },
        }
    }
    failure
}
