//! Every type that crosses a border between two programs of msb, and nothing else: no I/O, no clock, no threads.
//!
//! | module | border | form on the wire |
//! |---|---|---|
//! | [`control`], [`images`] | `msb`, SDKs ↔ `msbd` | HTTP + WebSocket on a Unix socket, JSON |
//! | [`fleet`] | `msbd` ↔ whoever reads all metrics each second | the same, protobuf |
//! | [`file_api`] | the control API's file routes | the same |
//! | [`vmm`] | `msbd` ↔ `msb-vmm` | frames with JSON bodies (samples also in protobuf) on a Unix socket |
//! | [`guest`] | host ↔ `msb-agent` | frames with protobuf bodies on vsock |
//! | [`files`] | the guest border's file sessions | the same |
//! | [`frame`] | all framed borders | u32 big-endian length, then the body, 1 MiB at most |
//! | [`version`] | all borders | a generation number and what each one brought |
//!
//! The rest are the nouns those messages are made of: [`id`], [`spec`], [`state`], [`error`], [`labels`], [`mount`], [`network`], [`config`], [`paths`], [`quantity`],
//! [`security`], [`volume`].
//! Used by every other crate; it uses none of them. It never opens a file or a socket.

#![forbid(unsafe_code)]

pub mod config;
pub mod control;
pub mod error;
pub mod file_api;
pub mod files;
pub mod fleet;
pub mod frame;
pub mod guest;
pub mod health;
pub mod id;
pub mod images;
pub mod labels;
pub mod mount;
pub mod network;
pub mod paths;
pub mod piece;
pub mod quantity;
pub mod security;
pub mod selector;
pub mod snapshot;
pub mod spec;
pub mod state;
pub mod version;
pub mod vmm;
pub mod volume;
