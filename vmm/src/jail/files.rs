//! Landlock: which files may still be opened by path, and nothing over TCP but by the network.
//!
//! Everything else that a VM works on (disks, kernel, sockets) is open before the jail closes and stays usable. The ruleset is built
//! once and applied by each thread to itself, because Landlock binds a thread and what it starts.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset as Builder,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::JailError;

/// The newest rules this code was written against; older kernels enforce what they know.
const NEWEST: ABI = ABI::V6;

/// Paths a confined process may still open.
#[derive(Clone, Debug, Default)]
pub struct FilePlan {
    /// Read only: files, or directories with everything below.
    pub read: Vec<PathBuf>,
    /// Directories in which regular files and sockets are made, written, renamed and removed: run and log directory.
    pub write: Vec<PathBuf>,
    /// Shared directories of the guest: everything but devices.
    pub shares: Vec<PathBuf>,
    /// Programs and libraries (a QEMU child only).
    pub execute: Vec<PathBuf>,
    /// Whether TCP may be used.
    pub network: bool,
}

impl FilePlan {
    /// Every path once, but for those below another and those that mean an open descriptor.
    pub(super) fn paths(&self) -> Vec<&Path> {
        let all = [&self.read, &self.write, &self.shares, &self.execute];
        let mut paths: Vec<&Path> = all.into_iter().flatten().map(PathBuf::as_path).collect();
        paths.retain(|path| !path.starts_with("/proc/self/fd"));
        // In this order a directory comes before what is below it.
        paths.sort_unstable();
        paths.dedup_by(|path, above| path.starts_with(above));
        paths
    }
}

/// A ruleset that threads apply to themselves; nothing on hosts without Landlock.
pub(super) struct Ruleset(Option<RulesetCreated>);

fn error(error: impl std::fmt::Display) -> JailError {
    JailError::Files(error.to_string())
}

impl Ruleset {
    /// Builds the ruleset and tells which ABI of Landlock will enforce it, if any.
    pub(super) fn build(plan: &FilePlan, signals_leave: bool) -> Result<(Self, Option<i32>), JailError> {
        let Some(abi) = host_abi() else { return Ok((Self(None), None)) };
        let mut builder = Builder::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))
            .map_err(error)?;
        if !plan.network {
            builder = builder.handle_access(AccessNet::from_all(NEWEST)).map_err(error)?;
        }
        builder = builder.scope(Scope::AbstractUnixSocket).map_err(error)?;
        if !signals_leave {
            builder = builder.scope(Scope::Signal).map_err(error)?;
        }
        let mut created = builder.create().map_err(error)?;
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let write = read
            | AccessFs::WriteFile
            | AccessFs::Truncate
            | AccessFs::MakeReg
            | AccessFs::MakeSock
            | AccessFs::RemoveFile;
        let share = AccessFs::from_all(NEWEST)
            & !(AccessFs::Execute | AccessFs::MakeBlock | AccessFs::MakeChar | AccessFs::IoctlDev);
        let execute = read | AccessFs::Execute;
        for (paths, access) in
            [(&plan.read, read), (&plan.write, write), (&plan.shares, share), (&plan.execute, execute)]
        {
            for path in paths {
                created = add(created, path, access)?;
            }
        }
        Ok((Self(Some(created)), Some(abi)))
    }

    /// Confines the calling thread.
    pub(super) fn restrict_thread(&self) -> Result<(), JailError> {
        let Some(ruleset) = &self.0 else { return Ok(()) };
        let status = ruleset.try_clone().map_err(error)?.restrict_self().map_err(error)?;
        if status.ruleset == RulesetStatus::NotEnforced {
            return Err(JailError::Files("the kernel accepted the rules and does not enforce them".into()));
        }
        Ok(())
    }
}

/// Allows `access` at `path`. A path that is not there needs no rule.
fn add(created: RulesetCreated, path: &PathBuf, access: BitFlags<AccessFs>) -> Result<RulesetCreated, JailError> {
    let Ok(directory) = PathFd::new(path) else { return Ok(created) };
    // Rights that only directories have are an error on a file.
    let access = if path.is_dir() { access } else { access & AccessFs::from_file(NEWEST) };
    created.add_rule(PathBeneath::new(directory, access)).map_err(error)
}

/// The ABI number of this host's Landlock, none if there is no Landlock.
#[expect(unsafe_code, reason = "the question has no wrapper: the landlock crate keeps its answer to itself")]
fn host_abi() -> Option<i32> {
    /// `LANDLOCK_CREATE_RULESET_VERSION`.
    const ASK_VERSION: libc::c_long = 1;
    let nothing: *const libc::c_void = std::ptr::null();
    // SAFETY: with this flag the call reads no memory and makes no descriptor; it returns a number or an error.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0usize, ASK_VERSION) };
    i32::try_from(version).ok().filter(|&version| version > 0)
}
