//! The resolver of a sandbox: every query of the guest to port 53 ends here, whatever server it was meant for. Pure: the stack gives
//! it messages and the time and does what it asks for ([`Output`]); it never opens a socket.
//!
//! ```text
//!  query ─► parse ─► server denied? ─► ours? ─► name denied? ─► cached? ─► ask upstream ──► answer ─► rebinding? ─► pin, cache, relay
//!            │           │              │           │              │        │    ▲             │          │
//!         FORMERR     NXDOMAIN     A/AAAA of the  NXDOMAIN       relay      │    └ next server │       NXDOMAIN
//!         NOTIMP      + EDE 18     host, else     + EDE 15                  │      on silence, │       + EDE 17
//!                                  NXDOMAIN                                 │      SERVFAIL,   │
//!                                                                           │      REFUSED     └ truncated: same server, TCP
//!                                                                           └ time is up: SERVFAIL + EDE 22
//! ```
//!
//! Each NXDOMAIN of ours has a SOA and, for clients with EDNS, an extended error. An upstream server that stays silent is tried last
//! for half a minute. Each try has its own socket and a fresh id, so that an off-path liar must guess a port and an id.

pub mod cache;
pub mod message;

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use msb_protocol::network::{Action, DomainName, Transport};

use self::cache::Cache;
use self::message::{Capacity, ExtendedError, Question, addresses, parse_query, parse_response};
use crate::policy::class::AddressClass;
use crate::policy::pins::Pins;
use crate::policy::{Attempt, Decider, Policy};
use crate::random::Random;

/// Queries that may wait for upstream servers at once.
pub const PENDING_COUNT_MAX: usize = 128;
/// Time that one server has before the next is asked.
pub const TRY_TIMEOUT: Duration = Duration::from_millis(1_000);
/// Time for which a silent server is asked last.
pub const SILENT_SERVER_PENALTY: Duration = Duration::from_secs(30);
/// Time to live of our own names in seconds.
const OWN_TTL_SECONDS: u32 = 60;
/// The host's name.
pub const HOST_NAME: &str = "host.msb.internal";
const OWN_ZONE: &str = "msb.internal";

/// Who asked; made and understood by the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    /// Over what.
    pub transport: Transport,
    /// The stack's own number.
    pub token: u64,
}

impl Client {
    fn capacity(self) -> Capacity {
        if self.transport == Transport::Tcp { Capacity::Tcp } else { Capacity::Udp }
    }
}

/// One query that waits for upstream servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueryId(pub u64);

/// What the stack must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Give this to the client.
    Answer {
        /// Who asked.
        client: Client,
        /// The message, without the length that TCP puts before it.
        bytes: Vec<u8>,
    },
    /// Send this from a new socket; it replaces what was open for the query.
    Ask {
        /// The query.
        query: QueryId,
        /// The server.
        server: SocketAddr,
        /// UDP, or TCP after a truncated answer.
        transport: Transport,
        /// The message, without the length that TCP puts before it.
        bytes: Vec<u8>,
    },
    /// Close what is open for the query.
    Finished {
        /// The query.
        query: QueryId,
    },
    /// Write this to the decision log.
    Decided(NameDecision),
}

/// A decision about a name, for the decision log and the counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameDecision {
    /// The name; empty for what is no host's name.
    pub name: String,
    /// The type of the question.
    pub record_type: String,
    /// How it ended.
    pub outcome: Outcome,
    /// What decided, where a rule or default did.
    pub decider: Option<Decider>,
    /// The address that gave offence: the server that is denied, the answer that is refused.
    pub address: Option<IpAddr>,
}

/// How a query ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    /// An upstream server's answer was passed on.
    Answered,
    /// An answer was remembered.
    Cached,
    /// Our own name.
    Own,
    /// The policy denied the name.
    Denied,
    /// The policy denied the server that was asked.
    ServerDenied,
    /// Rebinding protection refused the answer.
    Rebinding,
    /// No server answered in time.
    Failed,
    /// The query was malformed or of a kind we refuse.
    Refused,
}

