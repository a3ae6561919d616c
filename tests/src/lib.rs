//! Whole-system tests: the framework they stand on. The cases are in `tests/tests/system/`.
//!
//! Each test has a [`Home`] of its own: a temporary `MSB_HOME` and runtime folder, the real programs from the install tree, a daemon
//! that the first command starts. At its end [`Home::finish`] stops everything and insists that no process, socket, mount or
//! temporary file is left. A test that fails leaves its logs under `MSB_TEST_EVIDENCE` and prints their ends.
//!
//! Nothing here knows how the product works inside: it types commands, reads what they print, and looks at the host as
//! an administrator would.
#![expect(clippy::print_stderr, reason = "what a failed test says goes to the test runner's output")]

mod artifacts;
mod census;
mod home;
mod invocation;
mod program;
pub mod world;

pub use artifacts::{engine, image, observers, python_image, tools_image, tree};
pub use census::Process;
pub use home::Home;
pub use invocation::{Finished, Invocation, Running};
pub use program::{exiting_program, static_program};
pub use world::World;
