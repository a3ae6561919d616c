//! The resolver with a script in place of the upstream servers.

use hickory_proto::op::{Edns, OpCode, Query};
use hickory_proto::rr::rdata::{A, CNAME};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use msb_protocol::network::{NetworkProfile, NetworkSpec, parse_rules};
use proptest::prelude::*;

use super::*;

const GATEWAY: &str = "172.16.0.1";

struct Bench {
    resolver: Resolver,
    policy: Policy,
    pins: Pins,
}

fn bench(profile: NetworkProfile, rules: &str, servers: usize) -> Bench {
    let gateway: IpAddr = GATEWAY.parse().unwrap();
    let spec = NetworkSpec { profile, rules: parse_rules(rules).unwrap(), ..NetworkSpec::default() };
    let config = ResolverConfig {
        servers: (0..servers).map(|n| SocketAddr::from(([9, 9, 9, n as u8 + 1], 53))).collect(),
        timeout: Duration::from_secs(5),
        rebind_protection: true,
        gateway: vec![gateway],
    };
    Bench {
        resolver: Resolver::new(config, Random::new(7, "dns")),
        policy: Policy::new(&spec, vec![gateway]),
        pins: Pins::default(),
    }
}

const UDP: Client = Client { transport: Transport::Udp, token: 1 };
const TCP: Client = Client { transport: Transport::Tcp, token: 2 };

fn query(name: &str, record_type: RecordType, payload: Option<u16>) -> Vec<u8> {
    let mut message = Message::new(0x1234, hickory_proto::op::MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), record_type));
    if let Some(payload) = payload {
        let mut edns = Edns::new();
        edns.set_max_payload(payload);
        message.set_edns(edns);
    }
    message.to_vec().unwrap()
}

impl Bench {
    fn query_as(&mut self, now: Duration, client: Client, asked: &str, bytes: &[u8]) -> Vec<Output> {
        self.resolver.query(now, client, asked.parse().unwrap(), bytes, &self.policy, &mut self.pins);
        self.outputs()
    }

    fn query(&mut self, now: Duration, name: &str) -> Vec<Output> {
        self.query_as(now, UDP, GATEWAY, &query(name, RecordType::A, Some(1232)))
    }

    /// Answers the last [`Output::Ask`] with records.
    fn reply(&mut self, now: Duration, asked: &[Output], edit: impl FnOnce(&mut Message)) -> Vec<Output> {
        let (id, bytes) = asked
            .iter()
            .rev()
            .find_map(|output| match output {
                Output::Ask { query, bytes, .. } => Some((*query, bytes.clone())),
                _ => None,
            })
            .expect("a server is asked");
        let mut message = Message::from_vec(&bytes).unwrap();
        message.metadata.message_type = hickory_proto::op::MessageType::Response;
        message.edns = None;
        edit(&mut message);
        self.resolver.response(now, id, &message.to_vec().unwrap(), &self.policy, &mut self.pins);
        self.outputs()
    }

    fn outputs(&mut self) -> Vec<Output> {
        std::iter::from_fn(|| self.resolver.next_output()).collect()
    }
}

fn address(ttl: u32, text: &'static str) -> impl FnOnce(&mut Message) {
    move |message| {
        let name = message.queries[0].name.clone();
        message.add_answer(Record::from_rdata(name, ttl, RData::A(A(text.parse().unwrap()))));
    }
}

fn answer(outputs: &[Output]) -> Message {
    let bytes = outputs.iter().find_map(|output| match output {
        Output::Answer { bytes, .. } => Some(bytes),
        _ => None,
    });
    let message = Message::from_vec(bytes.expect("an answer")).unwrap();
    assert_eq!(message.metadata.id, 0x1234);
    message
}

fn outcome(outputs: &[Output]) -> Option<Outcome> {
    outputs.iter().find_map(|output| match output {
        Output::Decided(decision) => Some(decision.outcome),
        _ => None,
    })
}

fn asked(outputs: &[Output]) -> Vec<(String, Transport)> {
    let ask = |output: &Output| match output {
        Output::Ask { server, transport, .. } => Some((server.ip().to_string(), *transport)),
        _ => None,
    };
    outputs.iter().filter_map(ask).collect()
}

