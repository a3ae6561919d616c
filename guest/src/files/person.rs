//! Who a file session is, and how its thread becomes them: a root and working directory of its own (CLONE_FS is given up), then groups
//! and ids by system calls that change this thread only. There is no way back, so the thread ends with the session.

use std::os::fd::OwnedFd;

use msb_protocol::error::ErrorCode;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{chdir, chroot, fchdir};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::account::{self, Identity};
use crate::failure::GuestError;
use crate::session::{Guest, process};

/// A user of the guest.
#[derive(Debug)]
pub(crate) struct Person {
    identity: Identity,
}

/// Where a thread is once it has become a person.
#[derive(Debug)]
pub(crate) struct Place {
    /// The agent's own /proc, by which a thread finds the path of an open file.
    pub(crate) proc: OwnedFd,
}

impl Person {
    /// Looks a user up; an empty name is the sandbox's own user.
    ///
    /// # Errors
    /// `user_not_found`, `exec_failed` if the account files cannot be read.
    pub(crate) fn look_up(guest: &Guest, user: &str) -> Result<Self, GuestError> {
        let (passwd, group) = process::read_accounts(guest)?;
        let user = if user.is_empty() { guest.config.user.as_str() } else { user };
        Ok(Self { identity: account::resolve(user, &passwd, &group)? })
    }

    /// Makes the calling thread this person for the rest of its life.
    ///
    /// # Errors
    /// `exec_failed` with the step that failed; the thread must end then.
    pub(crate) fn become_it(self, guest: &Guest, at_home: bool) -> Result<Place, GuestError> {
        let failed = |what: &'static str| {
            move |errno: Errno| GuestError::system(ErrorCode::ExecFailed, what, errno.raw_os_error())
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = rustix::fs::open("/proc", flags, Mode::empty()).map_err(failed("cannot open /proc"))?;
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).map_err(|errno| {
            GuestError::system(ErrorCode::ExecFailed, "cannot part from the agent's root", errno as i32)
        })?;
        fchdir(guest.root.directory()).map_err(failed("cannot enter the root"))?;
        if guest.enter_root {
            chroot(".").map_err(failed("cannot change the root"))?;
        }
        rustix::process::umask(Mode::from_raw_mode(0o022));
        if rustix::process::geteuid().is_root() {
            let groups: Vec<_> = self.identity.groups.iter().map(|gid| rustix::fs::Gid::from_raw(*gid)).collect();
            let gid = rustix::fs::Gid::from_raw(self.identity.gid);
            let uid = rustix::fs::Uid::from_raw(self.identity.uid);
            set_thread_groups(&groups).map_err(failed("cannot set groups"))?;
            set_thread_res_gid(gid, gid, gid).map_err(failed("cannot set the group"))?;
            set_thread_res_uid(uid, uid, uid).map_err(failed("cannot set the user"))?;
        }
        if at_home && let Some(home) = &self.identity.home {
            // As sshd has it: without the directory it is the root.
            let _ = chdir(home.as_str());
        }
        Ok(Place { proc })
    }
}
