//! DNS messages: a guest's bytes become a [`Question`] or a refusal, an answer becomes bytes that fit what the client can take.
//! RFC 1035, EDNS of RFC 6891, negative answers of RFC 2308, extended errors of RFC 8914. Used by the resolver; never does I/O.
//!
//! Nothing here panics on any input, and no input makes it allocate more than a small multiple of its own length.

use std::net::IpAddr;
use std::str::FromStr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::rr::rdata::{A, AAAA, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use msb_protocol::network::DomainName;

/// Longest query in bytes. A real one with every option is a few hundred.
pub const QUERY_LEN_MAX: usize = 4096;
/// UDP payload size that we promise upstream servers, in bytes (DNS flag day 2020).
pub const UPSTREAM_PAYLOAD_BYTES: u16 = 1232;
/// Time in seconds that resolvers may remember a denial: long enough to end a retry loop, short enough to follow a restart.
pub const DENIAL_TTL_SECONDS: u32 = 5;

/// An extended DNS error (RFC 8914, section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtendedError {
    /// 15: the policy of this sandbox denies the name.
    Blocked,
    /// 17: the answer holds addresses that rebinding protection refuses.
    Filtered,
    /// 18: the policy denies the server that was asked.
    Prohibited,
    /// 21: this resolver does not do that.
    NotSupported,
    /// 22: no upstream server answered in time.
    NoReachableAuthority,
    /// 23: there is no upstream server, or too many queries wait.
    NetworkError,
}

impl ExtendedError {
    /// Its number and the text beside it.
    #[must_use]
    pub fn info(self) -> (u16, &'static str) {
        match self {
            Self::Blocked => (15, "denied by the sandbox's network policy"),
            Self::Filtered => (17, "the answer holds private or local addresses (rebinding protection)"),
            Self::Prohibited => (18, "this name server is denied by the sandbox's network policy"),
            Self::NotSupported => (21, "not supported by the sandbox's resolver"),
            Self::NoReachableAuthority => (22, "no upstream name server answered"),
            Self::NetworkError => (23, "no upstream name server can be asked now"),
        }
    }
}

/// What a client asked, with what the answer must echo.
#[derive(Clone, Debug)]
pub struct Question {
    /// The client's id.
    pub id: u16,
    /// The one question.
    pub query: Query,
    /// The name in its one form; none for the root and for names no host has.
    pub name: Option<DomainName>,
    /// Whether the client wants recursion.
    recursion_desired: bool,
    /// Whether the client turned checking off.
    pub checking_disabled: bool,
    /// Whether the client wants DNSSEC records.
    pub dnssec_ok: bool,
    /// The client's UDP payload size; none: no EDNS.
    payload_bytes: Option<u16>,
}

/// Parses a query.
///
/// # Errors
/// The answer to send, or none where silence is the only answer (not even a header, or a response).
pub fn parse_query(bytes: &[u8]) -> Result<Question, Option<Vec<u8>>> {
    // RFC 1035, section 4.1.1: id, flags, four counts.
    let Some(header) = bytes.first_chunk::<12>() else { return Err(None) };
    let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    if header[2] & 0x80 != 0 {
        return Err(None);
    }
    let id = word(0);
    let op_code = OpCode::from_u8((header[2] >> 3) & 0xf);
    let refuse = |code| Err(Message::error_msg(id, op_code, code).to_vec().ok());
    if op_code != OpCode::Query {
        return refuse(ResponseCode::NotImp);
    }
    // One question, no answers, and at most an OPT and a signature beside it.
    if bytes.len() > QUERY_LEN_MAX || word(4) != 1 || word(6) != 0 || word(8) != 0 || word(10) > 2 {
        return refuse(ResponseCode::FormErr);
    }
    let Ok(message) = Message::from_vec(bytes) else { return refuse(ResponseCode::FormErr) };
    let Some(query) = message.queries.into_iter().next() else { return refuse(ResponseCode::FormErr) };
    let edns = message.edns;
    let question = Question {
        id,
        name: name_of(&query.name),
        query,
        recursion_desired: message.metadata.recursion_desired,
        checking_disabled: message.metadata.checking_disabled,
        dnssec_ok: edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok),
        payload_bytes: edns.as_ref().map(Edns::max_payload),
    };
    if edns.is_some_and(|edns| edns.version() != 0) {
        return Err(Some(question.error(ResponseCode::BADVERS, None, Capacity::Udp)));
    }
    if question.query.query_class != DNSClass::IN
        || matches!(question.query.query_type, RecordType::AXFR | RecordType::IXFR | RecordType::ANY)
    {
        return Err(Some(question.error(ResponseCode::Refused, Some(ExtendedError::NotSupported), Capacity::Udp)));
    }
    Ok(question)
}

fn name_of(name: &Name) -> Option<DomainName> {
    // Labels with dots or other bytes in them print escaped and are no names of hosts.
    DomainName::from_str(&name.to_ascii()).ok()
}

/// How long an answer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capacity {
    /// What the client's EDNS says, else 512 bytes; a longer answer is truncated.
    Udp,
    /// Anything a DNS message can be.
    Tcp,
}

impl Question {
    fn response(&self, code: ResponseCode) -> Message {
        let mut message = Message::response(self.id, OpCode::Query);
        message.metadata.response_code = code;
        message.metadata.recursion_desired = self.recursion_desired;
        message.metadata.recursion_available = true;
        message.metadata.checking_disabled = self.checking_disabled;
        message.add_query(self.query.clone());
        message
    }

