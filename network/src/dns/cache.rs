//! The answers of upstream servers, for as long as they allow. Bounded by count and by bytes; used by the resolver, after the policy
//! has allowed the name. Never serves an answer past its time.

use std::collections::HashMap;
use std::time::Duration;

use hickory_proto::op::Message;
use hickory_proto::rr::RecordType;

use super::message::{Question, life_seconds};

/// Most answers.
pub const ANSWERS_COUNT_MAX: usize = 512;
/// Most bytes of answers as they came from the wire.
pub const ANSWERS_BYTES_MAX: usize = 512 << 10;
/// Longest life of an answer in seconds, whatever it says.
const LIFE_SECONDS_MAX: u32 = 3_600;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    name: String,
    record_type: RecordType,
    dnssec_ok: bool,
    checking_disabled: bool,
}

impl Key {
    fn new(question: &Question) -> Self {
        Self {
            name: question.query.name.to_lowercase().to_ascii(),
            record_type: question.query.query_type,
            dnssec_ok: question.dnssec_ok,
            checking_disabled: question.checking_disabled,
        }
    }
}

#[derive(Debug)]
struct Entry {
    message: Message,
    bytes: usize,
    stored: Duration,
    expires: Duration,
}

/// The answers of one sandbox.
#[derive(Debug, Default)]
pub struct Cache {
    entries: HashMap<Key, Entry>,
    bytes: usize,
}

impl Cache {
    /// The answer to a question with what is left of its times to live.
    pub fn get(&self, now: Duration, question: &Question) -> Option<Message> {
        let entry = self.entries.get(&Key::new(question)).filter(|entry| entry.expires > now)?;
        let age = u32::try_from((now - entry.stored).as_secs()).unwrap_or(u32::MAX);
        let mut message = entry.message.clone();
        for record in message.answers.iter_mut().chain(&mut message.authorities).chain(&mut message.additionals) {
            record.ttl = record.ttl.saturating_sub(age);
        }
        Some(message)
    }

    /// Remembers an answer of `bytes` bytes, if it may be remembered.
    pub fn insert(&mut self, now: Duration, question: &Question, message: &Message, bytes: usize) {
        let Some(life) = life_seconds(message) else { return };
        if bytes > ANSWERS_BYTES_MAX / 8 {
            return;
        }
        let key = Key::new(question);
        self.remove(&key);
        if self.entries.len() >= ANSWERS_COUNT_MAX || self.bytes + bytes > ANSWERS_BYTES_MAX {
            self.make_room(now);
        }
        self.bytes += bytes;
        let expires = now + Duration::from_secs(life.min(LIFE_SECONDS_MAX).into());
        self.entries.insert(key, Entry { message: message.clone(), bytes, stored: now, expires });
    }

    fn remove(&mut self, key: &Key) {
        if let Some(entry) = self.entries.remove(key) {
            self.bytes -= entry.bytes;
        }
    }

    /// Drops what expired, else the older half: a full cache is emptied in steps that pay for themselves.
    fn make_room(&mut self, now: Duration) {
        self.entries.retain(|_, entry| entry.expires > now);
        let bytes = |entries: &HashMap<Key, Entry>| entries.values().map(|entry| entry.bytes).sum::<usize>();
        self.bytes = bytes(&self.entries);
        if self.entries.len() > ANSWERS_COUNT_MAX / 2 || self.bytes > ANSWERS_BYTES_MAX / 2 {
            let mut ages: Vec<Duration> = self.entries.values().map(|entry| entry.stored).collect();
            ages.sort_unstable();
            let middle = ages[ages.len() / 2];
            self.entries.retain(|_, entry| entry.stored > middle);
            self.bytes = bytes(&self.entries);
        }
    }

    /// Answers held, expired ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}
