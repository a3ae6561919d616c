//! Any bytes as a query of a guest and as the answers of a name server: each query is answered or left alone, answers fit where they
//! must, nothing waits for ever, and no address outlives what a resolver may remember.
#![no_main]

use std::net::IpAddr;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use msb_network::dns::{Client, Output, Resolver, ResolverConfig};
use msb_network::policy::Policy;
use msb_network::policy::pins::Pins;
use msb_network::random::Random;
use msb_protocol::network::{NetworkProfile, NetworkSpec, Transport};

fuzz_target!(|data: &[u8]| {
    // The query, then the answers, each behind its length (little-endian). A length with its top bit set: honest about who it answers.
    let mut rest = data;
    let mut parts = std::iter::from_fn(|| {
        let (length, left) = rest.split_first_chunk()?;
        let length = u16::from_le_bytes(*length);
        let (bytes, left) = left.split_at(left.len().min((length & 0x7fff).into()));
        rest = left;
        Some((length & 0x8000 != 0, bytes))
    });
    let Some((_, query)) = parts.next() else { return };
    let mut answers = parts.take(16);
    let spec = NetworkSpec { profile: NetworkProfile::Public, ..NetworkSpec::default() };
    let gateway: IpAddr = spec.addresses().gateway_ipv4.into();
    let policy = Policy::new(&spec, vec![gateway]);
    let mut pins = Pins::default();
    let config = ResolverConfig {
        servers: vec!["9.9.9.9:53".parse().expect("an address"), "8.8.8.8:53".parse().expect("an address")],
        timeout: Duration::from_secs(5),
        rebind_protection: true,
        gateway: vec![gateway],
    };
    let mut resolver = Resolver::new(config, Random::new(1, "dns"));
    let client = Client { transport: Transport::Udp, token: 0 };
    let mut now = Duration::ZERO;
    let promised = resolver.query(now, client, gateway, query, &policy, &mut pins);
    let mut answered = 0;
    for _ in 0..64 {
        while let Some(output) = resolver.next_output() {
            match output {
                Output::Answer { bytes, .. } => {
                    answered += 1;
                    assert!(bytes.len() >= 12 && bytes[2] & 0x80 != 0, "an answer is an answer");
                    assert!(bytes.len() <= 4096, "{} bytes in a datagram", bytes.len());
                }
                Output::Ask { query, bytes, .. } => {
                    if let Some((honest, answer)) = answers.next() {
                        let mut answer = answer.to_vec();
                        if honest && answer.len() >= 12 && bytes.len() > 12 {
                            // Its own identity and question, as an answer: past the first checks.
                            answer[..2].copy_from_slice(&bytes[..2]);
                            answer[2] |= 0x80;
                            answer[4..6].copy_from_slice(&[0, 1]);
                            let question_end = question_end(&bytes);
                            answer.splice(12..12, bytes[12..question_end].iter().copied());
                        }
                        resolver.response(now, query, &answer, &policy, &mut pins);
                    }
                }
                _ => {}
            }
        }
        now += Duration::from_secs(1);
        resolver.tick(now);
    }
    assert_eq!(resolver.pending_count(), 0, "a query waits for ever");
    assert_eq!(answered, usize::from(promised), "one answer for each query that was promised one");
});

/// Where the first question of a well-formed query ends.
fn question_end(bytes: &[u8]) -> usize {
    let mut at = 12;
    while at < bytes.len() && bytes[at] != 0 {
        at += 1 + usize::from(bytes[at]);
    }
    (at + 5).min(bytes.len())
}
