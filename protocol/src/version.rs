//! Generations: one number per border, what each brought, and how two sides of different age agree.
//!
//! The rule: both say what they are, both use the smaller, and a call that the peer is too old for fails alone and locally.

use crate::error::{ApiError, ErrorCode};

/// The guest border of this build.
/// 3: `Quiesce`, `Thaw` and `Renew`, for memory snapshots.
pub const GUEST_GENERATION: u32 = 3;
/// The oldest guest border this build still speaks.
pub const GUEST_GENERATION_MIN: u32 = 1;
/// The VMM border of this build.
/// 2: `Pause` and `Resume`. 3: `Save`, `Release` and `VmSpec::restore`.
pub const VMM_GENERATION: u32 = 3;
/// The control API of this build; it is the `v1` of the routes.
pub const CONTROL_API_VERSION: u32 = 1;

/// Something one side asks of another across a versioned border.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Run a command.
    Exec,
    /// Attach to the main workload.
    Attach,
    /// Flush and turn off.
    Shutdown,
    /// Copy and inspect files.
    File,
    /// Open a TCP connection inside the guest.
    TcpConnect,
}

impl Operation {
    /// The name users see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Attach => "attach",
            Self::Shutdown => "shutdown",
            Self::File => "file",
            Self::TcpConnect => "tcp_connect",
        }
    }

    /// The guest generation that brought it.
    #[must_use]
    pub fn guest_generation(self) -> u32 {
        match self {
            Self::Exec | Self::Attach | Self::Shutdown => 1,
            Self::File | Self::TcpConnect => 2,
        }
    }
}

/// A call that the peer is too old for. It fails before anything is sent; other calls go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the sandbox's runtime is too old for '{operation}' (needs generation {needs}, it speaks {peer})")]
pub struct UnsupportedOperation {
    /// What was asked.
    pub operation: &'static str,
    /// The generation it needs.
    pub needs: u32,
    /// The generation the peer has.
    pub peer: u32,
}

impl From<UnsupportedOperation> for ApiError {
    fn from(error: UnsupportedOperation) -> Self {
        Self::new(ErrorCode::UnsupportedOperation, error.to_string())
    }
}

/// The generation both sides speak.
///
/// # Errors
/// `unsupported_operation` if the peer is older than anything this build speaks.
pub fn negotiate(own: u32, own_min: u32, peer: u32) -> Result<u32, UnsupportedOperation> {
    let agreed = own.min(peer);
    if agreed < own_min { Err(UnsupportedOperation { operation: "connect", needs: own_min, peer }) } else { Ok(agreed) }
}

/// Whether a guest of a generation can do an operation.
///
/// # Errors
/// [`UnsupportedOperation`] if it cannot.
pub fn require(operation: Operation, peer: u32) -> Result<(), UnsupportedOperation> {
    let needs = operation.guest_generation();
    if peer < needs { Err(UnsupportedOperation { operation: operation.as_str(), needs, peer }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smaller_generation_is_spoken_and_too_old_is_refused() {
        assert_eq!(negotiate(3, 1, 2), Ok(2));
        assert_eq!(negotiate(3, 1, 9), Ok(3));
        assert_eq!(negotiate(3, 2, 1).unwrap_err().needs, 2);
        assert_eq!(negotiate(3, 1, 0).unwrap_err().peer, 0);
    }

    #[test]
    fn an_operation_fails_alone_for_a_peer_that_is_too_old() {
        assert_eq!(require(Operation::Exec, 1), Ok(()));
        let error = require(Operation::TcpConnect, 1).unwrap_err();
        assert_eq!((error.operation, error.needs, error.peer), ("tcp_connect", 2, 1));
        let error = ApiError::from(error);
        assert_eq!(error.code, ErrorCode::UnsupportedOperation);
        assert!(error.hint.contains("restart the sandbox"));
    }
}