impl Outcome {
    /// The word of the metric's attribute and of the decision log.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Cached => "cached",
            Self::Own => "own",
            Self::Denied => "denied",
            Self::ServerDenied => "server_denied",
            Self::Rebinding => "rebinding",
            Self::Failed => "failed",
            Self::Refused => "refused",
        }
    }
}

#[derive(Debug)]
struct Pending {
    question: Question,
    client: Client,
    /// Index of the server that is being asked.
    server: usize,
    /// Servers asked so far, and so the number of tries.
    tries: usize,
    id: u16,
    transport: Transport,
    try_ends: Duration,
    ends: Duration,
    /// The best error so far: passed on when nobody has an answer.
    refusal: Option<Message>,
}

#[derive(Debug)]
struct Server {
    address: SocketAddr,
    silent_until: Duration,
}

/// What a resolver is made of.
#[derive(Clone, Debug)]
pub struct ResolverConfig {
    /// Upstream servers in order of preference.
    pub servers: Vec<SocketAddr>,
    /// Time for one query with all its tries.
    pub timeout: Duration,
    /// Whether answers with addresses that are not public are refused.
    pub rebind_protection: bool,
    /// What [`HOST_NAME`] stands for, and what the guest may ask: the gateway's addresses.
    pub gateway: Vec<IpAddr>,
}

/// The resolver of one sandbox.
#[derive(Debug)]
pub struct Resolver {
    config: ResolverConfig,
    servers: Vec<Server>,
    cache: Cache,
    pending: HashMap<QueryId, Pending>,
    next_query: u64,
    random: Random,
    outputs: VecDeque<Output>,
    host_name: Option<DomainName>,
    own_zone: Option<DomainName>,
}

impl Resolver {
    /// A resolver with an empty cache.
    #[must_use]
    pub fn new(config: ResolverConfig, random: Random) -> Self {
        Self {
            servers: config
                .servers
                .iter()
                .map(|address| Server { address: *address, silent_until: Duration::ZERO })
                .collect(),
            config,
            cache: Cache::default(),
            pending: HashMap::new(),
            next_query: 0,
            random,
            outputs: VecDeque::new(),
            host_name: HOST_NAME.parse().ok(),
            own_zone: OWN_ZONE.parse().ok(),
        }
    }