/// The extended error of an answer: its number.
fn extended_error(message: &Message) -> Option<u16> {
    use hickory_proto::rr::rdata::opt::{EdnsCode, EdnsOption};
    match message.edns.as_ref()?.option(EdnsCode::from(15))? {
        EdnsOption::Unknown(15, data) => Some(u16::from_be_bytes([data[0], data[1]])),
        _ => None,
    }
}

const ZERO: Duration = Duration::ZERO;
const SECOND: Duration = Duration::from_secs(1);

#[test]
fn an_answer_is_relayed_pinned_and_cached_until_its_time() {
    let mut bench = bench(NetworkProfile::Public, "", 1);
    let ask = bench.query(ZERO, "www.Example.com.");
    assert_eq!(asked(&ask), [("9.9.9.1".into(), Transport::Udp)]);
    let outputs = bench.reply(ZERO, &ask, address(100, "1.2.3.4"));
    let message = answer(&outputs);
    assert_eq!(message.queries[0].name.to_ascii(), "www.Example.com.", "the case of the question comes back");
    assert_eq!((message.answers.len(), message.metadata.recursion_available), (1, true));
    assert_eq!(outcome(&outputs), Some(Outcome::Answered));
    let pinned: Vec<_> = bench.pins.names_of(ZERO, "1.2.3.4".parse().unwrap()).map(ToString::to_string).collect();
    assert_eq!(pinned, ["www.example.com"]);

    let again = bench.query(40 * SECOND, "WWW.example.com.");
    assert_eq!((outcome(&again), answer(&again).answers[0].ttl), (Some(Outcome::Cached), 60));
    assert!(asked(&again).is_empty());
    assert_eq!(
        asked(&bench.query(100 * SECOND, "www.example.com.")).len(),
        1,
        "at its end the answer is asked for again"
    );
}

#[test]
fn a_denied_name_is_nxdomain_for_every_type_with_soa_and_extended_error() {
    let mut bench = bench(NetworkProfile::Public, "deny@*.bad.example", 1);
    for record_type in [RecordType::A, RecordType::AAAA, RecordType::TXT, RecordType::HTTPS, RecordType::SRV] {
        for client in [UDP, TCP] {
            let outputs = bench.query_as(ZERO, client, GATEWAY, &query("x.bad.example.", record_type, Some(1232)));
            let message = answer(&outputs);
            assert_eq!(message.metadata.response_code, ResponseCode::NXDomain);
            assert!(
                matches!(&message.authorities[0].data, RData::SOA(soa) if soa.minimum == message::DENIAL_TTL_SECONDS)
            );
            assert_eq!((extended_error(&message), outcome(&outputs)), (Some(15), Some(Outcome::Denied)));
        }
    }
    // Without EDNS there is no room for the extended error.
    let outputs = bench.query_as(ZERO, UDP, GATEWAY, &query("x.bad.example.", RecordType::A, None));
    assert!(answer(&outputs).edns.is_none());
    // A server that policy denies answers nothing but NXDOMAIN; one that it allows is answered by us.
    let question = query("good.example.", RecordType::A, Some(1232));
    let outputs = bench.query_as(ZERO, UDP, "10.0.0.53", &question);
    assert_eq!(
        (answer(&outputs).metadata.response_code, extended_error(&answer(&outputs))),
        (ResponseCode::NXDomain, Some(18))
    );
    assert_eq!(outcome(&outputs), Some(Outcome::ServerDenied));
    assert_eq!(asked(&bench.query_as(ZERO, UDP, "1.2.3.4", &question)), [("9.9.9.1".into(), Transport::Udp)]);
}

