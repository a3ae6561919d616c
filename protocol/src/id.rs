//! Names and identities: what a person types and what a record carries. Parsed once, at the border, by every program.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{ApiError, ErrorCode};

/// Longest sandbox name in bytes.
pub const NAME_LEN_MAX: usize = 128;

/// The name of a sandbox, `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`.
///
/// It becomes a directory name, so it can hold no separator and cannot start with a dot.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String)]
pub struct SandboxName(String);

impl SandboxName {
    /// Checks and takes a name.
    ///
    /// # Errors
    /// `invalid_name` with the rule that was broken.
    pub fn parse(name: &str) -> Result<Self, ApiError> {
        let refuse = |why: String| {
            Err(ApiError::new(ErrorCode::InvalidName, format!("sandbox name {why}"))
                .with_hint("use 1 to 128 letters, digits, '.', '_' or '-', starting with a letter or digit"))
        };
        let Some(first) = name.bytes().next() else { return refuse("is required".into()) };
        if name.len() > NAME_LEN_MAX {
            return refuse(format!("is too long: {} bytes (max {NAME_LEN_MAX})", name.len()));
        }
        if !first.is_ascii_alphanumeric() {
            return refuse(format!("{name:?} starts with a character other than a letter or digit"));
        }
        match name.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))) {
            Some(bad) => refuse(format!("{name:?} has the character {bad:?}")),
            None => Ok(Self(name.to_owned())),
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SandboxName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SandboxName {
    type Err = ApiError;
    fn from_str(name: &str) -> Result<Self, ApiError> {
        Self::parse(name)
    }
}

impl TryFrom<String> for SandboxName {
    type Error = ApiError;
    fn try_from(name: String) -> Result<Self, ApiError> {
        Self::parse(&name)
    }
}

impl From<SandboxName> for String {
    fn from(name: SandboxName) -> Self {
        name.0
    }
}

macro_rules! uuid_identity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(transparent)]
        #[schema(value_type = String, format = Uuid)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new identity, ordered by time of creation (UUID version 7, RFC 9562).
            #[must_use]
            pub fn generate() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, uuid::Error> {
                text.parse().map(Self)
            }
        }
    };
}

uuid_identity! {
    /// The identity of a sandbox from create to remove. A later sandbox of the same name has another one.
    SandboxId
}
uuid_identity! {
    /// The identity of one run of a sandbox. Every heartbeat, event, metric and log record carries it, so that nothing
    /// from an earlier boot can count for a later one.
    BootId
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rule_on_both_sides_of_each_limit() {
        let longest = "a".repeat(NAME_LEN_MAX);
        for good in ["a", "0", "web", "a.b_c-D9", longest.as_str()] {
            assert_eq!(SandboxName::parse(good).unwrap().as_str(), good);
        }
        let too_long = "a".repeat(NAME_LEN_MAX + 1);
        for bad in ["", ".", "..", "-a", "_a", ".a", "a/b", "../x", "/x", "a b", "a\n", "ä", "a\0", too_long.as_str()]
        {
            assert_eq!(SandboxName::parse(bad).unwrap_err().code, ErrorCode::InvalidName, "{bad:?}");
        }
    }

    #[test]
    fn boot_ids_are_ordered_by_time() {
        let first = BootId::generate();
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!(first < BootId::generate());
    }
}
