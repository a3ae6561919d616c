//! Decisions of whole policies, case by case.

use super::explain::Question;
use super::*;

fn spec(profile: NetworkProfile, rules: &str) -> NetworkSpec {
    NetworkSpec { profile, rules: msb_protocol::network::parse_rules(rules).unwrap(), ..NetworkSpec::default() }
}

fn policy(profile: NetworkProfile, rules: &str) -> Policy {
    Policy::new(&spec(profile, rules), vec!["172.16.0.1".parse().unwrap(), "fd42:6d73:62::1".parse().unwrap()])
}

fn attempt(text: &str) -> Attempt {
    let (direction, text) =
        text.strip_prefix("in ").map_or((Direction::Egress, text), |rest| (Direction::Ingress, rest));
    let Question { place: explain::Place::Address(address), transport, port } = text.parse().unwrap() else {
        panic!("{text}")
    };
    Attempt { direction, address, transport, port }
}

#[track_caller]
fn check(policy: &Policy, pins: &Pins, cases: &[(&str, Action, &str)]) {
    for (text, action, decider) in cases {
        let decision = policy.decide(Duration::ZERO, &attempt(text), pins);
        assert_eq!((decision.action, policy.decider_text(decision.decider).as_str()), (*action, *decider), "{text}");
    }
}

use Action::{Allow, Deny};

#[test]
fn the_default_lets_dns_and_public_addresses_out_and_nothing_else() {
    let policy = policy(NetworkProfile::Public, "");
    check(
        &policy,
        &Pins::default(),
        &[
            ("1.2.3.4:443", Allow, "allow@public"),
            ("[2606:4700::5]:80", Allow, "allow@public"),
            ("udp://1.2.3.4:123", Allow, "allow@public"),
            ("icmp://1.2.3.4", Allow, "allow@public"),
            ("udp://172.16.0.1:53", Allow, "allow@host:udp:53"),
            ("172.16.0.1:53", Allow, "allow@host:tcp:53"),
            ("172.16.0.1:80", Deny, "default"),
            ("10.0.0.1:80", Deny, "default"),
            ("169.254.169.254:80", Deny, "default"),
            ("[::ffff:169.254.169.254]:80", Deny, "default"),
            ("[64:ff9b::a9fe:a9fe]:80", Deny, "default"),
            ("[fd00:ec2::254]:80", Deny, "default"),
            ("168.63.129.16:80", Deny, "default"),
            ("0.0.0.0:80", Deny, "default"),
            ("[::]:80", Deny, "default"),
            ("127.0.0.1:80", Deny, "default"),
            ("224.0.0.251:80", Deny, "default"),
            ("1.2.3.4:853", Deny, "encrypted-dns"),
            ("8.8.8.8:443", Deny, "encrypted-dns"),
            ("[::ffff:8.8.8.8]:443", Deny, "encrypted-dns"),
            ("udp://1.1.1.1:443", Deny, "encrypted-dns"),
            ("in 10.0.0.1:80", Allow, "default"),
        ],
    );
}

#[test]
fn profiles_reach_what_they_say() {
    let reaches = |profile| -> Vec<bool> {
        let policy = policy(profile, "");
        [
            "1.2.3.4:80",
            "10.0.0.1:80",
            "172.16.0.1:80",
            "169.254.169.254:80",
            "127.0.0.1:80",
            "1.2.3.4:853",
            "in 1.2.3.4:80",
        ]
        .iter()
        .map(|text| policy.decide(Duration::ZERO, &attempt(text), &Pins::default()).is_allowed())
        .collect()
    };
    assert_eq!(reaches(NetworkProfile::Public), [true, false, false, false, false, false, true]);
    assert_eq!(reaches(NetworkProfile::Private), [true, true, false, false, false, false, true]);
    assert_eq!(reaches(NetworkProfile::Host), [true, false, true, false, false, false, true]);
    assert_eq!(reaches(NetworkProfile::All), [true; 7]);
    assert_eq!(reaches(NetworkProfile::None), [false; 7]);
}

#[test]
fn the_first_match_wins_and_deny_sees_the_range_and_the_translation() {
    let policy =
        policy(NetworkProfile::All, "allow@10.1.0.0/16:tcp:80-90,deny@private,deny@1.2.0.0/16,deny:ingress@public");
    check(
        &policy,
        &Pins::default(),
        &[
            ("10.1.2.3:80", Allow, "allow@10.1.0.0/16:tcp:80-90"),
            ("10.1.2.3:91", Deny, "deny@private"),
            ("udp://10.1.2.3:80", Deny, "deny@private"),
            // Inside private: the gateway (host), Alibaba's and AWS's metadata services.
            ("172.16.0.1:80", Deny, "deny@private"),
            ("100.100.100.200:80", Deny, "deny@private"),
            ("[fd00:ec2::254]:80", Deny, "deny@private"),
            ("[64:ff9b::102:304]:80", Deny, "deny@1.2.0.0/16"),
            ("[2002:102:304::]:80", Deny, "deny@1.2.0.0/16"),
            ("in 9.9.9.9:80", Deny, "deny:ingress@public"),
            ("in 10.0.0.1:80", Allow, "default"),
        ],
    );
    // An allow rule takes neither the range nor the translation.
    let policy = self::policy(NetworkProfile::None, "allow@link-local,allow@private,allow@1.2.0.0/16");
    check(
        &policy,
        &Pins::default(),
        &[
            ("169.254.1.1:80", Allow, "allow@link-local"),
            ("169.254.169.254:80", Deny, "default"),
            ("100.100.100.200:80", Deny, "default"),
            ("172.16.0.1:80", Deny, "default"),
            ("[64:ff9b::102:304]:80", Deny, "default"),
            ("[64:ff9b::a00:1]:80", Allow, "allow@private"),
        ],
    );
}

