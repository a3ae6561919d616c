//! The logs that must survive the daemon: the main workload's output as JSON lines, and the guest's console as it came.
//!
//! Written by the agent link's thread (`workload`), the engine's console thread (`console`) and the control thread (`decisions`, the
//! network's). Guests decide how much arrives, so
//! every file is rotated at a size and only a stated number of old ones is kept; a log that cannot be written loses lines and says
//! how many, it never stops the guest.

pub mod console;
pub mod decisions;
pub mod limit;
pub mod rotate;
pub mod workload;
