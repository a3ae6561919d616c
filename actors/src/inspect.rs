//! The one message that every actor answers: what it has done and where it is. Feeds `msb debug actors` and tests.

use actix::Message;

/// Say where you are.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "ActorReport")]
pub struct Inspect;

/// What an actor says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActorReport {
    /// Messages handled.
    pub handled: u64,
    /// Where it is, for people.
    pub state: String,
}