#[test]
fn name_rules_open_only_what_the_name_led_to() {
    let policy = policy(NetworkProfile::None, "allow@api.example.com:tcp:443,allow@*.example.org,deny@any");
    let mut pins = Pins::default();
    let ttl = Duration::from_secs(60);
    let mut pin =
        |name: &str, address: &str| pins.insert(Duration::ZERO, &name.parse().unwrap(), address.parse().unwrap(), ttl);
    pin("api.example.com", "1.2.3.4");
    pin("evil.example.com", "1.2.3.5");
    pin("a.b.example.org", "1.2.3.6");
    pin("example.org", "2606:4700::7");
    pin("api.example.com", "169.254.169.254");
    pin("api.example.com", "127.0.0.1");
    pin("api.example.com", "172.16.0.1");
    check(
        &policy,
        &pins,
        &[
            ("1.2.3.4:443", Allow, "allow@api.example.com:tcp:443"),
            ("1.2.3.4:80", Deny, "deny@any"),
            ("1.2.3.5:443", Deny, "deny@any"),
            ("1.2.3.6:80", Allow, "allow@*.example.org"),
            ("[2606:4700::7]:80", Allow, "allow@*.example.org"),
            ("1.2.3.9:443", Deny, "deny@any"),
            // Whatever the name led to, these are never opened by a name.
            ("169.254.169.254:443", Deny, "deny@any"),
            ("127.0.0.1:443", Deny, "deny@any"),
            ("172.16.0.1:443", Deny, "deny@any"),
        ],
    );
    let late = policy.decide(Duration::from_secs(61), &attempt("1.2.3.4:443"), &pins);
    assert_eq!(late.action, Deny);
}

#[test]
fn names_are_judged_by_name_rules_any_and_host() {
    for (profile, rules, name, action, decider) in [
        (NetworkProfile::Public, "", "example.com", Allow, "allow@host:udp:53"),
        (NetworkProfile::Public, "deny@*.example.com", "www.example.com", Deny, "deny@*.example.com"),
        (NetworkProfile::Public, "deny@example.com:tcp:80", "example.com", Deny, "deny@example.com:tcp:80"),
        (NetworkProfile::Public, "deny@example.com", "www.example.com", Allow, "allow@host:udp:53"),
        (NetworkProfile::Public, "", "dns.google", Deny, "encrypted-dns"),
        (NetworkProfile::All, "", "dns.google", Allow, "default"),
        (NetworkProfile::None, "allow@example.com", "example.com", Allow, "allow@example.com"),
        (NetworkProfile::None, "allow@example.com", "example.net", Deny, "default"),
        (NetworkProfile::None, "allow@any:udp:53", "example.net", Allow, "allow@any:udp:53"),
        (NetworkProfile::None, "allow@any:tcp:53", "example.net", Deny, "default"),
        (NetworkProfile::None, "allow@public", "example.net", Deny, "default"),
        (NetworkProfile::All, "deny@0.0.0.0/0", "example.net", Allow, "default"),
        (NetworkProfile::All, "deny:ingress@any", "example.net", Allow, "default"),
    ] {
        let policy = policy(profile, rules);
        let decision = policy.decide_name(&name.parse().unwrap(), Transport::Udp);
        assert_eq!(
            (decision.action, policy.decider_text(decision.decider).as_str()),
            (action, decider),
            "{rules} {name}"
        );
    }
}

#[test]
fn explain_names_each_step_and_the_rule() {
    let policy = policy(NetworkProfile::Public, "deny@*.ads.example,allow@10.0.0.5:tcp:5432");
    let explain = |text: &str| {
        let explanation = policy.explain(Duration::ZERO, &text.parse().unwrap(), &Pins::default());
        let steps: Vec<_> =
            explanation.steps.iter().map(|step| format!("{} {}: {}", step.action, step.about, step.because)).collect();
        (explanation.action, steps.join("; "))
    };
    assert_eq!(
        explain("https://x.example:443/path?q"),
        (
            Allow,
            "allow dns x.example: rule 1 of its profile, allow@host:udp:53; \
             allow tcp x.example:443 at a public address: rule 3 of its profile, allow@public"
                .into()
        )
    );
    assert_eq!(
        explain("http://a.ads.example"),
        (Deny, "deny dns a.ads.example: rule 1 of the sandbox, deny@*.ads.example".into())
    );
    assert_eq!(
        explain("169.254.169.254:80"),
        (Deny, "deny tcp 169.254.169.254:80 (meta in link-local): no rule matches, so the default decides".into())
    );
    assert_eq!(
        explain("10.0.0.5:5432"),
        (Allow, "allow tcp 10.0.0.5:5432 (private): rule 2 of the sandbox, allow@10.0.0.5:tcp:5432".into())
    );
    assert_eq!(explain("icmp://[2606:4700::1]").0, Allow);
    for text in ["example.com", "ftp://example.com", "http://a b", "1.2.3.4:0", "[::1:80"] {
        assert!(text.parse::<Question>().is_err(), "{text}");
    }
}
