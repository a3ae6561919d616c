//! One sandbox: the pure machine of its life, the actor that does what the machine says, and what they are made of.

pub mod activity;
pub mod actor;
pub mod directories;
pub mod disk_hold;
pub mod health;
pub mod heartbeat;
pub mod machine;
pub mod mounts;
pub mod network;
pub mod plan;
pub mod probe;
pub mod ssh;
pub mod view;