#[test]
fn answers_with_private_addresses_are_refused_unless_that_is_off() {
    for text in ["10.0.0.1", "127.0.0.1", "0.0.0.0", "169.254.169.254", "172.16.0.1"] {
        let mut bench = bench(NetworkProfile::Public, "", 1);
        let ask = bench.query(ZERO, "rebind.example.");
        let outputs = bench.reply(ZERO, &ask, address(60, text));
        assert_eq!(
            (answer(&outputs).metadata.response_code, outcome(&outputs)),
            (ResponseCode::NXDomain, Some(Outcome::Rebinding)),
            "{text}"
        );
        assert_eq!(extended_error(&answer(&outputs)), Some(17));
        assert!(bench.pins.is_empty());
        bench.resolver.config.rebind_protection = false;
        let ask = bench.query(ZERO, "rebind.example.");
        assert_eq!(answer(&bench.reply(ZERO, &ask, address(60, text))).answers.len(), 1);
    }
}

#[test]
fn a_silent_or_failing_server_is_followed_by_the_next_and_asked_last_for_a_while() {
    let mut bench = bench(NetworkProfile::Public, "", 2);
    bench.query(ZERO, "a.example.");
    assert_eq!(bench.resolver.deadline(), Some(TRY_TIMEOUT));
    bench.resolver.tick(TRY_TIMEOUT - Duration::from_millis(1));
    assert!(bench.outputs().is_empty(), "one step before its time is up");
    bench.resolver.tick(TRY_TIMEOUT);
    let second = bench.outputs();
    assert_eq!(asked(&second), [("9.9.9.2".into(), Transport::Udp)]);
    let outputs = bench.reply(TRY_TIMEOUT, &second, address(60, "1.2.3.4"));
    assert_eq!(outcome(&outputs), Some(Outcome::Answered));
    // The penalty begins when the try ended.
    let until = TRY_TIMEOUT + SILENT_SERVER_PENALTY;
    assert_eq!(asked(&bench.query(until - SECOND, "b.example."))[0].0, "9.9.9.2");
    assert_eq!(asked(&bench.query(until, "c.example."))[0].0, "9.9.9.1");
}

#[test]
fn an_error_of_one_server_is_passed_on_only_when_nobody_has_better() {
    let mut bench = bench(NetworkProfile::Public, "", 2);
    let refuse = |message: &mut Message| message.metadata.response_code = ResponseCode::Refused;
    let ask = bench.query(ZERO, "a.example.");
    let ask = bench.reply(ZERO, &ask, refuse);
    assert_eq!(asked(&ask)[0].0, "9.9.9.2");
    let outputs = bench.reply(ZERO, &ask, address(60, "1.2.3.4"));
    assert_eq!(answer(&outputs).metadata.response_code, ResponseCode::NoError);

    let mut outputs = bench.query(ZERO, "b.example.");
    let mut tries = 0;
    while !asked(&outputs).is_empty() {
        tries += 1;
        outputs = bench.reply(ZERO, &outputs, refuse);
    }
    assert_eq!((tries, answer(&outputs).metadata.response_code), (4, ResponseCode::Refused));
    assert_eq!(bench.resolver.pending_count(), 0);
}

#[test]
fn silence_of_all_servers_ends_in_servfail_within_the_time() {
    let mut bench = bench(NetworkProfile::Public, "", 3);
    bench.query(ZERO, "a.example.");
    let mut now = ZERO;
    let outputs = loop {
        now = bench.resolver.deadline().expect("a deadline while a query waits").max(now);
        assert!(now <= 5 * SECOND);
        bench.resolver.tick(now);
        let outputs = bench.outputs();
        if asked(&outputs).is_empty() {
            break outputs;
        }
    };
    assert_eq!(
        (answer(&outputs).metadata.response_code, extended_error(&answer(&outputs))),
        (ResponseCode::ServFail, Some(22))
    );
    assert_eq!((now, bench.resolver.deadline()), (5 * SECOND, None));
    let mut none = self::bench(NetworkProfile::Public, "", 0);
    let outputs = none.query(ZERO, "a.example.");
    assert_eq!(
        (answer(&outputs).metadata.response_code, extended_error(&answer(&outputs))),
        (ResponseCode::ServFail, Some(23))
    );
}