    /// Takes what is to be done next.
    pub fn next_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Resolver::tick`] must be called.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        self.pending.values().map(|pending| pending.try_ends.min(pending.ends)).min()
    }

    /// Queries that wait for upstream servers.
    #[must_use]
    pub fn pending_count(&self) -> usize {
        self.pending.len()
    }

    /// A query of the guest to `asked`, which need not be us. Whether an answer is there or will come.
    pub fn query(
        &mut self,
        now: Duration,
        client: Client,
        asked: IpAddr,
        bytes: &[u8],
        policy: &Policy,
        pins: &mut Pins,
    ) -> bool {
        let question = match parse_query(bytes) {
            Ok(question) => question,
            Err(answer) => {
                let answers = answer.is_some();
                if let Some(bytes) = answer {
                    self.outputs.push_back(Output::Answer { client, bytes });
                    self.decided("", "", Outcome::Refused, None, None);
                }
                return answers;
            }
        };
        let capacity = client.capacity();
        if !self.config.gateway.contains(&asked.to_canonical()) {
            let attempt = Attempt {
                direction: msb_protocol::network::Direction::Egress,
                address: asked,
                transport: client.transport,
                port: 53,
            };
            let decision = policy.decide(now, &attempt, pins);
            if decision.action == Action::Deny {
                self.decided_on(&question, Outcome::ServerDenied, Some(decision.decider), Some(asked));
                self.answer(client, question.denied(ExtendedError::Prohibited, capacity));
                return true;
            }
        }
        let Some(name) = question.name.clone() else {
            // The root and names with odd bytes: no rule can name them and no host has them.
            self.decided_on(&question, Outcome::Refused, None, None);
            self.answer(client, question.error(ResponseCode::Refused, Some(ExtendedError::NotSupported), capacity));
            return true;
        };
        if self.own_zone.as_ref().is_some_and(|zone| name.is_within(zone)) {
            self.decided_on(&question, Outcome::Own, None, None);
            let bytes = if self.host_name.as_ref() == Some(&name) {
                // IPv4 alone: what the host serves mostly listens on 127.0.0.1 only, and many programs try one address only.
                let own: Vec<IpAddr> = self.config.gateway.iter().copied().filter(IpAddr::is_ipv4).collect();
                question.own_addresses(&own, OWN_TTL_SECONDS, capacity)
            } else {
                question.denied(ExtendedError::NotSupported, capacity)
            };
            self.answer(client, bytes);
            return true;
        }
        let decision = policy.decide_name(&name, client.transport);
        if decision.action == Action::Deny {
            self.decided_on(&question, Outcome::Denied, Some(decision.decider), None);
            self.answer(client, question.denied(ExtendedError::Blocked, capacity));
            return true;
        }
        if let Some(message) = self.cache.get(now, &question) {
            pin(now, &name, &message, pins);
            self.decided_on(&question, Outcome::Cached, None, None);
            self.answer(client, question.relay(&message, capacity));
            return true;
        }
        if self.servers.is_empty() || self.pending.len() >= PENDING_COUNT_MAX {
            self.decided_on(&question, Outcome::Failed, None, None);
            self.answer(client, question.error(ResponseCode::ServFail, Some(ExtendedError::NetworkError), capacity));
            return true;
        }
        let query = QueryId(self.next_query);
        self.next_query += 1;
        let server = self.preferred_server(now, None);
        let pending = Pending {
            question,
            client,
            server,
            tries: 0,
            id: 0,
            transport: Transport::Udp,
            try_ends: now,
            ends: now + self.config.timeout,
            refusal: None,
        };
        self.pending.insert(query, pending);
        self.ask(now, query, server, Transport::Udp);
        true
    }

    /// The first server that is not silent, after `after` if given; with all of them silent, simply the next.
    fn preferred_server(&self, now: Duration, after: Option<usize>) -> usize {
        let count = self.servers.len().max(1);
        let start = after.map_or(0, |index| index + 1);
        let order = (0..count).map(|step| (start + step) % count);
        order
            .clone()
            .find(|index| self.servers.get(*index).is_some_and(|server| server.silent_until <= now))
            .unwrap_or(start % count)
    }

    fn ask(&mut self, now: Duration, query: QueryId, server: usize, transport: Transport) {
        let (Some(pending), Some(target)) = (self.pending.get_mut(&query), self.servers.get(server)) else { return };
        pending.server = server;
        pending.transport = transport;
        pending.tries += 1;
        pending.id = self.random.next_u16();
        // TCP needs a connection first and its server has just proved to be alive.
        pending.try_ends = now + if transport == Transport::Tcp { 2 * TRY_TIMEOUT } else { TRY_TIMEOUT };
        let bytes = pending.question.upstream_query(pending.id);
        self.outputs.push_back(Output::Ask { query, server: target.address, transport, bytes });
    }

    /// A message from the server that is being asked for this query.
    pub fn response(&mut self, now: Duration, query: QueryId, bytes: &[u8], policy: &Policy, pins: &mut Pins) {
        let Some(pending) = self.pending.get_mut(&query) else { return };
        // What does not answer this very query is not even a failure: a liar would otherwise end the try.
        let Some(message) = parse_response(bytes, pending.id, &pending.question) else { return };
        if let Some(server) = self.servers.get_mut(pending.server) {
            server.silent_until = Duration::ZERO;
        }
        if message.metadata.truncation && pending.transport == Transport::Udp {
            let server = pending.server;
            self.ask(now, query, server, Transport::Tcp);
            return;
        }
        if matches!(
            message.metadata.response_code,
            ResponseCode::ServFail | ResponseCode::Refused | ResponseCode::NotImp | ResponseCode::FormErr
        ) {
            pending.refusal = Some(message);
            self.try_next(now, query);
            return;
        }
        let Some(pending) = self.pending.remove(&query) else { return };
        self.outputs.push_back(Output::Finished { query });
        let (question, client) = (&pending.question, pending.client);
        let offence = self
            .config
            .rebind_protection
            .then(|| {
                addresses(&message)
                    .map(|(address, _)| address)
                    .find(|address| policy.classify(*address).class != AddressClass::Public)
            })
            .flatten();
        if offence.is_some() {
            self.decided_on(question, Outcome::Rebinding, None, offence);
            self.answer(client, question.denied(ExtendedError::Filtered, client.capacity()));
            return;
        }
        if let Some(name) = &question.name {
            pin(now, name, &message, pins);
        }
        self.cache.insert(now, question, &message, bytes.len());
        self.decided_on(question, Outcome::Answered, None, None);
        self.answer(client, question.relay(&message, client.capacity()));
    }

    /// The socket of this query failed: the server is unreachable or nothing listens there.
    pub fn failed(&mut self, now: Duration, query: QueryId) {
        self.silent(now, query);
    }

    /// Ends tries and queries whose time is up.
    pub fn tick(&mut self, now: Duration) {
        let mut late: Vec<QueryId> = self
            .pending
            .iter()
            .filter(|(_, pending)| pending.try_ends.min(pending.ends) <= now)
            .map(|(query, _)| *query)
            .collect();
        late.sort_unstable();
        for query in late {
            self.silent(now, query);
        }
    }

    fn silent(&mut self, now: Duration, query: QueryId) {
        let Some(pending) = self.pending.get(&query) else { return };
        if let Some(server) = self.servers.get_mut(pending.server) {
            server.silent_until = now + SILENT_SERVER_PENALTY;
        }
        self.try_next(now, query);
    }

    fn try_next(&mut self, now: Duration, query: QueryId) {
        let Some(pending) = self.pending.get(&query) else { return };
        // Each server twice at most; a query whose servers all refuse at once must not spin until its time is up.
        if now < pending.ends && pending.tries < 2 * self.servers.len() {
            let server = self.preferred_server(now, Some(pending.server));
            self.ask(now, query, server, Transport::Udp);
            return;
        }
        let Some(pending) = self.pending.remove(&query) else { return };
        self.outputs.push_back(Output::Finished { query });
        let capacity = pending.client.capacity();
        let bytes = match &pending.refusal {
            Some(message) => pending.question.relay(message, capacity),
            None => pending.question.error(ResponseCode::ServFail, Some(ExtendedError::NoReachableAuthority), capacity),
        };
        self.decided_on(&pending.question, Outcome::Failed, None, None);
        self.answer(pending.client, bytes);
    }

    fn answer(&mut self, client: Client, bytes: Vec<u8>) {
        self.outputs.push_back(Output::Answer { client, bytes });
    }

    fn decided_on(&mut self, question: &Question, outcome: Outcome, decider: Option<Decider>, address: Option<IpAddr>) {
        let name = question.name.as_ref().map_or("", |name| name.as_str()).to_owned();
        let record_type = question.query.query_type.to_string();
        self.decided(&name, &record_type, outcome, decider, address);
    }

    fn decided(
        &mut self,
        name: &str,
        record_type: &str,
        outcome: Outcome,
        decider: Option<Decider>,
        address: Option<IpAddr>,
    ) {
        let decision = NameDecision { name: name.into(), record_type: record_type.into(), outcome, decider, address };
        self.outputs.push_back(Output::Decided(decision));
    }
}

fn pin(now: Duration, name: &DomainName, message: &Message, pins: &mut Pins) {
    for (address, ttl) in addresses(message) {
        pins.insert(now, name, address, Duration::from_secs(ttl.into()));
    }
}

#[cfg(test)]
mod tests;