    /// NXDOMAIN with the SOA that tells how long it may be remembered, so that no resolver goes on to another server.
    #[must_use]
    pub fn denied(&self, why: ExtendedError, capacity: Capacity) -> Vec<u8> {
        let mut message = self.response(ResponseCode::NXDomain);
        message.add_authority(denial_soa(&self.query.name));
        self.encode(message, Some(why), capacity)
    }

    /// An error without records.
    #[must_use]
    pub fn error(&self, code: ResponseCode, why: Option<ExtendedError>, capacity: Capacity) -> Vec<u8> {
        self.encode(self.response(code), why, capacity)
    }

    /// Our own answer: the addresses that fit the question's type, or an empty answer with a SOA.
    #[must_use]
    pub fn own_addresses(&self, addresses: &[IpAddr], ttl_seconds: u32, capacity: Capacity) -> Vec<u8> {
        let mut message = self.response(ResponseCode::NoError);
        for address in addresses {
            let data = match (address, self.query.query_type) {
                (IpAddr::V4(v4), RecordType::A) => RData::A(A(*v4)),
                (IpAddr::V6(v6), RecordType::AAAA) => RData::AAAA(AAAA(*v6)),
                _ => continue,
            };
            message.add_answer(Record::from_rdata(self.query.name.clone(), ttl_seconds, data));
        }
        if message.answers.is_empty() {
            message.add_authority(denial_soa(&self.query.name));
        }
        self.encode(message, None, capacity)
    }

    /// What an upstream server said, with the client's id and without what is between us and that server.
    #[must_use]
    pub fn relay(&self, upstream: &Message, capacity: Capacity) -> Vec<u8> {
        let mut message = self.response(upstream.metadata.response_code);
        message.metadata.authentic_data = upstream.metadata.authentic_data;
        message.add_answers(upstream.answers.iter().cloned());
        message.add_authorities(upstream.authorities.iter().cloned());
        message.add_additionals(upstream.additionals.iter().cloned());
        self.encode(message, None, capacity)
    }

    fn encode(&self, mut message: Message, why: Option<ExtendedError>, capacity: Capacity) -> Vec<u8> {
        if self.payload_bytes.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(UPSTREAM_PAYLOAD_BYTES);
            edns.set_dnssec_ok(self.dnssec_ok);
            edns.set_rcode_high(u16::from(message.metadata.response_code).checked_shr(4).unwrap_or(0) as u8);
            if let Some(why) = why {
                let (code, text) = why.info();
                let mut data = code.to_be_bytes().to_vec();
                data.extend_from_slice(text.as_bytes());
                edns.options_mut().insert(EdnsOption::Unknown(15, data));
            }
            message.set_edns(edns);
        }
        let limit = match capacity {
            Capacity::Udp => usize::from(self.payload_bytes.unwrap_or(512).max(512)),
            Capacity::Tcp => usize::from(u16::MAX),
        };
        match message.to_vec() {
            Ok(bytes) if bytes.len() <= limit => bytes,
            _ => {
                let mut short = message.truncate();
                short.metadata.truncation = capacity == Capacity::Udp;
                short.to_vec().unwrap_or_default()
            }
        }
    }

    /// The query for an upstream server: our own id, our own EDNS, none of the client's options.
    #[must_use]
    pub fn upstream_query(&self, id: u16) -> Vec<u8> {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.metadata.checking_disabled = self.checking_disabled;
        message.add_query(self.query.clone());
        let mut edns = Edns::new();
        edns.set_max_payload(UPSTREAM_PAYLOAD_BYTES);
        edns.set_dnssec_ok(self.dnssec_ok);
        message.set_edns(edns);
        message.to_vec().unwrap_or_default()
    }
}

fn denial_soa(owner: &Name) -> Record {
    let name = |text: &str| Name::from_ascii(text).unwrap_or_else(|_| Name::root());
    let soa = SOA::new(name("msb.internal."), name("denied.msb.internal."), 1, 3600, 600, 86_400, DENIAL_TTL_SECONDS);
    Record::from_rdata(owner.clone(), DENIAL_TTL_SECONDS, RData::SOA(soa))
}

/// Parses what came from an upstream server; `None` unless it answers exactly this query.
#[must_use]
pub fn parse_response(bytes: &[u8], id: u16, question: &Question) -> Option<Message> {
    let header = bytes.first_chunk::<12>()?;
    if u16::from_be_bytes([header[0], header[1]]) != id {
        return None;
    }
    let message = Message::from_vec(bytes).ok()?;
    let echoes = matches!(message.queries.as_slice(), [query] if *query == question.query);
    (message.metadata.message_type == MessageType::Response && echoes).then_some(message)
}

/// Every address in the answer section, with its time to live in seconds.
pub fn addresses(message: &Message) -> impl Iterator<Item = (IpAddr, u32)> {
    message.answers.iter().filter_map(|record| match &record.data {
        RData::A(a) => Some((IpAddr::V4(a.0), record.ttl)),
        RData::AAAA(aaaa) => Some((IpAddr::V6(aaaa.0), record.ttl)),
        _ => None,
    })
}

/// How long an answer may be remembered, in seconds; `None`: not at all (RFC 2181, section 5.2; RFC 2308, section 5).
#[must_use]
pub fn life_seconds(message: &Message) -> Option<u32> {
    match message.metadata.response_code {
        ResponseCode::NoError if !message.answers.is_empty() => message.answers.iter().map(|record| record.ttl).min(),
        ResponseCode::NoError | ResponseCode::NXDomain => {
            message.authorities.iter().find_map(|record| match &record.data {
                RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
                _ => None,
            })
        }
        _ => None,
    }
    .filter(|ttl| *ttl > 0)
}