#[test]
fn a_truncated_answer_is_asked_for_over_tcp_and_a_long_one_truncated_for_udp() {
    let mut bench = bench(NetworkProfile::Public, "", 1);
    let ask = bench.query(ZERO, "long.example.");
    let ask = bench.reply(ZERO, &ask, |message| message.metadata.truncation = true);
    assert_eq!(asked(&ask), [("9.9.9.1".into(), Transport::Tcp)]);
    let long = |message: &mut Message| {
        let name = message.queries[0].name.clone();
        for n in 0..200u32 {
            message.add_answer(Record::from_rdata(
                name.clone(),
                60,
                RData::A(A(std::net::Ipv4Addr::from_bits(0x0102_0000 + n))),
            ));
        }
    };
    let outputs = bench.reply(ZERO, &ask, long);
    let message = answer(&outputs);
    assert!(message.metadata.truncation && message.answers.is_empty());
    // The same from the cache over TCP is whole, and over UDP with room for it too.
    let question = |payload| query("long.example.", RecordType::A, Some(payload));
    assert_eq!(answer(&bench.query_as(ZERO, TCP, GATEWAY, &question(512))).answers.len(), 200);
    let whole = answer(&bench.query_as(ZERO, UDP, GATEWAY, &question(65_000)));
    assert_eq!((whole.answers.len(), whole.metadata.truncation), (200, false));
    let len = whole.to_vec().unwrap().len() as u16;
    assert!(!answer(&bench.query_as(ZERO, UDP, GATEWAY, &question(len))).metadata.truncation);
    assert!(answer(&bench.query_as(ZERO, UDP, GATEWAY, &question(len - 1))).metadata.truncation);
}

#[test]
fn the_host_has_a_name_and_its_zone_is_ours() {
    let mut bench = bench(NetworkProfile::None, "", 1);
    let outputs = bench.query(ZERO, "host.msb.internal.");
    assert!(matches!(&answer(&outputs).answers[0].data, RData::A(a) if a.0.to_string() == GATEWAY));
    let outputs = bench.query_as(ZERO, UDP, GATEWAY, &query("host.msb.internal.", RecordType::AAAA, None));
    assert_eq!((answer(&outputs).metadata.response_code, answer(&outputs).answers.len()), (ResponseCode::NoError, 0));
    assert_eq!(answer(&bench.query(ZERO, "other.msb.internal.")).metadata.response_code, ResponseCode::NXDomain);
}

#[test]
fn a_response_must_answer_this_very_query() {
    let mut bench = bench(NetworkProfile::Public, "", 1);
    let ask = bench.query(ZERO, "a.example.");
    let wrong_id = |message: &mut Message| message.metadata.id ^= 1;
    assert!(bench.reply(ZERO, &ask, wrong_id).is_empty());
    let other = |message: &mut Message| message.queries[0].name = Name::from_ascii("b.example.").unwrap();
    assert!(bench.reply(ZERO, &ask, other).is_empty());
    let query_again = |message: &mut Message| message.metadata.message_type = hickory_proto::op::MessageType::Query;
    assert!(bench.reply(ZERO, &ask, query_again).is_empty());
    assert_eq!(outcome(&bench.reply(ZERO, &ask, address(60, "1.2.3.4"))), Some(Outcome::Answered));
}

#[test]
fn an_alias_pins_the_name_that_was_asked_for() {
    let mut bench = bench(NetworkProfile::None, "allow@api.example", 1);
    let ask = bench.query(ZERO, "api.example.");
    bench.reply(ZERO, &ask, |message| {
        let cdn = Name::from_ascii("edge.cdn.example.").unwrap();
        let name = message.queries[0].name.clone();
        message.add_answer(Record::from_rdata(name, 60, RData::CNAME(CNAME(cdn.clone()))));
        message.add_answer(Record::from_rdata(cdn, 60, RData::A(A("1.2.3.4".parse().unwrap()))));
    });
    let pinned: Vec<_> = bench.pins.names_of(ZERO, "1.2.3.4".parse().unwrap()).map(ToString::to_string).collect();
    assert_eq!(pinned, ["api.example"]);
}

#[test]
fn what_waits_is_bounded_on_both_sides_of_the_limit() {
    let mut bench = bench(NetworkProfile::Public, "", 1);
    for n in 0..PENDING_COUNT_MAX {
        assert_eq!(asked(&bench.query(ZERO, &format!("n{n}.example."))).len(), 1);
    }
    let outputs = bench.query(ZERO, "one-more.example.");
    assert_eq!(
        (answer(&outputs).metadata.response_code, extended_error(&answer(&outputs))),
        (ResponseCode::ServFail, Some(23))
    );
    assert_eq!(bench.resolver.pending_count(), PENDING_COUNT_MAX);
}

