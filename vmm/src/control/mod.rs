//! The control border: what `msbd` and this process say to each other (`msb_protocol::vmm`).
//!
//! ```text
//!  stdin (socket pair) ──Launch──► main ──► boot … end          one thread polls:
//!  control.sock ◄── a restarted daemon: Adopt                    listener, connections, the run's events, deadlines
//! ```
//!
//! Daemons come and go; the machine does not notice. The newest connection gets the events; a peer that does not read, or breaks the
//! protocol, is dropped. The same thread keeps the two deadlines of a run: the boot's, and that of a guest whose agent vanished.

mod connection;
mod explanation;
mod sample;
mod server;

pub use connection::{Connection, First, receive_first};
pub use explanation::explain_network;
pub use server::{Control, ControlOptions, StandBy};
