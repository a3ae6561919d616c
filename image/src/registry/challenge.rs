//! What a registry wants to see before it answers: the `WWW-Authenticate` header (RFC 9110, section 11.6.1) and the token that buys
//! entry (distribution specification, "Token Authentication"). Pure; the registry is hostile.

use serde::Deserialize;

/// Longest header that is looked at, in bytes.
const HEADER_LEN_MAX: usize = 8 << 10;
/// Longest token that is sent back, in bytes: several times what registries issue.
const TOKEN_LEN_MAX: usize = 64 << 10;

/// How a registry wants to be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// Name and password with every request.
    Basic,
    /// A token from `realm`.
    Bearer {
        /// URL of the token service.
        realm: String,
        /// Whom the token is for.
        service: Option<String>,
        /// What the token allows, where the registry says so.
        scope: Option<String>,
    },
}

/// Reads the challenges of a header; a bearer token is preferred, because it does not send the password everywhere.
pub(crate) fn parse<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let mut found = None;
    for header in headers.filter(|header| header.len() <= HEADER_LEN_MAX) {
        for challenge in split(header) {
            match challenge {
                Challenge::Bearer { .. } => return Some(challenge),
                Challenge::Basic => found = Some(Challenge::Basic),
            }
        }
    }
    found
}

/// The challenges of one header value that are understood.
fn split(header: &str) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    let mut rest = header.trim_start();
    while !rest.is_empty() {
        let end = rest.find([' ', ',']).unwrap_or(rest.len());
        let (scheme, after) = rest.split_at(end);
        let (parameters, after) = parameters(after.trim_start());
        rest = after.trim_start_matches([' ', ',', '\t']);
        let value = |name: &str| {
            parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.clone())
        };
        if scheme.eq_ignore_ascii_case("basic") {
            challenges.push(Challenge::Basic);
        } else if scheme.eq_ignore_ascii_case("bearer")
            && let Some(realm) = value("realm")
        {
            challenges.push(Challenge::Bearer { realm, service: value("service"), scope: value("scope") });
        }
    }
    challenges
}

/// Takes `key=value` pairs from the front, up to what is none: the next scheme.
fn parameters(text: &str) -> (Vec<(String, String)>, &str) {
    let mut pairs = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([' ', ',', '\t']);
        let Some(equals) = rest.find('=') else { return (pairs, rest) };
        let key = rest[..equals].trim_end();
        if key.is_empty() || key.contains([' ', ',', '"']) {
            return (pairs, rest);
        }
        let after = rest[equals + 1..].trim_start();
        let (value, after) = if let Some(quoted) = after.strip_prefix('"') {
            let mut value = String::new();
            let mut escaped = false;
            let mut end = quoted.len();
            for (at, c) in quoted.char_indices() {
                match c {
                    _ if escaped => {
                        value.push(c);
                        escaped = false;
                    }
                    '\\' => escaped = true,
                    '"' => {
                        end = at + 1;
                        break;
                    }
                    _ => value.push(c),
                }
            }
            (value, &quoted[end..])
        } else {
            let end = after.find([',', ' ']).unwrap_or(after.len());
            (after[..end].to_owned(), &after[end..])
        };
        pairs.push((key.to_owned(), value));
        rest = after;
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
}

/// The token of an answer of a token service.
pub(crate) fn token(body: &[u8]) -> Result<String, &'static str> {
    let answer: TokenAnswer = serde_json::from_slice(body).map_err(|_| "its answer is no token")?;
    let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty()).ok_or("it gave no token")?;
    if token.len() > TOKEN_LEN_MAX || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("its token is not one");
    }
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        Some(Challenge::Bearer {
            realm: realm.into(),
            service: service.map(String::from),
            scope: scope.map(String::from),
        })
    }

    #[test]
    fn challenges_as_registries_write_them() {
        let table = [
            (r#"Basic realm="Registry Realm""#, Some(Challenge::Basic)),
            (
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io""#,
                bearer("https://auth.docker.io/token", Some("registry.docker.io"), None),
            ),
            (
                r#"Bearer realm="https://a/t", service="s", scope="repository:a/b:pull,push""#,
                bearer("https://a/t", Some("s"), Some("repository:a/b:pull,push")),
            ),
            (r#"bearer realm=https://a/t"#, bearer("https://a/t", None, None)),
            (r#"Basic realm="x", Bearer realm="https://a\"b""#, bearer("https://a\"b", None, None)),
            (r#"Negotiate, Basic realm="x""#, Some(Challenge::Basic)),
            ("Bearer", None),
            ("", None),
            ("Digest qop=\"auth", None),
        ];
        for (header, expected) in table {
            assert_eq!(parse([header].into_iter()), expected, "{header}");
        }
    }

    #[test]
    fn tokens_are_taken_from_both_fields_and_never_break_a_header() {
        assert_eq!(token(br#"{"token":"a"}"#), Ok("a".into()));
        assert_eq!(token(br#"{"access_token":"b","token":null}"#), Ok("b".into()));
        for bad in [&b"{}"[..], b"[]", br#"{"token":""}"#, br#"{"token":"a\r\nX: y"}"#, b"<html>"] {
            assert!(token(bad).is_err());
        }
    }

    proptest::proptest! {
        #[test]
        fn any_header_is_read_without_a_panic(text in ".{0,300}") {
            let _ = parse([text.as_str()].into_iter());
        }
    }
}