#[test]
fn the_cache_is_bounded() {
    let mut bench = bench(NetworkProfile::Public, "", 1);
    for n in 0..3 * cache::ANSWERS_COUNT_MAX {
        let now = Duration::from_millis(n as u64);
        let ask = bench.query(now, &format!("n{n}.example."));
        bench.reply(now, &ask, address(3600, "1.2.3.4"));
        assert!(bench.resolver.cache.len() <= cache::ANSWERS_COUNT_MAX);
    }
    assert!(bench.resolver.cache.len() > cache::ANSWERS_COUNT_MAX / 4);
}

#[test]
fn malformed_queries_get_their_own_answers() {
    let mut bench = bench(NetworkProfile::Public, "", 1);
    let good = query("a.example.", RecordType::A, None);
    let code = |bench: &mut Bench, bytes: &[u8]| {
        let outputs = bench.query_as(ZERO, UDP, GATEWAY, bytes);
        (!outputs.is_empty()).then(|| answer(&outputs).metadata.response_code)
    };
    assert_eq!(code(&mut bench, &good[..11]), None);
    assert_eq!(code(&mut bench, &good[..12]), Some(ResponseCode::FormErr));
    let mut response = good.clone();
    response[2] |= 0x80;
    assert_eq!(code(&mut bench, &response), None);
    let mut update = good.clone();
    update[2] |= 5 << 3;
    assert_eq!(code(&mut bench, &update), Some(ResponseCode::NotImp));
    let mut two = good.clone();
    two[5] = 2;
    assert_eq!(code(&mut bench, &two), Some(ResponseCode::FormErr));
    let mut lying = good.clone();
    lying[12] = 0x3f;
    assert_eq!(code(&mut bench, &lying), Some(ResponseCode::FormErr));
    let mut looped = good.clone();
    looped[12] = 0xc0;
    looped[13] = 12;
    assert_eq!(code(&mut bench, &looped), Some(ResponseCode::FormErr));
    assert_eq!(code(&mut bench, &query("a.example.", RecordType::AXFR, None)), Some(ResponseCode::Refused));
    assert_eq!(code(&mut bench, &query(".", RecordType::NS, None)), Some(ResponseCode::Refused));
    let mut long = good.clone();
    long.resize(message::QUERY_LEN_MAX + 1, 0);
    assert_eq!(code(&mut bench, &long), Some(ResponseCode::FormErr));
}

proptest! {
    /// Neither queries nor responses of any bytes panic, and every query that has a header and is a query gets one answer or one
    /// question to a server.
    #[test]
    fn no_bytes_break_the_resolver(
        flips in prop::collection::vec((0usize..64, any::<u8>()), 0..8),
        tail in prop::collection::vec(any::<u8>(), 0..64),
        cut in 0usize..80,
    ) {
        let mut bench = bench(NetworkProfile::Public, "", 1);
        let mut bytes = query("www.example.com.", RecordType::A, Some(1232));
        bytes.extend(tail);
        for (at, value) in &flips {
            let at = at % bytes.len();
            bytes[at] ^= value;
        }
        bytes.truncate(cut.max(1));
        let outputs = bench.query_as(ZERO, UDP, GATEWAY, &bytes);
        let ends = outputs.iter().filter(|output| matches!(output, Output::Answer { .. } | Output::Ask { .. })).count();
        prop_assert!(ends <= 1);

        let ask = bench.query(ZERO, "b.example.");
        if let Some(Output::Ask { query, bytes: asked, .. }) = ask.last() {
            let mut reply = asked.clone();
            reply[2] |= 0x80;
            for (at, value) in flips {
                let at = 2 + at % (reply.len() - 2);
                reply[at] ^= value;
            }
            bench.resolver.response(ZERO, *query, &reply, &bench.policy, &mut bench.pins);
        }
    }
}
