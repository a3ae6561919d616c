//! Labels of a sandbox and the filters over them: pure rules, bounded.

use std::collections::BTreeMap;

use crate::error::{ApiError, ErrorCode};
use crate::selector::Selector;

/// Most labels one sandbox carries, those of its image included.
pub const LABEL_COUNT_MAX: usize = 64;
/// Longest key in bytes.
pub const LABEL_KEY_LEN_MAX: usize = 128;
/// Longest value in bytes.
pub const LABEL_VALUE_LEN_MAX: usize = 4096;
/// Prefixes of keys that belong to msb's own metric attributes.
pub const RESERVED_PREFIXES: [&str; 3] = ["sandbox.", "microsandbox.", "service."];

/// Checks one label.
///
/// # Errors
/// `invalid_label` naming the rule.
pub fn check(key: &str, value: &str) -> Result<(), ApiError> {
    let refuse = |why: String| Err(ApiError::new(ErrorCode::InvalidLabel, why));
    if key.is_empty() {
        return refuse("label key must not be empty".into());
    }
    if let Some(prefix) = RESERVED_PREFIXES.iter().find(|prefix| key.starts_with(**prefix)) {
        return refuse(format!("label key '{key}' uses reserved prefix '{prefix}'"));
    }
    if key.len() > LABEL_KEY_LEN_MAX {
        return refuse(format!("label key is too long: {} bytes (max {LABEL_KEY_LEN_MAX})", key.len()));
    }
    if value.len() > LABEL_VALUE_LEN_MAX {
        return refuse(format!(
            "value of label '{key}' is too long: {} bytes (max {LABEL_VALUE_LEN_MAX})",
            value.len()
        ));
    }
    if key.chars().any(char::is_control) {
        return refuse(format!("label key {key:?} has a control character"));
    }
    Ok(())
}

/// Checks a user's labels.
///
/// # Errors
/// `invalid_label` naming the rule.
pub fn check_all(labels: &BTreeMap<String, String>) -> Result<(), ApiError> {
    if labels.len() > LABEL_COUNT_MAX {
        let message = format!("too many labels: {} (max {LABEL_COUNT_MAX})", labels.len());
        return Err(ApiError::new(ErrorCode::InvalidLabel, message));
    }
    labels.iter().try_for_each(|(key, value)| check(key, value))
}

/// The labels of a sandbox: those of its image as the base, the user's over them.
///
/// Image labels that break a rule are left out, because the user did not write them; so are those beyond the limit,
/// in the order of their keys.
#[must_use]
pub fn merge(image: &BTreeMap<String, String>, user: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut merged = user.clone();
    for (key, value) in image {
        if merged.len() >= LABEL_COUNT_MAX {
            break;
        }
        if check(key, value).is_ok() {
            merged.entry(key.clone()).or_insert_with(|| value.clone());
        }
    }
    merged
}

/// One term of a filter: `KEY=VALUE` of `--label` is exact, a bare `KEY` asks whether the key exists (as in docker); `--selector` has
/// expressions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LabelTerm {
    /// The key has exactly this value.
    Equals(String, String),
    /// The key exists.
    Exists(String),
    /// The labels fit an expression.
    Fits(Selector),
}

impl LabelTerm {
    /// Reads a term.
    ///
    /// # Errors
    /// `invalid_label` for an empty key.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let (key, value) = match text.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (text, None),
        };
        if key.is_empty() {
            return Err(ApiError::new(ErrorCode::InvalidLabel, "label key must not be empty"));
        }
        Ok(match value {
            Some(value) => Self::Equals(key.into(), value.into()),
            None => Self::Exists(key.into()),
        })
    }

    /// Whether labels fit this term.
    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        match self {
            Self::Equals(key, value) => labels.get(key) == Some(value),
            Self::Exists(key) => labels.contains_key(key),
            Self::Fits(selector) => selector.matches(labels),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn rules_hold_on_both_sides_of_each_limit() {
        let key = "k".repeat(LABEL_KEY_LEN_MAX);
        let value = "v".repeat(LABEL_VALUE_LEN_MAX);
        assert!(check(&key, &value).is_ok());
        assert!(check("team", "").is_ok());
        assert!(check(&format!("{key}k"), "").is_err());
        assert!(check("k", &format!("{value}v")).is_err());
        assert_eq!(check("", "x").unwrap_err().message, "label key must not be empty");
        assert_eq!(
            check("service.name", "x").unwrap_err().message,
            "label key 'service.name' uses reserved prefix 'service.'"
        );
    }

    #[test]
    fn user_labels_win_and_bad_image_labels_are_left_out() {
        let merged = merge(
            &labels(&[("a", "image"), ("b", "image"), ("sandbox.x", "no"), ("", "no")]),
            &labels(&[("a", "user")]),
        );
        assert_eq!(merged, labels(&[("a", "user"), ("b", "image")]));
    }

    #[test]
    fn image_labels_never_push_the_sum_over_the_limit() {
        let many: BTreeMap<_, _> = (0..200).map(|i| (format!("k{i}"), String::new())).collect();
        assert_eq!(merge(&many, &labels(&[("mine", "1")])).len(), LABEL_COUNT_MAX);
    }

    #[test]
    fn terms_match_exactly_or_by_existence() {
        let have = labels(&[("team", "ml"), ("debug", "")]);
        for (term, fits) in
            [("team=ml", true), ("team=m", false), ("team", true), ("debug=", true), ("gpu", false), ("team=", false)]
        {
            assert_eq!(LabelTerm::parse(term).unwrap().matches(&have), fits, "{term}");
        }
        assert!(LabelTerm::parse("=x").is_err());
    }
}
