//! The grammar of rules: what parses, to what, and what the hints say.

use super::*;

#[test]
fn rules_parse_and_print_in_one_form() {
    for (text, printed) in [
        ("allow@any", "allow@any"),
        ("allow:egress@public", "allow@public"),
        ("deny:ingress@any:tcp:22", "deny:ingress@any:tcp:22"),
        ("deny@link-local", "deny@link-local"),
        ("allow@10.0.0.0/8:tcp:80-90", "allow@10.0.0.0/8:tcp:80-90"),
        ("allow@1.2.3.4/32:udp", "allow@1.2.3.4:udp"),
        ("allow@[2001:db8::1]:tcp:443", "allow@[2001:db8::1]:tcp:443"),
        ("allow@[2001:db8::]/32", "allow@[2001:db8::]/32"),
        ("allow@[2001:db8::/32]:icmpv6", "allow@[2001:db8::]/32:icmpv6"),
        ("allow@API.Example.com.:tcp:443", "allow@api.example.com:tcp:443"),
        ("allow@domain=localhost", "allow@domain=localhost"),
        ("deny@suffix=example.com", "deny@*.example.com"),
        ("deny@*.example.com:udp", "deny@*.example.com:udp"),
        ("allow@0.0.0.0/0", "allow@0.0.0.0/0"),
        (" allow@meta:icmpv4 ", "allow@meta:icmpv4"),
        ("allow@any:tcp:1-65535", "allow@any:tcp:1-65535"),
    ] {
        let rule: Rule = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(rule.to_string(), printed);
        assert_eq!(printed.parse::<Rule>().unwrap(), rule);
        let json = serde_json::to_string(&rule).unwrap();
        assert_eq!(serde_json::from_str::<Rule>(&json).unwrap(), rule);
    }
}

#[test]
fn what_is_wrong_is_told_with_what_to_write() {
    for (text, reason, hint) in [
        ("allow", "no '@'", "write <allow|deny>"),
        ("alow@any", "unknown action 'alow'", "did you mean 'allow'?"),
        ("permit@any", "unknown action", "one of allow, deny"),
        ("allow:ingres@any", "unknown direction", "did you mean 'ingress'?"),
        ("allow:out@any", "unknown direction", "did you mean 'egress'?"),
        ("allow@", "target is empty", "any, a group"),
        ("allow@pubilc", "unknown target 'pubilc'", "did you mean 'public'?"),
        ("allow@metadata", "unknown target", "did you mean 'meta'?"),
        ("allow@localhost", "unknown target", "did you mean 'host'"),
        ("allow@all", "unknown target", "did you mean 'any'?"),
        ("allow@2001:db8::1", "needs brackets", "write [2001:db8::1]"),
        ("allow@[2001:db8::1", "'[' without ']'", "[address]"),
        ("allow@[nonsense]", "not an IPv6 address", "[address]"),
        ("allow@1.2.3.256", "is not an IPv4 address", "0 to 255"),
        ("allow@10.0.0.0/33", "out of range", "0 to 32"),
        ("allow@10.0.0.1/8", "bits beyond its prefix", "did you mean '10.0.0.0/8'?"),
        ("allow@*.com", "top-level domain", "*.example.com"),
        ("allow@suffix=com", "top-level domain", "*.example.com"),
        ("allow@a*.com", "only at the start", "*.example.com"),
        ("allow@any:443", "unknown protocol '443'", "write tcp:443"),
        ("allow@any:tpc", "unknown protocol", "did you mean 'tcp'?"),
        ("allow@any:icmp", "unknown protocol", "'icmpv4' or 'icmpv6'"),
        ("allow@any:icmpv4:8", "has no ports", "leave ':8' out"),
        ("allow@any:tcp:0", "not a port", "1 to 65535"),
        ("allow@any:tcp:65536", "not a port", "1 to 65535"),
        ("allow@any:tcp:90-80", "backwards", "did you mean '80-90'?"),
        ("allow@any:tcp:http", "not a port", "1 to 65535"),
        ("deny:ingress@any:icmpv4", "nothing but tcp and udp", "published ports"),
        ("deny:ingress@example.com", "has no name", "address"),
    ] {
        let error = text.parse::<Rule>().unwrap_err();
        assert!(error.reason.contains(reason), "{text}: {error}");
        assert!(error.hint.contains(hint), "{text}: hint {:?}", error.hint);
    }
}

#[test]
fn lists_are_split_at_commas_and_bounded() {
    assert_eq!(parse_rules("deny@meta, allow@public,").unwrap().len(), 2);
    assert!(parse_rules("").unwrap().is_empty());
    assert!(parse_rules("allow@any:tcp:80,443").unwrap_err().hint.contains("comma begins the next rule"));
    let many = vec!["allow@any"; RULES_COUNT_MAX].join(",");
    assert_eq!(parse_rules(&many).unwrap().len(), RULES_COUNT_MAX);
    assert!(parse_rules(&format!("{many},allow@any")).unwrap_err().reason.contains("more than"));
}

#[test]
fn prefixes_hold_what_they_should() {
    let cidr = |text: &str| match format!("allow@{text}").parse::<Rule>().unwrap().target {
        Target::Cidr(cidr) => cidr,
        other => panic!("{other}"),
    };
    for (prefix, inside, outside) in [
        ("10.0.0.0/8", "10.255.255.255", "11.0.0.0"),
        ("172.16.0.0/12", "172.31.255.255", "172.32.0.0"),
        ("1.2.3.4", "1.2.3.4", "1.2.3.5"),
        ("0.0.0.0/0", "255.255.255.255", "::1"),
        ("[::]/0", "ffff::", "1.2.3.4"),
        ("[fd00::]/8", "fdff::1", "fe00::"),
    ] {
        assert!(cidr(prefix).contains(inside.parse().unwrap()), "{prefix} {inside}");
        assert!(!cidr(prefix).contains(outside.parse().unwrap()), "{prefix} {outside}");
    }
}

proptest::proptest! {
    /// No text makes the parser panic, and whatever it takes it prints and takes again as the same rule.
    #[test]
    fn any_text_is_a_rule_or_an_error(text in "(allow|deny|alow)?(:(in|e)gress)?@?[a-z0-9.:*/=\\[\\]-]{0,24}(:(tcp|udp|icmpv6))?(:[0-9-]{0,6})?") {
        if let Ok(rule) = text.parse::<Rule>() {
            proptest::prop_assert_eq!(rule.to_string().parse::<Rule>().unwrap(), rule);
        }
    }

    #[test]
    fn no_bytes_panic(text in "\\PC{0,64}") {
        let _ = text.parse::<Rule>();
        let _ = parse_rules(&text);
    }
}
