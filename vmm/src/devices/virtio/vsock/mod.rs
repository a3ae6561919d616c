//! virtio-vsock (VIRTIO 1.2, section 5.10): every byte stream between host and guest, multiplexed onto Unix sockets.
//!
//! ```text
//!  host program ── connect ──► vsock.sock ── "CONNECT <port>\n" ──► REQUEST ──► guest listener on <port>
//!               ◄── "OK <host port>\n" ─────────────────────────── RESPONSE ◄──
//!
//!  guest program ── connect to CID 2, <port> ──► REQUEST ──► the one stream prepared for <port>, else RST
//! ```
//!
//! A guest reaches only the ports it was given ([`GuestPort`]), each once per boot. Packets of other CIDs are dropped. Flow control is
//! by credit in both directions: what a host program does not read stays in a bounded backlog here and then with the guest, what the
//! guest does not read stays in the host program's socket. Bytes move straight between guest memory and the sockets.
//!
//! `packet` is the wire format, `connection` the state of one stream, `muxer` the table of all of them and the worker on the rings.

mod connection;
mod device;
mod muxer;
mod packet;

#[cfg(test)]
mod tests;

pub use device::{GuestPort, Vsock, VsockCounters, VsockOptions};
