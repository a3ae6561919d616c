//! What confines the VM process.

/// The kinds of threads, each with its own system calls.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ThreadClass {
    /// Runs guest code and answers its register accesses.
    Vcpu,
}

/// Why a thread could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum JailError {}

/// Confines the calling thread for good, if the jail has been closed.
pub fn enter(_class: ThreadClass) -> Result<(), JailError> {
    Ok(())
}
