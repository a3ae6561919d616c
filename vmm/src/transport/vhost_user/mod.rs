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
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use vhost::vhost_user::{BackendReqHandler, Error};

use crate::devices::virtio::device::VirtioDevice;
use crate::jail::{self, ThreadClass};
use handler::Handler;

/// Refused requests after which a front end is given up: a working one causes none.
const REFUSALS_MAX: u32 = 16;
/// The message loop needs little stack.
const STACK_BYTES: usize = 256 * 1024;

/// A device being served. The device keeps running when QEMU's side of the socket closes, until [`Served::finish`]: whoever
/// supervises QEMU decides in which order things end.
pub struct Served {
    name: String,
    handler: Arc<Mutex<Handler>>,
    thread: JoinHandle<()>,
}

impl Served {
    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits for the front end to close its socket (it is dead by now), then stops the device.
    pub fn finish(self) {
        if self.thread.join().is_err() {
            tracing::error!(device = self.name, "vhost-user thread panicked");
        }
        self.handler.lock().unwrap_or_else(PoisonError::into_inner).stop();
    }
}

/// Serves `device` on `socket` from a thread of its own.
pub fn serve(device: Box<dyn VirtioDevice>, socket: UnixStream) -> io::Result<Served> {
    let name = device.name().to_owned();
    let handler = Arc::new(Mutex::new(Handler::new(device).map_err(io::Error::other)?));
    let mut requests = BackendReqHandler::from_stream(socket, Arc::clone(&handler));
    let thread_name = name.clone();
    let thread = std::thread::Builder::new().name(format!("vu-{name}")).stack_size(STACK_BYTES).spawn(move || {
        let mut refusals = 0;
        loop {
            match requests.handle_request() {
                Ok(()) => jail::enter_or_abort(ThreadClass::Device),
                Err(Error::Disconnected | Error::PartialMessage | Error::SocketBroken(_) | Error::SocketError(_)) => {
                    return;
                }
                // The message was read whole and refused (and QEMU told, if it asked): the next one can be understood.
                Err(error @ (Error::InvalidParam | Error::InvalidOperation(_) | Error::ReqHandlerError(_)))
                    if refusals < REFUSALS_MAX =>
                {
                    refusals += 1;
                    jail::enter_or_abort(ThreadClass::Device);
                    tracing::warn!(device = thread_name, %error, "vhost-user request is refused");
                }
                Err(error) => {
                    tracing::error!(device = thread_name, %error, "vhost-user request failed");
                    return;
                }
            }
        }
    })?;
    Ok(Served { name, handler, thread })
}
