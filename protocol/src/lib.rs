//! Every type that crosses a border between two programs of msb, and nothing else: no I/O, no clock, no threads.
//!
//! | module | border | form on the wire |
//! |---|---|---|
//! | [`control`] | `msb`, SDKs ↔ `msbd` | HTTP + WebSocket on a Unix socket, JSON |
//! | [`vmm`] | `msbd` ↔ `msb-vmm` | frames with JSON bodies on a Unix socket |
//! | [`guest`] | host ↔ `msb-agent` | frames with protobuf bodies on vsock |
//! | [`frame`] | all framed borders | u32 big-endian length, then the body, 1 MiB at most |
//! | [`version`] | all borders | a generation number and what each one brought |
//!
//! The rest are the nouns those messages are made of: [`id`], [`spec`], [`state`], [`error`], [`labels`], [`network`], [`config`], [`paths`], [`quantity`].
//! Used by every other crate; it uses none of them. It never opens a file or a socket.

#![forbid(unsafe_code)]

pub mod config;
pub mod control;
pub mod error;
pub mod frame;
pub mod guest;
pub mod health;
pub mod id;
pub mod labels;
pub mod network;
pub mod paths;
pub mod quantity;
pub mod selector;
pub mod spec;
pub mod state;
pub mod version;
pub mod vmm;
