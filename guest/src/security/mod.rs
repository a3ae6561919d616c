//! What the profile of a sandbox takes away from the processes that msb starts in it. Made once per boot by `agent`, applied to each
//! process by `sys::spawn`; what it does to the root is in `root::hardening`. The table of capabilities is `msb_protocol::security`.

mod system_calls;

use msb_protocol::security::SecurityProfile;

use crate::sys::Confinement;

pub use system_calls::FilterError;

/// A profile, ready to be applied.
#[derive(Debug)]
pub struct Security {
    profile: SecurityProfile,
    filters: Vec<Vec<libc::sock_filter>>,
}

impl Security {
    /// Compiles what the profile needs.
    ///
    /// # Errors
    /// If a filter cannot be compiled, which only a defect of this program can cause.
    pub fn new(profile: SecurityProfile) -> Result<Self, FilterError> {
        let filters = if profile == SecurityProfile::Strict { system_calls::filters()? } else { Vec::new() };
        Ok(Self { profile, filters })
    }

    /// The profile.
    #[must_use]
    pub fn profile(&self) -> SecurityProfile {
        self.profile
    }

    /// What a process loses.
    #[must_use]
    pub fn confinement(&self) -> Confinement<'_> {
        Confinement {
            capabilities: self.profile.capability_mask(),
            no_new_privileges: self.profile.confines(),
            filters: &self.filters,
        }
    }
}
