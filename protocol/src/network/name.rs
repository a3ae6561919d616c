//! Domain names as rules and DNS decisions use them: lower case, ASCII, no final dot. Used by the rule grammar and by the
//! `network` crate. Never resolves anything.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name in bytes, without the final dot (RFC 1035, section 2.3.4, less the root's length byte and the first one).
pub const DOMAIN_NAME_LEN_MAX: usize = 253;
/// Longest label in bytes.
pub const DOMAIN_LABEL_LEN_MAX: usize = 63;

/// A domain name in its one form.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DomainName(String);

impl DomainName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is `suffix` itself or below it.
    #[must_use]
    pub fn is_within(&self, suffix: &Self) -> bool {
        self.0.strip_suffix(&suffix.0).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }

    /// Number of labels.
    #[must_use]
    pub fn label_count(&self) -> usize {
        self.0.split('.').count()
    }
}

/// Why a text is not a domain name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DomainNameError {
    /// Nothing is left of it.
    #[error("a domain name cannot be empty")]
    Empty,
    /// Longer than [`DOMAIN_NAME_LEN_MAX`].
    #[error("a domain name has at most 253 bytes")]
    TooLong,
    /// A label is empty or longer than [`DOMAIN_LABEL_LEN_MAX`].
    #[error("each part of a domain name has 1 to 63 bytes")]
    Label,
    /// A byte that is not a letter, digit, '-' or '_'.
    #[error("a domain name has letters, digits, '-' and '_' only; write other scripts in their xn-- form")]
    Character,
}

impl FromStr for DomainName {
    type Err = DomainNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.strip_suffix('.').unwrap_or(text);
        if text.is_empty() {
            return Err(DomainNameError::Empty);
        }
        if text.len() > DOMAIN_NAME_LEN_MAX {
            return Err(DomainNameError::TooLong);
        }
        for label in text.split('.') {
            if label.is_empty() || label.len() > DOMAIN_LABEL_LEN_MAX {
                return Err(DomainNameError::Label);
            }
            if !label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')) {
                return Err(DomainNameError::Character);
            }
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

impl TryFrom<String> for DomainName {
    type Error = DomainNameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<DomainName> for String {
    fn from(name: DomainName) -> Self {
        name.0
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_one_form_and_bad_ones_a_reason() {
        let name: DomainName = "WWW.Example.COM.".parse().unwrap();
        assert_eq!(name.as_str(), "www.example.com");
        let suffix: DomainName = "example.com".parse().unwrap();
        assert!(name.is_within(&suffix) && suffix.is_within(&suffix));
        assert!(!"badexample.com".parse::<DomainName>().unwrap().is_within(&suffix));
        for (text, error) in [
            ("", DomainNameError::Empty),
            (".", DomainNameError::Empty),
            ("a..b", DomainNameError::Label),
            ("exämple.com", DomainNameError::Character),
            ("a b.com", DomainNameError::Character),
        ] {
            assert_eq!(text.parse::<DomainName>(), Err(error), "{text:?}");
        }
        let label = "a".repeat(DOMAIN_LABEL_LEN_MAX);
        assert!(format!("{label}.b").parse::<DomainName>().is_ok());
        assert_eq!(format!("{label}a.b").parse::<DomainName>(), Err(DomainNameError::Label));
        let longest = format!("{label}.{label}.{label}.{}", "b".repeat(61));
        assert_eq!(longest.len(), DOMAIN_NAME_LEN_MAX);
        assert!(longest.parse::<DomainName>().is_ok());
        assert_eq!(format!("{longest}b").parse::<DomainName>(), Err(DomainNameError::TooLong));
    }
}
