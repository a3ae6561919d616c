//! Expressions over labels (`--selector`), in the form Kubernetes users know. Pure and bounded.
//!
//! ```text
//! selector    = [ requirement { "," requirement } ]          all must fit; an empty one fits everything
//! requirement = KEY | "!" KEY
//!             | KEY ("=" | "==" | "!=") VALUE
//!             | KEY ("in" | "notin") "(" VALUE { "," VALUE } ")"
//! ```
//!
//! Keys and values are words without white space and without `,()=!`. `!=` and `notin` also fit where the key is missing.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{ApiError, ErrorCode};
use crate::labels::LABEL_KEY_LEN_MAX;

/// Longest expression in bytes.
pub const SELECTOR_LEN_MAX: usize = 8 << 10;
/// Most requirements of one expression.
pub const REQUIREMENTS_MAX: usize = 64;

/// What one label must be.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    Exists(String),
    Missing(String),
    In(String, BTreeSet<String>),
    NotIn(String, BTreeSet<String>),
}

/// An expression; labels fit if they fit each of its requirements.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    requirements: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token<'a> {
    Word(&'a str),
    Comma,
    Open,
    Close,
    Not,
    Equals,
    Differs,
}

impl Selector {
    /// Reads an expression.
    ///
    /// # Errors
    /// `invalid_selector` saying what was expected where.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        if text.len() > SELECTOR_LEN_MAX {
            return Err(refuse(format!("the selector is longer than {SELECTOR_LEN_MAX} bytes")));
        }
        let tokens = tokens(text)?;
        let mut parser = Parser { tokens: &tokens };
        let mut requirements = Vec::new();
        if tokens.is_empty() {
            return Ok(Self::default());
        }
        loop {
            requirements.push(parser.requirement()?);
            if requirements.len() > REQUIREMENTS_MAX {
                return Err(refuse(format!("a selector has at most {REQUIREMENTS_MAX} requirements")));
            }
            match parser.next() {
                None => return Ok(Self { requirements }),
                Some(Token::Comma) => {}
                Some(other) => return Err(unexpected(Some(other), "',' or the end")),
            }
        }
    }

    /// Whether it fits everything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    /// Whether labels fit.
    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.requirements.iter().all(|requirement| match requirement {
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::Missing(key) => !labels.contains_key(key),
            Requirement::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Requirement::NotIn(key, values) => labels.get(key).is_none_or(|value| !values.contains(value)),
        })
    }
}

struct Parser<'a> {
    tokens: &'a [Token<'a>],
}

impl<'a> Parser<'a> {
    fn next(&mut self) -> Option<&'a Token<'a>> {
        let (first, rest) = self.tokens.split_first()?;
        self.tokens = rest;
        Some(first)
    }

    fn peek(&self) -> Option<&'a Token<'a>> {
        self.tokens.first()
    }

    fn requirement(&mut self) -> Result<Requirement, ApiError> {
        let key = match self.next() {
            Some(Token::Not) => {
                return match self.next() {
                    Some(Token::Word(key)) => Ok(Requirement::Missing(checked(key)?)),
                    other => Err(unexpected(other, "a key after '!'")),
                };
            }
            Some(Token::Word(key)) => checked(key)?,
            other => return Err(unexpected(other, "a key")),
        };
        match self.peek() {
            None | Some(Token::Comma) => Ok(Requirement::Exists(key)),
            Some(Token::Equals) => Ok(Requirement::In(key, self.single())),
            Some(Token::Differs) => Ok(Requirement::NotIn(key, self.single())),
            Some(Token::Word("in")) => Ok(Requirement::In(key, self.list()?)),
            Some(Token::Word("notin")) => Ok(Requirement::NotIn(key, self.list()?)),
            other => Err(unexpected(other, "'=', '!=', 'in', 'notin' or ','")),
        }
    }

    /// The value after an operator; none is the empty value.
    fn single(&mut self) -> BTreeSet<String> {
        self.next();
        let value = match self.peek() {
            Some(Token::Word(value)) => {
                self.next();
                (*value).to_owned()
            }
            _ => String::new(),
        };
        BTreeSet::from([value])
    }

    fn list(&mut self) -> Result<BTreeSet<String>, ApiError> {
        self.next();
        match self.next() {
            Some(Token::Open) => {}
            other => return Err(unexpected(other, "'('")),
        }
        let mut values = BTreeSet::new();
        loop {
            match self.next() {
                Some(Token::Word(value)) => values.insert((*value).to_owned()),
                other => return Err(unexpected(other, "a value")),
            };
            match self.next() {
                Some(Token::Comma) => {}
                Some(Token::Close) => return Ok(values),
                other => return Err(unexpected(other, "',' or ')'")),
            }
        }
    }
}

