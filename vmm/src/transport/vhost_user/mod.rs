//! vhost-user: serves a virtio device to QEMU over a socket pair (QEMU docs/interop/vhost-user.rst).
//!
//! ```text
//!  QEMU (front end)                     this process (back end)
//!   registers, feature bits  ──────────► handler ──► VirtioDevice
//!   memory table (memfd)     ──────────►   │ maps it
//!   ring addresses, kick, call ────────►   └ all rings ready: activate      GET_VRING_BASE: deactivate, tell where it stopped
//! ```
//!
//! One thread per device carries the control messages; bytes of the device itself never pass it. QEMU is our own child but emulates the
//! guest's CPU in software, so its messages are treated as the guest's: bounded by the library's codec, addresses translated and checked.

mod handler;
mod interrupt;

#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::{BackendReqHandler, Error};

use crate::devices::virtio::device::VirtioDevice;
use crate::jail::{self, ThreadClass};
use handler::Handler;

/// Refused requests after which a front end is given up: a working one causes none.
const REFUSALS_MAX: u32 = 16;
/// How often a thread that waits for its connection looks whether the machine has ended.
const ACCEPT_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// The message loop needs little stack.
const STACK_BYTES: usize = 256 * 1024;

/// A device being served. The device keeps running when QEMU's side of the socket closes, until [`Served::finish`]: whoever
/// supervises QEMU decides in which order things end.
pub struct Served {
    name: String,
    handler: Arc<Mutex<Handler>>,
    stopping: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Served {
    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits for the front end to close its socket (it is dead by now), then stops the device.
    pub fn finish(self) {
        self.stopping.store(true, Ordering::Release);
        if self.thread.join().is_err() {
            tracing::error!(device = self.name, "vhost-user thread panicked");
        }
        self.handler.lock().unwrap_or_else(PoisonError::into_inner).stop();
    }
}

/// Serves `device` on `socket` from a thread of its own.
pub fn serve(device: Box<dyn VirtioDevice>, socket: UnixStream) -> io::Result<Served> {
    serve_on(device, move |_| Some(socket))
}

/// Serves `device` to the first that connects to `listener`.
pub fn serve_accepted(device: Box<dyn VirtioDevice>, listener: UnixListener) -> io::Result<Served> {
    listener.set_nonblocking(true)?;
    serve_on(device, move |stopping| accept(&listener, stopping))
}

/// The first connection; none if the machine ends before there is one.
fn accept(listener: &UnixListener, stopping: &AtomicBool) -> Option<UnixStream> {
    while !stopping.load(Ordering::Acquire) {
        let mut watched = [PollFd::new(listener, PollFlags::IN)];
        let _ = poll(&mut watched, Some(&ACCEPT_INTERVAL));
        match listener.accept() {
            Ok((socket, _)) if socket.set_nonblocking(false).is_ok() => return Some(socket),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(_) | Err(_) => return None,
        }
    }
    None
}

fn serve_on(
    device: Box<dyn VirtioDevice>,
    connect: impl FnOnce(&AtomicBool) -> Option<UnixStream> + Send + 'static,
) -> io::Result<Served> {
    let name = device.name().to_owned();
    let handler = Arc::new(Mutex::new(Handler::new(device).map_err(io::Error::other)?));
    let stopping = Arc::new(AtomicBool::new(false));
    let (thread_name, thread_handler, stop_seen) = (name.clone(), Arc::clone(&handler), Arc::clone(&stopping));
    let thread = std::thread::Builder::new().name(format!("vu-{name}")).stack_size(STACK_BYTES).spawn(move || {
        if let Some(socket) = connect(&stop_seen) {
            serve_requests(&thread_name, BackendReqHandler::from_stream(socket, thread_handler));
        }
    })?;
    Ok(Served { name, handler, stopping, thread })
}

fn serve_requests(name: &str, mut requests: BackendReqHandler<Mutex<Handler>>) {
    let mut refusals = 0;
    let mut early = false;
    loop {
        match requests.handle_request() {
            Ok(()) => jail::enter_or_abort(ThreadClass::Device),
            // QEMU has a network device's rings enabled as soon as enabling is *offered*: when the device is made, when the guest chooses
            // features and before it is started. The protocol wants it *agreed* (SET_FEATURES), and the library drops what comes
            // before that. Nobody waits for an answer, and `Handler::set_features` enables the rings when it is their time.
            Err(Error::InactiveFeature(feature)) => {
                jail::enter_or_abort(ThreadClass::Device);
                if !std::mem::replace(&mut early, true) {
                    tracing::debug!(
                        device = name,
                        ?feature,
                        "rings are enabled early, as QEMU does it; they are once features are agreed"
                    );
                }
            }
            Err(Error::Disconnected | Error::PartialMessage | Error::SocketBroken(_) | Error::SocketError(_)) => return,
            // The message was read whole and refused (and QEMU told, if it asked): the next one can be understood.
            Err(error @ (Error::InvalidParam | Error::InvalidOperation(_) | Error::ReqHandlerError(_)))
                if refusals < REFUSALS_MAX =>
            {
                refusals += 1;
                jail::enter_or_abort(ThreadClass::Device);
                tracing::warn!(device = name, %error, "vhost-user request is refused");
            }
            Err(error) => {
                tracing::error!(device = name, %error, "vhost-user request failed");
                return;
            }
        }
    }
}
