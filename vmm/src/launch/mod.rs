//! From the daemon's `VmSpec` to a machine: validation, opened files, devices, kernel command line, boot phases.
//!
//! Called by `control` when a `Launch` request arrives and by `main` for `--spec`. All validation of a spec is here; an engine
//! can take a [`crate::engine::Machine`] at its word.

pub mod command_line;
pub mod engine_choice;
pub mod kernel_file;
pub mod machine;
pub mod phases;
pub mod volumes;
