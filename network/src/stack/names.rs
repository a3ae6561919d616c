//! The resolver's edge: queries that come as datagrams or over connections, sockets to upstream servers, answers back to who asked.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use msb_protocol::network::{Direction, Transport};

use super::host::{Close, Event, Host, SocketId};
use super::tcp::{Service, State};
use super::{ConnectionKey, FrameSink, Owner, Record, Stack};
use crate::dns::{Client, NameDecision, Outcome, Output, QueryId, Resolver};

/// Messages that one turn takes from one upstream socket: more than one is somebody else's guess.
const MESSAGES_PER_TURN: usize = 8;

/// Who asked.
#[derive(Clone, Copy, Debug)]
enum Asker {
    Datagram { guest_port: u16, asked: SocketAddr },
    Stream { key: ConnectionKey, id: SocketId },
}

/// A socket to an upstream server.
#[derive(Debug)]
struct Upstream {
    id: SocketId,
    transport: Transport,
    /// What is not sent yet, over TCP.
    output: Vec<u8>,
    /// What has come, over TCP.
    input: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct Names {
    pub(super) resolver: Resolver,
    askers: HashMap<u64, Asker>,
    next_token: u64,
    upstreams: HashMap<QueryId, Upstream>,
}

impl Names {
    pub(super) fn new(resolver: Resolver) -> Self {
        Self { resolver, askers: HashMap::new(), next_token: 0, upstreams: HashMap::new() }
    }

    fn client(&mut self, transport: Transport, asker: Asker) -> Client {
        let token = self.next_token;
        self.next_token += 1;
        self.askers.insert(token, asker);
        Client { transport, token }
    }
}

impl<H: Host> Stack<H> {
    /// A datagram to port 53 of anybody.
    pub(super) fn take_query(
        &mut self,
        now: Duration,
        guest_port: u16,
        asked: SocketAddr,
        bytes: &[u8],
        sink: &mut dyn FrameSink,
    ) {
        let client = self.names.client(Transport::Udp, Asker::Datagram { guest_port, asked });
        if !self.names.resolver.query(now, client, asked.ip(), bytes, &self.policy, &mut self.pins) {
            self.names.askers.remove(&client.token);
        }
        self.serve_names(now, sink);
    }

    /// A message of a connection to port 53 of anybody.
    pub(super) fn take_stream_query(&mut self, now: Duration, key: ConnectionKey, bytes: &[u8]) {
        let Some(connection) = self.connections.get(&key) else { return };
        let client = self.names.client(Transport::Tcp, Asker::Stream { key, id: connection.id });
        if !self.names.resolver.query(now, client, key.peer.ip(), bytes, &self.policy, &mut self.pins) {
            self.names.askers.remove(&client.token);
            self.answer_stream(now, key, None);
        }
    }

    /// Does what the resolver asks for.
    pub(super) fn serve_names(&mut self, now: Duration, sink: &mut dyn FrameSink) {
        while let Some(output) = self.names.resolver.next_output() {
            match output {
                Output::Answer { client, bytes } => match self.names.askers.remove(&client.token) {
                    Some(Asker::Datagram { guest_port, asked }) => {
                        if let Some(frame) = self.builder.udp(asked, guest_port, &bytes) {
                            self.outbox.send(sink, &frame);
                        }
                    }
                    Some(Asker::Stream { key, id })
                        if self.connections.get(&key).is_some_and(|connection| connection.id == id) =>
                    {
                        self.answer_stream(now, key, Some(&bytes));
                    }
                    Some(Asker::Stream { .. }) | None => {}
                },
                Output::Ask { query, server, transport, bytes } => {
                    self.close_upstream(query);
                    if self.ask_upstream(query, server, transport, bytes).is_err() {
                        self.close_upstream(query);
                        self.names.resolver.failed(now, query);
                    }
                }
                Output::Finished { query } => self.close_upstream(query),
                Output::Decided(decision) => self.name_decided(now, decision),
            }
        }
    }

    fn answer_stream(&mut self, now: Duration, key: ConnectionKey, bytes: Option<&[u8]>) {
        if let Some(connection) = self.connections.get_mut(&key)
            && let State::Open(open) = &mut connection.state
            && let Service::Dns(stream) = &mut open.service
        {
            stream.answer(now, bytes);
            self.queue_connection(key);
        }
    }

