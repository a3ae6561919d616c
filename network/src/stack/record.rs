//! The decision log: one record for each denial, rate-limited. The stack makes records, `msb-vmm` writes them as JSON lines, and
//! `msb net log` shows them. Never holds payload.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use msb_protocol::network::{Direction, Transport};
use serde::Serialize;

use crate::policy::Decider;

/// Records a second that the log takes on average.
pub const RECORDS_PER_SECOND: u32 = 20;
/// Records that the log takes at once.
pub const RECORDS_BURST: u32 = 200;

/// One line of the decision log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Record {
    /// Time since the stack was made; [`Record::line`] turns it into wall time.
    #[serde(skip)]
    pub at: Duration,
    /// `deny`: policy; `limit`: a table is full; `refuse`: rebinding protection.
    pub verdict: &'static str,
    /// Which way.
    pub direction: Direction,
    /// Over what; `dns` queries say what they came by.
    pub transport: Transport,
    /// The other end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// The destination port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// What the address is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<&'static str>,
    /// The name that was asked for, or that the address was got by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The type of a DNS question.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub record_type: Option<String>,
    /// What decided.
    #[serde(flatten)]
    pub decider: Option<Decider>,
    /// The text of the rule.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub rule: String,
    /// Records that the rate limit left out before this one.
    #[serde(skip_serializing_if = "is_zero")]
    pub suppressed: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Record {
    /// The line, without its line feed; `started_ns` is the wall time at which the stack's time was 0, in nanoseconds since 1970.
    #[must_use]
    pub fn line(&self, started_ns: u64) -> String {
        #[derive(Serialize)]
        struct Line<'a> {
            at_ns: u64,
            #[serde(flatten)]
            record: &'a Record,
        }
        let at_ns = started_ns.saturating_add(u64::try_from(self.at.as_nanos()).unwrap_or(u64::MAX));
        // Serializing numbers, words and checked names cannot fail.
        serde_json::to_string(&Line { at_ns, record: self }).unwrap_or_default()
    }
}

/// Records on their way to the log.
#[derive(Debug)]
pub(super) struct RecordQueue {
    records: VecDeque<Record>,
    /// Records that may be taken now, in thousandths.
    tokens: u64,
    refilled: Duration,
    suppressed_since: u64,
    pub(super) suppressed: u64,
}

impl RecordQueue {
    pub(super) fn new() -> Self {
        Self {
            records: VecDeque::new(),
            tokens: u64::from(RECORDS_BURST) * 1000,
            refilled: Duration::ZERO,
            suppressed_since: 0,
            suppressed: 0,
        }
    }

    pub(super) fn push(&mut self, mut record: Record) {
        let passed = record.at.saturating_sub(self.refilled);
        let refill =
            u64::try_from(passed.as_millis()).unwrap_or(u64::MAX).saturating_mul(u64::from(RECORDS_PER_SECOND));
        if refill > 0 {
            self.tokens = self.tokens.saturating_add(refill).min(u64::from(RECORDS_BURST) * 1000);
            self.refilled = record.at;
        }
        // The queue is emptied at each turn of the caller; a caller that does not must not make it grow.
        if self.tokens < 1000 || self.records.len() >= RECORDS_BURST as usize {
            self.suppressed += 1;
            self.suppressed_since += 1;
            return;
        }
        self.tokens -= 1000;
        record.suppressed = std::mem::take(&mut self.suppressed_since);
        self.records.push_back(record);
    }

    pub(super) fn take(&mut self) -> Option<Record> {
        self.records.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(at_ms: u64) -> Record {
        Record {
            at: Duration::from_millis(at_ms),
            verdict: "deny",
            direction: Direction::Egress,
            transport: Transport::Tcp,
            address: Some("10.0.0.1".parse().unwrap()),
            port: Some(443),
            class: Some("private"),
            name: None,
            record_type: None,
            decider: Some(Decider::Rule { index: 2 }),
            rule: "deny@private".into(),
            suppressed: 0,
        }
    }

    #[test]
    fn a_line_has_what_people_ask_for() {
        assert_eq!(
            record(1500).line(1_000_000_000),
            r#"{"at_ns":2500000000,"verdict":"deny","direction":"egress","transport":"tcp","address":"10.0.0.1","port":443,"class":"private","by":"rule","index":2,"rule":"deny@private"}"#
        );
    }

    #[test]
    fn the_burst_passes_then_the_rate_and_the_next_record_tells_what_is_missing() {
        let mut queue = RecordQueue::new();
        let take_all = |queue: &mut RecordQueue| std::iter::from_fn(|| queue.take()).collect::<Vec<_>>();
        for _ in 0..RECORDS_BURST + 30 {
            queue.push(record(0));
        }
        assert_eq!((take_all(&mut queue).len(), queue.suppressed), (RECORDS_BURST as usize, 30));
        queue.push(record(49));
        assert!(take_all(&mut queue).is_empty(), "one record takes 50 ms");
        queue.push(record(100));
        let records = take_all(&mut queue);
        assert_eq!((records.len(), records[0].suppressed), (1, 31));
    }
}