fn tokens(text: &str) -> Result<Vec<Token<'_>>, ApiError> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let (token, len) = match first {
            ',' => (Token::Comma, 1),
            '(' => (Token::Open, 1),
            ')' => (Token::Close, 1),
            '!' if rest.starts_with("!=") => (Token::Differs, 2),
            '!' => (Token::Not, 1),
            '=' if rest.starts_with("==") => (Token::Equals, 2),
            '=' => (Token::Equals, 1),
            c if c.is_control() => return Err(refuse("the selector has a control character".into())),
            _ => {
                let ends = |c: char| c.is_whitespace() || c.is_control() || ",()=!".contains(c);
                let len = rest.find(ends).unwrap_or(rest.len());
                (Token::Word(&rest[..len]), len)
            }
        };
        tokens.push(token);
        rest = rest[len..].trim_start();
    }
    Ok(tokens)
}

fn checked(key: &str) -> Result<String, ApiError> {
    if key.len() > LABEL_KEY_LEN_MAX {
        return Err(refuse(format!("a key of the selector is longer than {LABEL_KEY_LEN_MAX} bytes")));
    }
    Ok(key.to_owned())
}

fn unexpected(token: Option<&Token<'_>>, wanted: &str) -> ApiError {
    let found = match token {
        None => "the end".into(),
        Some(Token::Word(word)) => format!("{word:?}"),
        Some(Token::Comma) => "','".into(),
        Some(Token::Open) => "'('".into(),
        Some(Token::Close) => "')'".into(),
        Some(Token::Not) => "'!'".into(),
        Some(Token::Equals) => "'='".into(),
        Some(Token::Differs) => "'!='".into(),
    };
    refuse(format!("the selector has {found} where {wanted} should be"))
}

fn refuse(message: String) -> ApiError {
    ApiError::new(ErrorCode::InvalidSelector, message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn expressions_and_what_they_fit() {
        let have = labels(&[("team", "ml"), ("gpu", ""), ("in", "x"), ("a.b/c", "1")]);
        for (text, fits) in [
            ("", true),
            ("  ", true),
            ("team", true),
            ("!team", false),
            ("!debug", true),
            ("! debug", true),
            ("team=ml", true),
            ("team==ml", true),
            ("team = web", false),
            ("team!=web", true),
            ("debug!=1", true),
            ("gpu=", true),
            ("gpu=,team", true),
            ("team=", false),
            ("team in (ml,web)", true),
            ("team in ( web , ml )", true),
            ("team in (web)", false),
            ("team notin (web)", true),
            ("debug notin (1)", true),
            ("debug in (1)", false),
            ("team in (ml,web),!debug,gpu", true),
            ("team in (ml,web),debug", false),
            ("in in (x)", true),
            ("a.b/c=1", true),
        ] {
            assert_eq!(Selector::parse(text).unwrap().matches(&have), fits, "{text}");
        }
        assert!(Selector::parse(" ").unwrap().is_empty());
    }

    #[test]
    fn what_is_none_says_where() {
        for (text, part) in [
            (",", "',' where a key"),
            ("a,", "the end where a key"),
            ("a b", "\"b\" where '='"),
            ("a in", "the end where '('"),
            ("a in ()", "')' where a value"),
            ("a in (b", "the end where ',' or ')'"),
            ("a in (b c)", "\"c\" where ',' or ')'"),
            ("!", "the end where a key after"),
            ("a=b=c", "'=' where ',' or the end"),
            ("a\u{7}", "control character"),
        ] {
            let error = Selector::parse(text).unwrap_err();
            assert!(
                error.code == ErrorCode::InvalidSelector && error.message.contains(part),
                "{text}: {}",
                error.message
            );
        }
        assert!(Selector::parse(&"k".repeat(SELECTOR_LEN_MAX + 1)).is_err());
        assert!(Selector::parse(&"k".repeat(LABEL_KEY_LEN_MAX + 1)).is_err());
        assert!(Selector::parse(&vec!["k"; REQUIREMENTS_MAX].join(",")).is_ok());
        assert!(Selector::parse(&vec!["k"; REQUIREMENTS_MAX + 1].join(",")).is_err());
    }

    proptest! {
        #[test]
        fn anything_is_read_or_refused(text in ".{0,200}") {
            if let Ok(selector) = Selector::parse(&text) {
                let _ = selector.matches(&labels(&[("a", "b")]));
            }
        }

        #[test]
        fn a_set_and_its_opposite_divide_the_world(key in "[a-z]{1,3}", values in prop::collection::vec("[a-z]{1,2}", 1..4), value in prop::option::of("[a-z]{1,2}")) {
            let have = value.map(|value| labels(&[(&key, &value)])).unwrap_or_default();
            let parse = |word: &str| Selector::parse(&format!("{key} {word} ({})", values.join(","))).unwrap();
            prop_assert_ne!(parse("in").matches(&have), parse("notin").matches(&have));
        }
    }
}