    fn ask_upstream(
        &mut self,
        query: QueryId,
        server: SocketAddr,
        transport: Transport,
        bytes: Vec<u8>,
    ) -> io::Result<()> {
        let id = self.new_id();
        self.owners.insert(id, Owner::Upstream(query));
        let mut upstream = Upstream { id, transport, output: Vec::new(), input: Vec::new() };
        let result = match transport {
            Transport::Tcp => {
                // A query is at most a few hundred bytes.
                upstream.output.extend(u16::try_from(bytes.len()).unwrap_or(0).to_be_bytes());
                upstream.output.extend(bytes);
                self.host.connect_tcp(id, server)
            }
            _ => self.host.connect_udp(id, server).and_then(|()| self.host.write(id, &bytes).map(drop)),
        };
        self.names.upstreams.insert(query, upstream);
        result
    }

    fn close_upstream(&mut self, query: QueryId) {
        if let Some(upstream) = self.names.upstreams.remove(&query) {
            self.owners.remove(&upstream.id);
            self.host.close(upstream.id, Close::Graceful);
        }
    }

    pub(super) fn upstream_ready(&mut self, now: Duration, id: SocketId, query: QueryId, event: Event) {
        let Some(upstream) = self.names.upstreams.get_mut(&query) else { return };
        let result = match upstream.transport {
            Transport::Tcp => upstream.exchange(&mut self.host, event, &mut self.buffer),
            _ if !event.readable => return,
            _ => {
                for _ in 0..MESSAGES_PER_TURN {
                    match self.host.read(id, &mut self.buffer) {
                        Ok(len) => {
                            let message = &self.buffer[..len.min(self.buffer.len())];
                            self.names.resolver.response(now, query, message, &self.policy, &mut self.pins);
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                        Err(_) => {
                            self.names.resolver.failed(now, query);
                            break;
                        }
                    }
                }
                return;
            }
        };
        match result {
            Ok(None) => {}
            Ok(Some(message)) => self.names.resolver.response(now, query, &message, &self.policy, &mut self.pins),
            Err(_) => self.names.resolver.failed(now, query),
        }
    }

    fn name_decided(&mut self, now: Duration, decision: NameDecision) {
        *self.counters.names.entry(decision.outcome).or_default() += 1;
        let verdict = match decision.outcome {
            Outcome::Denied | Outcome::ServerDenied => "deny",
            Outcome::Rebinding => "refuse",
            _ => return,
        };
        let rule = match (decision.decider, decision.outcome) {
            (Some(decider), _) => self.policy.decider_text(decider),
            (None, Outcome::Rebinding) => "rebind-protection".into(),
            (None, _) => String::new(),
        };
        self.records.push(Record {
            at: now,
            verdict,
            direction: Direction::Egress,
            transport: Transport::Udp,
            address: decision.address,
            port: Some(53),
            class: decision.address.map(|address| self.policy.classify(address).class.as_str()),
            name: Some(decision.name),
            record_type: Some(decision.record_type),
            decider: decision.decider,
            rule,
            suppressed: 0,
        });
    }
}

impl Upstream {
    /// Sends the query and collects the answer, over TCP.
    fn exchange<H: Host>(&mut self, host: &mut H, event: Event, buffer: &mut [u8]) -> io::Result<Option<Vec<u8>>> {
        if event.writable && !self.output.is_empty() {
            match host.write(self.id, &self.output) {
                Ok(len) => drop(self.output.drain(..len.min(self.output.len()))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        if !event.readable {
            return Ok(None);
        }
        loop {
            match host.read(self.id, buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => self.input.extend_from_slice(&buffer[..len.min(buffer.len())]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
            // The input is bounded by the largest message and one read.
            if let Some([high, low]) = self.input.first_chunk::<2>() {
                let len = usize::from(u16::from_be_bytes([*high, *low]));
                if self.input.len() >= 2 + len {
                    return Ok(Some(self.input[2..2 + len].to_vec()));
                }
            }
        }
    }
}
