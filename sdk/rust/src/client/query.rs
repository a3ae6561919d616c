//! The paths of requests. Pure; used by the calls of [`super::Client`].

use msb_protocol::id::SandboxName;

pub(crate) fn sandbox(name: &SandboxName, rest: &str) -> String {
    // A name's characters are all unreserved in a path (RFC 3986, section 2.3).
    format!("/v1/sandboxes/{name}{rest}")
}

pub(super) fn flag(name: &'static str, on: bool) -> Vec<(&'static str, String)> {
    if on { vec![(name, "true".to_owned())] } else { Vec::new() }
}

pub(crate) fn with_query(path: &str, pairs: &[(&str, String)]) -> String {
    let mut uri = path.to_owned();
    for (index, (key, value)) in pairs.iter().enumerate() {
        uri.push(if index == 0 { '?' } else { '&' });
        uri.push_str(key);
        uri.push('=');
        percent_encode(value, &mut uri);
    }
    uri
}

/// Percent-encodes everything but unreserved characters (RFC 3986, section 2.1).
fn percent_encode(text: &str, out: &mut String) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push('%');
            for digit in [byte >> 4, byte & 15] {
                out.push(char::from_digit(u32::from(digit), 16).unwrap_or('0').to_ascii_uppercase());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_encoded() {
        let pairs = [("label", "team=ml&x".to_owned()), ("label", "ä b+%".to_owned())];
        assert_eq!(with_query("/v1/sandboxes", &pairs), "/v1/sandboxes?label=team%3Dml%26x&label=%C3%A4%20b%2B%25");
        assert_eq!(with_query("/v1/x", &[]), "/v1/x");
    }

    proptest::proptest! {
        #[test]
        fn any_text_becomes_a_valid_uri(text in ".{0,200}") {
            let uri = with_query("/v1/image", &[("reference", text)]);
            proptest::prop_assert!(uri.parse::<hyper::Uri>().is_ok());
        }
    }
}
