//! The system calls of profile `strict`: an allow-list, compiled to BPF once per boot.
//!
//! Two filters. The first answers `clone3` with ENOSYS, so that libc falls back to `clone`, whose flags a filter can read. The second is
//! the list; what is not on it fails with EPERM. Programs of another instruction set than x86-64 are killed: their numbers mean other
//! calls.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// A filter could not be compiled.
#[derive(Debug, thiserror::Error)]
#[error("a system call filter cannot be compiled: {0}")]
pub struct FilterError(#[from] seccompiler::BackendError);

/// Namespaces of clone(2): none may be made.
const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;

/// Families of sockets: local, Internet, and netlink for the list of interfaces.
const FAMILIES: [u64; 4] = [libc::AF_UNIX as u64, libc::AF_INET as u64, libc::AF_INET6 as u64, libc::AF_NETLINK as u64];
/// The only protocol of netlink: NETLINK_ROUTE.
const NETLINK_ROUTE: u64 = 0;
/// Terminal request that puts words into somebody else's input.
const TIOCSTI: u64 = libc::TIOCSTI;

/// Calls that are allowed whatever their arguments. What is missing, and why: mounts and namespaces (mount, umount2, pivot_root,
/// setns, unshare, fsopen…), other processes' memory (ptrace, process_vm_*, kcmp, pidfd_getfd, process_madvise), the kernel itself
/// (bpf, perf_event_open, init_module, kexec_*, reboot, swapon, syslog, iopl, ioperm, quotactl, acct, userfaultfd, io_uring_*, keyctl,
/// add_key, request_key, vhangup, nfsservctl, lookup_dcookie, modify_ldt, personality), handles (open_by_handle_at,
/// name_to_handle_at), the clock and the names (settimeofday, clock_settime, clock_adjtime, adjtimex, sethostname, setdomainname),
/// other users' priorities and pages (move_pages, migrate_pages, mbind, set_mempolicy), fanotify_init, memfd_secret.
#[rustfmt::skip]
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_read, libc::SYS_write, libc::SYS_open, libc::SYS_close, libc::SYS_stat, libc::SYS_fstat, libc::SYS_lstat,
    libc::SYS_poll, libc::SYS_lseek, libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_munmap, libc::SYS_brk,
    libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn, libc::SYS_pread64, libc::SYS_pwrite64,
    libc::SYS_readv, libc::SYS_writev, libc::SYS_access, libc::SYS_pipe, libc::SYS_select, libc::SYS_sched_yield,
    libc::SYS_mremap, libc::SYS_msync, libc::SYS_mincore, libc::SYS_madvise, libc::SYS_shmget, libc::SYS_shmat,
    libc::SYS_shmctl, libc::SYS_dup, libc::SYS_dup2, libc::SYS_pause, libc::SYS_nanosleep, libc::SYS_getitimer,
    libc::SYS_alarm, libc::SYS_setitimer, libc::SYS_getpid, libc::SYS_sendfile, libc::SYS_connect, libc::SYS_accept,
    libc::SYS_sendto, libc::SYS_recvfrom, libc::SYS_sendmsg, libc::SYS_recvmsg, libc::SYS_shutdown, libc::SYS_bind,
    libc::SYS_listen, libc::SYS_getsockname, libc::SYS_getpeername, libc::SYS_socketpair, libc::SYS_setsockopt,
    libc::SYS_getsockopt, libc::SYS_clone3, libc::SYS_fork, libc::SYS_vfork, libc::SYS_execve, libc::SYS_exit,
    libc::SYS_wait4, libc::SYS_kill, libc::SYS_uname, libc::SYS_semget, libc::SYS_semop, libc::SYS_semctl,
    libc::SYS_shmdt, libc::SYS_msgget, libc::SYS_msgsnd, libc::SYS_msgrcv, libc::SYS_msgctl, libc::SYS_fcntl,
    libc::SYS_flock, libc::SYS_fsync, libc::SYS_fdatasync, libc::SYS_truncate, libc::SYS_ftruncate, libc::SYS_getdents,
    libc::SYS_getcwd, libc::SYS_chdir, libc::SYS_fchdir, libc::SYS_rename, libc::SYS_mkdir, libc::SYS_rmdir,
    libc::SYS_creat, libc::SYS_link, libc::SYS_unlink, libc::SYS_symlink, libc::SYS_readlink, libc::SYS_chmod,
    libc::SYS_fchmod, libc::SYS_chown, libc::SYS_fchown, libc::SYS_lchown, libc::SYS_umask, libc::SYS_gettimeofday,
    libc::SYS_getrlimit, libc::SYS_getrusage, libc::SYS_sysinfo, libc::SYS_times, libc::SYS_getuid, libc::SYS_getgid,
    libc::SYS_setuid, libc::SYS_setgid, libc::SYS_geteuid, libc::SYS_getegid, libc::SYS_setpgid, libc::SYS_getppid,
    libc::SYS_getpgrp, libc::SYS_setsid, libc::SYS_setreuid, libc::SYS_setregid, libc::SYS_getgroups,
    libc::SYS_setgroups, libc::SYS_setresuid, libc::SYS_getresuid, libc::SYS_setresgid, libc::SYS_getresgid,
    libc::SYS_getpgid, libc::SYS_setfsuid, libc::SYS_setfsgid, libc::SYS_getsid, libc::SYS_capget, libc::SYS_capset,
    libc::SYS_rt_sigpending, libc::SYS_rt_sigtimedwait, libc::SYS_rt_sigqueueinfo, libc::SYS_rt_sigsuspend,
    libc::SYS_sigaltstack, libc::SYS_utime, libc::SYS_mknod, libc::SYS_statfs, libc::SYS_fstatfs,
    libc::SYS_getpriority, libc::SYS_setpriority, libc::SYS_sched_setparam, libc::SYS_sched_getparam,
    libc::SYS_sched_setscheduler, libc::SYS_sched_getscheduler, libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min, libc::SYS_sched_rr_get_interval, libc::SYS_mlock, libc::SYS_munlock,
    libc::SYS_mlockall, libc::SYS_munlockall, libc::SYS_prctl, libc::SYS_arch_prctl, libc::SYS_setrlimit,
    libc::SYS_chroot, libc::SYS_sync, libc::SYS_gettid, libc::SYS_readahead, libc::SYS_setxattr, libc::SYS_lsetxattr,
    libc::SYS_fsetxattr, libc::SYS_getxattr, libc::SYS_lgetxattr, libc::SYS_fgetxattr, libc::SYS_listxattr,
    libc::SYS_llistxattr, libc::SYS_flistxattr, libc::SYS_removexattr, libc::SYS_lremovexattr,
    libc::SYS_fremovexattr, libc::SYS_tkill, libc::SYS_time, libc::SYS_futex, libc::SYS_sched_setaffinity,
    libc::SYS_sched_getaffinity, libc::SYS_io_setup, libc::SYS_io_destroy, libc::SYS_io_getevents,
    libc::SYS_io_submit, libc::SYS_io_cancel, libc::SYS_epoll_create, libc::SYS_remap_file_pages,
    libc::SYS_getdents64, libc::SYS_set_tid_address, libc::SYS_restart_syscall, libc::SYS_semtimedop,
    libc::SYS_fadvise64, libc::SYS_timer_create, libc::SYS_timer_settime, libc::SYS_timer_gettime,
    libc::SYS_timer_getoverrun, libc::SYS_timer_delete, libc::SYS_clock_gettime, libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep, libc::SYS_exit_group, libc::SYS_epoll_wait, libc::SYS_epoll_ctl, libc::SYS_tgkill,
    libc::SYS_utimes, libc::SYS_mq_open, libc::SYS_mq_unlink, libc::SYS_mq_timedsend, libc::SYS_mq_timedreceive,
    libc::SYS_mq_notify, libc::SYS_mq_getsetattr, libc::SYS_waitid, libc::SYS_ioprio_set, libc::SYS_ioprio_get,
    libc::SYS_inotify_init, libc::SYS_inotify_add_watch, libc::SYS_inotify_rm_watch, libc::SYS_openat,
    libc::SYS_mkdirat, libc::SYS_mknodat, libc::SYS_fchownat, libc::SYS_futimesat, libc::SYS_newfstatat,
    libc::SYS_unlinkat, libc::SYS_renameat, libc::SYS_linkat, libc::SYS_symlinkat, libc::SYS_readlinkat,
    libc::SYS_fchmodat, libc::SYS_faccessat, libc::SYS_pselect6, libc::SYS_ppoll, libc::SYS_set_robust_list,
    libc::SYS_get_robust_list, libc::SYS_splice, libc::SYS_tee, libc::SYS_sync_file_range, libc::SYS_vmsplice,
    libc::SYS_utimensat, libc::SYS_epoll_pwait, libc::SYS_signalfd, libc::SYS_timerfd_create, libc::SYS_eventfd,
    libc::SYS_fallocate, libc::SYS_timerfd_settime, libc::SYS_timerfd_gettime, libc::SYS_accept4,
    libc::SYS_signalfd4, libc::SYS_eventfd2, libc::SYS_epoll_create1, libc::SYS_dup3, libc::SYS_pipe2,
    libc::SYS_inotify_init1, libc::SYS_preadv, libc::SYS_pwritev, libc::SYS_rt_tgsigqueueinfo, libc::SYS_recvmmsg,
    libc::SYS_prlimit64, libc::SYS_syncfs, libc::SYS_sendmmsg, libc::SYS_getcpu, libc::SYS_sched_setattr,
    libc::SYS_sched_getattr, libc::SYS_renameat2, libc::SYS_seccomp, libc::SYS_getrandom, libc::SYS_memfd_create,
    libc::SYS_execveat, libc::SYS_membarrier, libc::SYS_mlock2, libc::SYS_copy_file_range, libc::SYS_preadv2,
    libc::SYS_pwritev2, libc::SYS_pkey_mprotect, libc::SYS_pkey_alloc, libc::SYS_pkey_free, libc::SYS_statx,
    libc::SYS_rseq, libc::SYS_pidfd_send_signal, libc::SYS_pidfd_open, libc::SYS_close_range, libc::SYS_openat2,
    libc::SYS_faccessat2, libc::SYS_epoll_pwait2, libc::SYS_landlock_create_ruleset, libc::SYS_landlock_add_rule,
    libc::SYS_landlock_restrict_self, libc::SYS_futex_waitv,
];

