//! Scopes of VM processes, made by the front door for the users' services: only root may ask the host's manager.
//!
//! A service connects, names a process of its user and the run it is for, and reads one byte when the process is in its scope. All it can
//! reach with this is that a process of its own is in a scope of ours.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use msb_actors::vm::scope;
use msb_protocol::error::{ApiError, ErrorCode};

use super::front::{Place, Users};
use crate::server;

/// The socket's name.
const SOCKET: &str = "scopes.sock";
/// Longest request in bytes: a number, a UUID and what is between them.
const REQUEST_LEN_MAX: usize = 64;
/// Time for a request to arrive.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Requests at once; more are refused.
const REQUESTS_MAX: usize = 16;

/// Where a service asks.
pub(super) fn socket(place: &Place) -> PathBuf {
    place.run_dir.join(SOCKET)
}

/// Answers from now on, where systemd has started this door.
///
/// # Errors
/// `home_unusable`, `daemon_running`.
pub(super) fn serve(users: &Arc<Users>) -> Result<(), ApiError> {
    if users.manager.is_none() {
        return Ok(());
    }
    let path = socket(&users.place);
    let listener = server::bind(&path)?;
    // Every user has processes of its own to name, and no others.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))
        .map_err(|error| ApiError::new(ErrorCode::HomeUnusable, format!("{}: {error}", path.display())))?;
    let users = users.clone();
    std::thread::spawn(move || accept(&listener, &users));
    Ok(())
}

fn accept(listener: &UnixListener, users: &Arc<Users>) {
    let busy = Arc::new(AtomicUsize::new(0));
    for service in listener.incoming() {
        let Ok(mut service) = service else {
            std::thread::sleep(Duration::from_millis(50));
            continue;
        };
        if busy.fetch_add(1, Ordering::Relaxed) >= REQUESTS_MAX {
            busy.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (users, leaving) = (users.clone(), busy.clone());
        let started = std::thread::Builder::new().spawn(move || {
            match answer(&users, &mut service) {
                Ok(()) => drop(service.write_all(b".")),
                Err(error) => tracing::warn!(%error, "a VM process gets no scope of its own"),
            }
            leaving.fetch_sub(1, Ordering::Relaxed);
        });
        if started.is_err() {
            busy.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn answer(users: &Users, service: &mut UnixStream) -> std::io::Result<()> {
    use std::io::{Error, ErrorKind};
    let Some(manager) = &users.manager else { return Err(ErrorKind::Unsupported.into()) };
    let uid = rustix::net::sockopt::socket_peercred(&*service)?.uid.as_raw();
    service.set_read_timeout(Some(REQUEST_TIMEOUT))?;
    service.set_write_timeout(Some(REQUEST_TIMEOUT))?;
    let mut buffer = [0; REQUEST_LEN_MAX];
    // It comes in one write, and fits a socket's buffer.
    let read = service.read(&mut buffer)?;
    let text = std::str::from_utf8(buffer.get(..read).unwrap_or_default()).unwrap_or_default();
    let (pid, boot_id) = scope::parse_request(text).ok_or_else(|| Error::from(ErrorKind::InvalidData))?;
    if owners(&std::fs::read_to_string(format!("/proc/{pid}/status"))?) != Some([uid; 4]) {
        return Err(Error::new(ErrorKind::PermissionDenied, format!("process {pid} is not one of user {uid}")));
    }
    manager.move_process(&scope::unit(boot_id), pid)
}

/// Real, effective, saved and file system user of a process, after its status file.
fn owners(status: &str) -> Option<[u32; 4]> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let numbers: Vec<u32> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    numbers.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_its_owners_only_if_all_its_identities_are() {
        assert_eq!(owners("Name:\tx\nUid:\t7\t7\t7\t7\nGid:\t1\t1\t1\t1\n"), Some([7; 4]));
        assert_ne!(owners("Uid:\t7\t0\t0\t0\n"), Some([7; 4]));
        assert_eq!(owners("Uid:\t7\n"), None);
        assert_eq!(owners(""), None);
        let own = std::fs::read_to_string("/proc/self/status").unwrap();
        assert_eq!(owners(&own), Some([rustix::process::geteuid().as_raw(); 4]));
    }
}
