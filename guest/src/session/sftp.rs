//! One SFTP server: this program once more, started as the user who logged in, with the stream itself as its input and output. So
//! every file operation is the user's own, checked by the kernel, and no byte of it passes through the agent. Called by
//! `agent::connection`; the calling thread only waits for the end.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use msb_protocol::guest::{ExecConfig, GuestBody, OpenSftp, Opened};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{WaitId, WaitIdOptions};

use super::Guest;
use super::process::{from_io, plan, prepare};
use super::stream::FrameStream;
use crate::agent::connection::flush_until;
use crate::cgroup::SessionGroup;
use crate::failure::GuestError;
use crate::sftp;
use crate::sys::{self, Step};

/// Time to hand out the answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Runs the server until the host or the server closes the stream.
///
/// # Errors
/// `user_not_found`, `exec_failed`; with the stream to say it on.
pub fn run(
    guest: &Guest,
    mut stream: FrameStream,
    open: &OpenSftp,
    opened: Opened,
) -> Result<(), (FrameStream, GuestError)> {
    let exec = ExecConfig { user: open.user.clone(), login: true, ..ExecConfig::default() };
    let mut command = match prepare(guest, &exec) {
        Ok(command) => command,
        Err(error) => return Err((stream, error)),
    };
    command.argv = vec![c"msb-sftp".into(), sftp::ARGUMENT_C.into()];
    let (number, group) = (guest.sessions.number(), None);
    let started = guest.null_device().and_then(|null| {
        let group: Option<SessionGroup> = match &guest.workload {
            Some(workload) => Some(
                workload
                    .session(&format!("sftp-{number}"))
                    .map_err(|error| from_io("cannot make the session's cgroup", &error))?,
            ),
            None => group,
        };
        let program = rustix::fs::open("/proc/self/exe", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| GuestError::exec("cannot open the SFTP server", errno))?;
        Ok((null, group, program))
    });
    let (null, group, program) = match started {
        Ok(started) => started,
        Err(error) => return Err((stream, error)),
    };
    let child = {
        let mut plan = plan(guest, &command, [stream.socket(), stream.socket(), null.as_fd()], group.as_ref());
        plan.program = Some(program.as_fd());
        match sys::spawn(&plan) {
            Err(error) if error.step == Step::Workdir => {
                plan.workdir = c"/";
                sys::spawn(&plan)
            }
            outcome => outcome,
        }
    };
    let discard = |group: Option<SessionGroup>| {
        if let (Some(workload), Some(group)) = (&guest.workload, group) {
            workload.discard(group);
        }
    };
    let child = match child {
        Ok(child) => child,
        Err(error) => {
            discard(group);
            return Err((
                stream,
                GuestError::exec("cannot start the SFTP server", rustix::io::Errno::from_raw_os_error(error.errno)),
            ));
        }
    };
    guest.sessions.enter(number, child.pid);
    // The server waits for the client's first packet, and the host sends none before this answer: nothing comes in between.
    stream.send(GuestBody::Opened(opened));
    flush_until(&mut stream, Instant::now() + ANSWER_LIMIT);
    drop(stream);
    let mut fds = [PollFd::new(&child.pidfd, PollFlags::IN)];
    let waited = || {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match rustix::process::waitid(WaitId::PidFd(child.pidfd.as_fd()), options) {
            Ok(status) => status.map(drop),
            Err(rustix::io::Errno::INTR) => None,
            Err(_) => Some(()),
        }
    };
    while guest.sessions.reap(number, waited).is_none() {
        // Interrupted or not, it is looked at again.
        let _ = poll(&mut fds, None);
    }
    discard(group);
    guest.sessions.leave();
    Ok(())
}
