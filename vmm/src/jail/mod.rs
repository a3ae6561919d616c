//! What confines the VM process: closed once, before the first guest instruction, and narrower on every thread than on the process.
//!
//! ```text
//!  main:    close_inherited ─► namespaces::enter ─► … open everything, spawn QEMU (child::confine) … ─► close(plan) ─► Engine::run
//!                                                                                                            │
//!  process:   a root directory with its own files alone, no core dumps, not dumpable, no_new_privs, union seccomp filter on every thread
//!             (TSYNC), descriptors above as opened
//!  thread:    enter(class): no capabilities, Landlock (this sandbox's own files), the class's own seccomp filter
//! ```
//!
//! * Threads are started before `close` and call [`enter`] after it: vCPUs are parked for that, event loops are sent a job, the others
//!   ask each time they have something to do (it costs a look at a thread-local). A thread started later inherits its parent's filter,
//!   which can be narrowed and never widened.
//! * [`enter`] before `close` does nothing: unit tests and `--probe` run without a jail.
//! * A refused call fails with EPERM. It does not kill: a VMM that meets one unlisted call in a new libc should fail that call, not
//!   every guest; an attacker gains a second try, but no call.
//!
//! Called by `main` and by every thread's first line. It never loosens anything, and never decides by the guest's word. What the host
//! could not give is told in [`JailReport`], which `msb inspect` shows.

pub mod child;
pub mod files;
pub mod namespaces;
pub mod process;
mod program;
pub mod system_calls;

use std::cell::Cell;
use std::sync::OnceLock;

use msb_protocol::vmm::JailReport;
use rustix::thread::CapabilitySet;

pub use files::FilePlan;

/// The kinds of threads, each with its own system calls (`system_calls` has the table).
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash)]
#[repr(u8)]
pub enum ThreadClass {
    /// Our own bookkeeping: main thread, control socket, agent link, logs. The only one that opens files, all of them the sandbox's own.
    Service = 1,
    /// Virtio workers on descriptors that are open already: disks, vsock, entropy, balloon.
    Device = 2,
    /// The user-mode network: the only one that may make Internet sockets.
    Network = 4,
    /// Runs guest code and answers its register accesses.
    Vcpu = 8,
    /// A virtio worker on shared directories: what a [`ThreadClass::Device`] may do, and files below the shares, as Landlock allows.
    Share = 16 | 2,
}

impl ThreadClass {
    /// Every class, for tests and for the union filter.
    pub const ALL: [Self; 5] = [Self::Service, Self::Device, Self::Network, Self::Vcpu, Self::Share];
}

/// What this VM process needs besides what it has open.
#[derive(Clone, Debug, Default)]
pub struct JailPlan {
    /// Files and directories it may still open by path.
    pub files: FilePlan,
    /// Whether there is a QEMU child to wait for and to signal.
    pub has_child: bool,
    /// Whether directories are shared.
    pub has_shares: bool,
}

/// Why the jail could not be closed. Only for failures on hosts that can: what a host lacks goes to [`JailReport::missing`].
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Landlock refused a ruleset.
    #[error("file confinement failed: {0}")]
    Files(String),
    /// Seccomp refused a filter.
    #[error("system call filter failed: {0}")]
    SystemCalls(String),
    /// A process attribute could not be set.
    #[error("process could not be confined: {what}")]
    Process {
        /// Which.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// Closed twice.
    #[error("the jail is closed already")]
    AlreadyClosed,
}

/// The closed jail, ready for more threads.
struct Closed {
    files: files::Ruleset,
    filters: system_calls::Filters,
    /// Capabilities that the thread of shared directories keeps.
    shares_keep: CapabilitySet,
}

static CLOSED: OnceLock<Closed> = OnceLock::new();

thread_local! {
    /// Whether this thread has entered: filters pile up, so it does so once.
    static ENTERED: Cell<bool> = const { Cell::new(false) };
}

/// Closes the jail around the process and enters it with the calling thread as [`ThreadClass::Service`].
pub fn close(plan: &JailPlan) -> Result<JailReport, JailError> {
    let mut report = JailReport::default();
    let (files, abi) = files::Ruleset::build(&plan.files, plan.has_child)?;
    match abi {
        Some(abi) => report.in_force.push(format!("landlock abi {abi}")),
        None => report.missing.push("landlock: this kernel has it switched off or lacks it".into()),
    }
    let filters = system_calls::Filters::compile(plan.has_child, plan.files.network, plan.has_shares)?;
    namespaces::hide(&plan.files, &mut report)?;
    process::forbid_core_dumps()?;
    report.in_force.push("no core dumps".into());
    process::forbid_new_privileges()?;
    report.in_force.push("no_new_privs".into());
    let is_for_others = plan.has_shares && rustix::process::geteuid().is_root();
    let shares_keep = if is_for_others { namespaces::FILES_OF_OTHERS } else { CapabilitySet::empty() };
    if CLOSED.set(Closed { files, filters, shares_keep }).is_err() {
        return Err(JailError::AlreadyClosed);
    }
    let closed = CLOSED.get().ok_or(JailError::AlreadyClosed)?;
    closed.filters.apply_union_to_all_threads()?;
    report.in_force.push("seccomp allow-list on every thread".into());
    enter(ThreadClass::Service)?;
    let but = if is_for_others { ", but for files of others on the thread of shared directories" } else { "" };
    report.in_force.push(format!("no capabilities{but}"));
    report.in_force.push("seccomp allow-list per thread class".into());
    if plan.has_child {
        report.in_force.push("qemu: its own seccomp sandbox".into());
        match abi {
            Some(abi) => report.in_force.push(format!("qemu: landlock abi {abi}")),
            None => report.missing.push("qemu: landlock".into()),
        }
    }
    if std::env::vars_os().next().is_none() {
        report.in_force.push("empty environment".into());
    } else {
        report.missing.push("empty environment: started by hand, not by the daemon".into());
    }
    Ok(report)
}

/// Confines the calling thread for good to what `class` needs. Does nothing while the jail is open, nor a second time.
pub fn enter(class: ThreadClass) -> Result<(), JailError> {
    let Some(closed) = CLOSED.get() else { return Ok(()) };
    if ENTERED.get() {
        return Ok(());
    }
    let kept = if class == ThreadClass::Share { closed.shares_keep } else { CapabilitySet::empty() };
    namespaces::drop_capabilities(kept).map_err(|source| JailError::Process { what: "capabilities", source })?;
    closed.files.restrict_thread()?;
    closed.filters.apply(class)?;
    ENTERED.set(true);
    Ok(())
}

/// [`enter`], for a thread that has nobody to tell: a thread that cannot be confined ends the process, which is what a jail is for.
pub fn enter_or_abort(class: ThreadClass) {
    if let Err(error) = enter(class) {
        tracing::error!(%error, ?class, "a thread cannot be confined");
        std::process::abort();
    }
}

#[cfg(test)]
mod tests;
