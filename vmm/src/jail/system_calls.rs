//! The allow-list of system calls: one table, each line with who may and why.
//!
//! Numbers and conditions are fixed when compiling; the filters are BPF made once in [`Filters::compile`]. Each thread carries three: the
//! union of the classes there are (put on every thread at once when the jail closes), its class's own, and one that answers `clone3` with ENOSYS
//! so that libc falls back to `clone`, whose flags a filter can read.

use std::collections::BTreeMap;

use kvm_bindings::KVMIO;
use libc::c_long;
use seccompiler::{BpfProgram, SeccompAction};

use super::program::{Condition, assemble};
use super::{JailError, ThreadClass};

/// Bit sets of [`ThreadClass`].
const SERVICE: u8 = ThreadClass::Service as u8;
const DEVICE: u8 = ThreadClass::Device as u8;
const NETWORK: u8 = ThreadClass::Network as u8;
const VCPU: u8 = ThreadClass::Vcpu as u8;
const SHARE: u8 = 16;
const ALL: u8 = SERVICE | DEVICE | NETWORK | VCPU;
/// Only where there is a QEMU child.
const WITH_CHILD: u8 = 1 << 7;

/// What an argument must be.
#[derive(Clone, Copy)]
enum When {
    Any,
    /// This argument (32 bits) is one of these.
    OneOf(u8, &'static [u64]),
    /// No bit of the mask is set in this argument.
    Without(u8, u64),
    /// All bits of the mask are set in this argument.
    With(u8, u64),
    /// This argument is our own process id.
    OwnProcess(u8),
}
use When::{Any, OneOf, OwnProcess, With, Without};

/// One line of the table.
struct Line(c_long, u8, When, &'static str);

/// `ioctl` requests of vCPU threads: enter the guest, say where it was when KVM gave up, tell the guest's watchdogs that it was halted. The
/// others read the machine when it is saved; none of them changes it, and what is put into a machine is put there before the jail closes.
const VCPU_REQUESTS: &[u64] = &[
    io(0x80),
    ior(0x81, size_of::<kvm_bindings::kvm_regs>()),
    io(0xad),
    // KVM_GET_SREGS, MSRS, LAPIC, MP_STATE, VCPU_EVENTS, DEBUGREGS, TSC_KHZ, XSAVE, XCRS.
    ior(0x83, size_of::<kvm_bindings::kvm_sregs>()),
    iowr(0x88, size_of::<kvm_bindings::kvm_msrs>()),
    ior(0x8e, size_of::<kvm_bindings::kvm_lapic_state>()),
    ior(0x98, size_of::<kvm_bindings::kvm_mp_state>()),
    ior(0x9f, size_of::<kvm_bindings::kvm_vcpu_events>()),
    ior(0xa1, size_of::<kvm_bindings::kvm_debugregs>()),
    io(0xa3),
    ior(0xa4, size_of::<kvm_bindings::kvm_xsave>()),
    ior(0xa6, size_of::<kvm_bindings::kvm_xcrs>()),
    // KVM_GET_IRQCHIP, PIT2, CLOCK, of the VM.
    iowr(0x62, size_of::<kvm_bindings::kvm_irqchip>()),
    ior(0x9f, size_of::<kvm_bindings::kvm_pit_state2>()),
    ior(0x7c, size_of::<kvm_bindings::kvm_clock_data>()),
];

/// `_IO(KVMIO, number)`.
const fn io(number: u64) -> u64 {
    ((KVMIO as u64) << 8) | number
}

/// `_IOR(KVMIO, number, size)`.
const fn ior(number: u64, size: usize) -> u64 {
    (2 << 30) | ((size as u64) << 16) | io(number)
}

/// `_IOWR(KVMIO, number, size)`.
const fn iowr(number: u64, size: usize) -> u64 {
    (1 << 30) | ior(number, size)
}

const EXECUTABLE: u64 = libc::PROT_EXEC as u64;
const THREAD_FLAGS: u64 = (libc::CLONE_THREAD | libc::CLONE_VM) as u64;
const DESCRIPTOR_COMMANDS: &[u64] = &[
    libc::F_DUPFD_CLOEXEC as u64,
    libc::F_GETFL as u64,
    libc::F_SETFL as u64,
    libc::F_GETFD as u64,
    libc::F_SETFD as u64,
];
const INTERNET: &[u64] = &[libc::AF_INET as u64, libc::AF_INET6 as u64];
const LOCAL: &[u64] = &[libc::AF_UNIX as u64];
/// Name and (for the jail itself) no_new_privs.
const PRCTL_OPTIONS: &[u64] = &[libc::PR_SET_NAME as u64, libc::PR_SET_NO_NEW_PRIVS as u64, libc::PR_GET_NAME as u64];

/// Who may call what, and why.
const TABLE: &[Line] = &[
    // Bytes on descriptors that are open.
    Line(libc::SYS_read, ALL, Any, "eventfds, sockets, logs"),
    Line(libc::SYS_write, ALL, Any, "eventfds, sockets, logs, console"),
    Line(libc::SYS_readv, ALL, Any, "sockets into guest memory"),
    Line(libc::SYS_writev, ALL, Any, "logs in one piece"),
    Line(libc::SYS_close, ALL, Any, "descriptors end"),
    Line(
        libc::SYS_fcntl,
        ALL,
        OneOf(1, DESCRIPTOR_COMMANDS),
        "eventfds are shared with workers; sockets are made non-blocking",
    ),
    Line(libc::SYS_dup, SERVICE, Any, "streams are split into two halves"),
    Line(libc::SYS_lseek, SERVICE | DEVICE, Any, "log sizes; holes of sparse disks"),
    Line(libc::SYS_fstat, SERVICE | DEVICE | NETWORK, Any, "sizes of what is open"),
    Line(libc::SYS_newfstatat, SERVICE | DEVICE, Any, "sizes; paths only as Landlock allows"),
    Line(libc::SYS_statx, SERVICE | DEVICE, Any, "as newfstatat, what std calls"),
    // Waiting.
    Line(libc::SYS_futex, ALL, Any, "locks, condition variables, channels"),
    Line(libc::SYS_poll, ALL, Any, "one descriptor with a deadline"),
    Line(libc::SYS_ppoll, ALL, Any, "as poll"),
    Line(libc::SYS_epoll_wait, SERVICE | DEVICE | NETWORK, Any, "event loops"),
    Line(libc::SYS_epoll_pwait, SERVICE | DEVICE | NETWORK, Any, "event loops"),
    Line(libc::SYS_epoll_pwait2, SERVICE | DEVICE | NETWORK, Any, "event loops with fine deadlines"),
    Line(libc::SYS_epoll_ctl, ALL, Any, "workers register what they watch"),
    Line(libc::SYS_epoll_create1, ALL, Any, "a worker's own set"),
    Line(libc::SYS_eventfd2, ALL, Any, "wake-ups of devices that are set up again"),
    Line(libc::SYS_timerfd_create, ALL, Any, "deadlines of workers"),
    Line(libc::SYS_timerfd_settime, ALL, Any, "deadlines of workers"),
    Line(libc::SYS_clock_nanosleep, ALL, Any, "pauses"),
    Line(libc::SYS_nanosleep, ALL, Any, "pauses"),
    Line(libc::SYS_restart_syscall, ALL, Any, "the kernel continues a sleep with it"),
    Line(libc::SYS_clock_gettime, ALL, Any, "time, where the vDSO cannot"),
    Line(libc::SYS_gettimeofday, ALL, Any, "time, where the vDSO cannot"),
    Line(libc::SYS_sched_yield, ALL, Any, "spinning locks of the standard library"),
    // Memory, never executable.
    Line(libc::SYS_mmap, ALL, Without(2, EXECUTABLE), "allocator, thread stacks, a front end's guest memory"),
    Line(libc::SYS_mprotect, ALL, Without(2, EXECUTABLE), "guard pages of thread stacks"),
    Line(libc::SYS_munmap, ALL, Any, "allocator"),
    Line(libc::SYS_mremap, ALL, Any, "allocator"),
    Line(libc::SYS_madvise, ALL, Any, "allocator; balloon and free page reporting"),
    Line(libc::SYS_brk, ALL, Any, "allocator"),
    Line(libc::SYS_mincore, SERVICE, Any, "how much guest memory the host holds"),
    // Threads and signals, within this process.
    Line(libc::SYS_clone3, SERVICE | DEVICE | NETWORK, Any, "answered with ENOSYS by the third filter"),
    Line(libc::SYS_clone, SERVICE | DEVICE | NETWORK, With(0, THREAD_FLAGS), "threads, never processes"),
    Line(libc::SYS_set_robust_list, ALL, Any, "start of a thread"),
    Line(libc::SYS_rseq, ALL, Any, "start of a thread"),
    Line(libc::SYS_set_tid_address, ALL, Any, "start of a thread"),
    Line(libc::SYS_sched_getaffinity, ALL, Any, "start of a thread"),
    Line(libc::SYS_prlimit64, ALL, OneOf(0, &[0]), "own stack limit, at the start of a thread"),
    Line(libc::SYS_sigaltstack, ALL, Any, "start and end of a thread"),
    Line(libc::SYS_rt_sigprocmask, ALL, Any, "start and end of a thread, kicks"),
    Line(libc::SYS_rt_sigreturn, ALL, Any, "kicks"),
    Line(libc::SYS_rt_sigaction, SERVICE, Any, "a fatal signal is put back to its default"),
    Line(libc::SYS_prctl, ALL, OneOf(0, PRCTL_OPTIONS), "thread names"),
    Line(libc::SYS_gettid, ALL, Any, "logs, thread ids"),
    Line(libc::SYS_getpid, ALL, Any, "logs, kicks"),
    Line(libc::SYS_tgkill, ALL, OwnProcess(0), "kicks, abort"),
    Line(libc::SYS_exit, ALL, Any, "end of a thread"),
    Line(libc::SYS_exit_group, ALL, Any, "end of the process"),
    Line(libc::SYS_getrandom, ALL, Any, "hash seeds, entropy device, connection ids"),
    // The jail's own: a thread that narrows itself.
    Line(libc::SYS_seccomp, ALL, Any, "narrowing only: a filter cannot loosen"),
    Line(libc::SYS_landlock_restrict_self, ALL, Any, "narrowing only"),
    Line(libc::SYS_capget, ALL, Any, "which capabilities there are to drop"),
    Line(libc::SYS_capset, ALL, Any, "narrowing only: none can be gained"),
    // vCPUs.
    Line(libc::SYS_ioctl, VCPU, OneOf(1, VCPU_REQUESTS), "KVM_RUN, KVM_KVMCLOCK_CTRL, and reading the machine"),
    // Disks.
    Line(libc::SYS_pread64, SERVICE | DEVICE, Any, "block reads"),
    Line(libc::SYS_preadv, SERVICE | DEVICE, Any, "block reads into guest memory"),
    Line(libc::SYS_pwrite64, SERVICE | DEVICE, Any, "block writes"),
    Line(libc::SYS_pwritev, SERVICE | DEVICE, Any, "block writes from guest memory"),
    Line(libc::SYS_fdatasync, SERVICE | DEVICE, Any, "flush requests"),
    Line(libc::SYS_fsync, SERVICE | DEVICE, Any, "the end record survives a host crash"),
    Line(libc::SYS_fallocate, SERVICE | DEVICE, Any, "discard and write zeroes; balloon on shared memory"),
    Line(libc::SYS_ftruncate, SERVICE, Any, "log rotation"),
    // Local sockets: vsock streams, control, agent link, vhost-user.
    Line(libc::SYS_accept4, SERVICE | DEVICE | NETWORK, Any, "control and vsock connections; published ports"),
    Line(libc::SYS_socketpair, SERVICE | DEVICE, OneOf(0, LOCAL), "streams between own threads"),
    Line(libc::SYS_recvfrom, SERVICE | DEVICE | NETWORK, Any, "sockets"),
    Line(libc::SYS_sendto, SERVICE | DEVICE | NETWORK, Any, "sockets"),
    Line(libc::SYS_recvmsg, SERVICE | DEVICE | NETWORK, Any, "sockets, passed descriptors"),
    Line(libc::SYS_sendmsg, SERVICE | DEVICE | NETWORK, Any, "sockets from guest memory"),
    Line(libc::SYS_shutdown, SERVICE | DEVICE | NETWORK, Any, "half-closed streams"),
    Line(libc::SYS_getsockopt, SERVICE | DEVICE | NETWORK, Any, "errors and peers of sockets"),
    Line(libc::SYS_setsockopt, SERVICE | DEVICE | NETWORK, Any, "timeouts, buffer sizes"),
    Line(libc::SYS_getsockname, SERVICE | DEVICE | NETWORK, Any, "addresses of sockets"),
    Line(libc::SYS_getpeername, SERVICE | DEVICE | NETWORK, Any, "addresses of sockets"),
    Line(
        libc::SYS_ioctl,
        SERVICE | DEVICE | NETWORK,
        OneOf(1, &[libc::FIONBIO]),
        "what std calls to make a socket non-blocking",
    ),
    // The Internet.
    Line(libc::SYS_socket, NETWORK, OneOf(0, INTERNET), "connections that the policy allowed"),
    Line(libc::SYS_connect, NETWORK, Any, "connections that the policy allowed"),
    Line(libc::SYS_bind, NETWORK, Any, "UDP relays"),
    // The sandbox's own files, as Landlock allows.
    Line(libc::SYS_openat, SERVICE, Any, "log rotation, end record, own figures in /proc"),
    Line(libc::SYS_rename, SERVICE, Any, "log rotation, end record"),
    Line(libc::SYS_renameat, SERVICE, Any, "log rotation, end record"),
    Line(libc::SYS_renameat2, SERVICE, Any, "log rotation, end record"),
    Line(libc::SYS_unlink, SERVICE, Any, "sockets and old logs"),
    Line(libc::SYS_unlinkat, SERVICE, Any, "sockets and old logs"),
    Line(libc::SYS_getdents64, SERVICE, Any, "own threads in /proc"),
    Line(libc::SYS_readlink, SERVICE, Any, "own executable, for messages"),
    Line(libc::SYS_getcwd, SERVICE, Any, "backtraces"),
    Line(libc::SYS_sysinfo, SERVICE, Any, "figures of the host"),
    Line(libc::SYS_getrusage, SERVICE, Any, "processor time"),
    Line(libc::SYS_uname, SERVICE, Any, "figures of the host"),
    Line(libc::SYS_getuid, SERVICE, Any, "peers of the control socket are compared with it"),
    Line(libc::SYS_geteuid, SERVICE, Any, "peers of the control socket are compared with it"),
    // Files of shared directories, below them only: Landlock holds every open, and names are looked up without links.
    Line(libc::SYS_openat2, SHARE, Any, "look-ups beneath a directory"),
    Line(libc::SYS_openat, SHARE, Any, "files through their own descriptors"),
    Line(libc::SYS_getdents64, SHARE, Any, "entries of directories"),
    Line(libc::SYS_readlinkat, SHARE, Any, "texts of links"),
    Line(libc::SYS_fstatfs, SHARE, Any, "free space"),
    Line(libc::SYS_ftruncate, SHARE, Any, "sizes"),
    Line(libc::SYS_utimensat, SHARE, Any, "times"),
    Line(libc::SYS_fchmodat, SHARE, Any, "permission bits, never set-id bits"),
    Line(libc::SYS_mkdirat, SHARE, Any, "directories"),
    Line(libc::SYS_symlinkat, SHARE, Any, "links"),
    Line(libc::SYS_linkat, SHARE, Any, "further names"),
    Line(libc::SYS_unlinkat, SHARE, Any, "removals"),
    Line(libc::SYS_renameat, SHARE, Any, "renames"),
    Line(libc::SYS_renameat2, SHARE, Any, "renames that replace nothing, or exchange"),
    Line(libc::SYS_getxattr, SHARE, Any, "owners and modes of the guest"),
    Line(libc::SYS_setxattr, SHARE, Any, "owners and modes of the guest"),
    Line(libc::SYS_listxattr, SHARE, Any, "extended attributes of the guest"),
    Line(libc::SYS_removexattr, SHARE, Any, "extended attributes of the guest"),
    // A QEMU child.
    Line(libc::SYS_wait4, SERVICE | WITH_CHILD, Any, "how QEMU ended"),
    Line(libc::SYS_waitid, SERVICE | WITH_CHILD, Any, "how QEMU ended"),
    Line(
        libc::SYS_kill,
        SERVICE | WITH_CHILD,
        OneOf(1, &[0, libc::SIGKILL as u64, libc::SIGTERM as u64]),
        "end of QEMU",
    ),
    Line(libc::SYS_pidfd_send_signal, SERVICE | WITH_CHILD, Any, "end of QEMU"),
];

/// Compiled filters.
pub(super) struct Filters {
    union: BpfProgram,
    classes: Vec<(ThreadClass, BpfProgram)>,
    old_clone: BpfProgram,
}

fn error(error: impl std::fmt::Display) -> JailError {
    JailError::SystemCalls(error.to_string())
}

impl Filters {
    /// Compiles the table. Takes well under a millisecond.
    pub(super) fn compile(has_child: bool, has_network: bool, has_shares: bool) -> Result<Self, JailError> {
        let classes = ThreadClass::ALL
            .into_iter()
            .map(|class| Ok((class, compile(class as u8, has_child)?)))
            .collect::<Result<Vec<_>, JailError>>()?;
        let clone3 = BTreeMap::from([(u32::try_from(libc::SYS_clone3).map_err(error)?, Vec::new())]);
        // Both actions are errnos or allow: the kernel takes the stricter of all filters, and of equals the newest.
        let no_such_call = SeccompAction::Errno(libc::ENOSYS as u32);
        let old_clone = assemble(&clone3, SeccompAction::Allow.into(), no_such_call.into());
        let mut union = if has_network { ALL } else { ALL & !NETWORK };
        if has_shares {
            union |= SHARE;
        }
        Ok(Self { union: compile(union, has_child)?, classes, old_clone })
    }

    /// Puts the union filter on every thread of the process, the calling one included.
    pub(super) fn apply_union_to_all_threads(&self) -> Result<(), JailError> {
        seccompiler::apply_filter_all_threads(&self.old_clone).map_err(error)?;
        seccompiler::apply_filter_all_threads(&self.union).map_err(error)
    }

    /// Puts a class's filter on the calling thread.
    pub(super) fn apply(&self, class: ThreadClass) -> Result<(), JailError> {
        let program = self.classes.iter().find(|(known, _)| *known == class).map(|(_, program)| program);
        let program = program.ok_or_else(|| error("no filter for this class of thread"))?;
        seccompiler::apply_filter(program).map_err(error)
    }
}

fn compile(classes: u8, has_child: bool) -> Result<BpfProgram, JailError> {
    let mut rules: BTreeMap<u32, Vec<Condition>> = BTreeMap::new();
    let mut unconditional = Vec::new();
    for Line(number, who, when, _why) in TABLE {
        if who & classes == 0 || (who & WITH_CHILD != 0 && !has_child) {
            continue;
        }
        let number = u32::try_from(*number).map_err(error)?;
        let alternatives = conditions(*when);
        if alternatives.is_empty() {
            unconditional.push(number);
        }
        rules.entry(number).or_default().extend(alternatives);
    }
    // No condition means "always": it wins over conditional lines of other classes.
    for number in unconditional {
        rules.insert(number, Vec::new());
    }
    Ok(assemble(&rules, SeccompAction::Errno(libc::EPERM as u32).into(), SeccompAction::Allow.into()))
}

/// The alternatives under which a line applies; none means always. Values and masks are those of 32 bits.
fn conditions(when: When) -> Vec<Condition> {
    let equal = |argument, value: u64| Condition { argument, mask: u32::MAX, value: value as u32 };
    match when {
        Any => Vec::new(),
        OneOf(argument, values) => values.iter().map(|&value| equal(argument, value)).collect(),
        Without(argument, mask) => vec![Condition { argument, mask: mask as u32, value: 0 }],
        With(argument, mask) => vec![Condition { argument, mask: mask as u32, value: mask as u32 }],
        OwnProcess(argument) => vec![equal(argument, u64::from(std::process::id()))],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_has_a_reason_and_a_class_and_none_is_there_twice() {
        for (index, Line(number, who, _, why)) in TABLE.iter().enumerate() {
            assert!(why.len() >= 5 && who & (ALL | SHARE) != 0, "line {index}");
            let twice = TABLE[..index].iter().any(|Line(other, other_who, ..)| other == number && other_who & who != 0);
            assert!(!twice, "system call {number} is listed twice for one class: {why}");
        }
    }

    #[test]
    fn what_must_never_be_listed_is_not() {
        for number in [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_bpf,
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_pivot_root,
            libc::SYS_open_tree,
            libc::SYS_move_mount,
            libc::SYS_mount_setattr,
            libc::SYS_open,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_init_module,
            libc::SYS_keyctl,
            libc::SYS_perf_event_open,
            libc::SYS_chmod,
            libc::SYS_memfd_create,
            libc::SYS_name_to_handle_at,
        ] {
            assert!(TABLE.iter().all(|line| line.0 != number), "system call {number}");
        }
    }

    #[test]
    fn kvm_requests_have_the_numbers_of_the_kernel_headers() {
        assert_eq!(VCPU_REQUESTS[..3], [0xae80, 0x8090_ae81, 0xaead]);
        // As the kernel's own numbers in linux/kvm.h come out on x86-64.
        let others = [
            0x8138_ae83,
            0xc008_ae88,
            0x8400_ae8e,
            0x8004_ae98,
            0x8040_ae9f,
            0x8080_aea1,
            0xaea3,
            0x9000_aea4,
            0x8188_aea6,
            0xc208_ae62,
            0x8070_ae9f,
            0x8030_ae7c,
        ];
        assert_eq!(VCPU_REQUESTS[3..], others);
    }
}