/// The filters in the order of entering them.
pub(super) fn filters() -> Result<Vec<Vec<libc::sock_filter>>, FilterError> {
    let not_implemented = SeccompAction::Errno(libc::ENOSYS as u32);
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let old_clone = SeccompFilter::new(clone3, SeccompAction::Allow, not_implemented, TargetArch::x86_64)?;
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    let list = SeccompFilter::new(rules()?, refused, SeccompAction::Allow, TargetArch::x86_64)?;
    [old_clone, list].into_iter().map(|filter| Ok(plain(BpfProgram::try_from(filter)?))).collect()
}

fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, FilterError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|number| (*number, Vec::new())).collect();
    let condition = |argument: u8, operator: SeccompCmpOp, value: u64| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
    };
    let mut allow = |number: i64, conditions: Vec<SeccompCondition>| -> Result<(), FilterError> {
        rules.entry(number).or_default().push(SeccompRule::new(conditions)?);
        Ok(())
    };
    allow(libc::SYS_clone, vec![condition(0, SeccompCmpOp::MaskedEq(NAMESPACES), 0)?])?;
    for family in FAMILIES {
        let mut conditions = vec![condition(0, SeccompCmpOp::Eq, family)?];
        if family == libc::AF_NETLINK as u64 {
            conditions.push(condition(2, SeccompCmpOp::Eq, NETLINK_ROUTE)?);
        }
        allow(libc::SYS_socket, conditions)?;
    }
    allow(libc::SYS_ioctl, vec![condition(1, SeccompCmpOp::Ne, TIOCSTI)?])?;
    Ok(rules)
}

fn plain(program: BpfProgram) -> Vec<libc::sock_filter> {
    program.into_iter().map(|i| libc::sock_filter { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_compiles_within_the_kernels_limit_and_lists_each_call_once() {
        let filters = filters().unwrap();
        assert_eq!(filters.len(), 2);
        assert!(filters.iter().all(|filter| filter.len() < 4096), "{}", filters[1].len());
        for (index, number) in ALLOWED.iter().enumerate() {
            assert!(!ALLOWED[..index].contains(number), "system call {number} is listed twice");
        }
    }

    #[test]
    fn what_reaches_the_kernel_or_others_is_not_on_the_list() {
        for number in [
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_keyctl,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_reboot,
            libc::SYS_open_by_handle_at,
            libc::SYS_clock_settime,
            libc::SYS_pidfd_getfd,
        ] {
            assert!(!ALLOWED.contains(&number), "system call {number}");
        }
    }
}
