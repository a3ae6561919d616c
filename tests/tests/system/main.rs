//! The whole-system cases. One module per promise; every case reads like the session it proves.
#![expect(clippy::print_stdout, reason = "a case that cannot run here says so to the test runner's output")]

mod api;
mod bad_input;
mod boot_failure;
mod care;
mod copy;
mod crash;
mod disk_full;
mod documents;
mod durability;
mod endings;
mod environment;
mod exec;
mod generations;
mod host;
mod image;
mod inside;
mod logs;
mod machine;
mod memory;
mod metrics;
mod network;
mod output;
mod pause;
mod registry;
mod root;
mod sdk;
mod security;
mod service;
mod session;
mod snapshots;
mod ssh;
mod streams;
mod terminal;
mod volumes;
mod workload;
