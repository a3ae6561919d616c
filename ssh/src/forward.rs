//! One forwarded connection (`-L`, `-D`): opened inside the target, then bytes both ways with half-close and back-pressure.

use russh::server::{ChannelOpenHandle, Msg};
use russh::{Channel, ChannelOpenFailure};

use crate::intake::Slot;
use crate::pipe;
use crate::target::{Refusal, Target};

/// Opens and copies until both sides are done. A refusal is told at once, with the reason and text of RFC 4254, section 5.1.
pub(crate) async fn run<T: Target>(
    channel: Channel<Msg>,
    reply: ChannelOpenHandle,
    target: &T,
    slot: &Slot,
    host: &str,
    port: u16,
) {
    let inside = match target.connect(host, port).await {
        Ok(stream) => stream,
        Err(refusal) => return reply.reject(reason(&refusal)).await,
    };
    reply.accept().await;
    let (from_client, to_client) = channel.split();
    pipe::run(from_client, &to_client, slot, inside).await;
    // The client may be gone, and then it needs no goodbye.
    let _ = to_client.close().await;
}

/// The library writes its own text for the plain reasons, so the reason's number is sent with ours.
fn reason(refusal: &Refusal) -> ChannelOpenFailure {
    let code = match refusal {
        Refusal::Prohibited(_) => 1,
        Refusal::Failed(_) => 2,
        Refusal::Shortage(_) => 4,
    };
    ChannelOpenFailure::Other { code, reason: refusal.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_the_numbers_of_the_rfc() {
        for (refusal, wanted) in
            [(Refusal::Prohibited("x".into()), 1), (Refusal::Failed("x".into()), 2), (Refusal::Shortage("x".into()), 4)]
        {
            assert!(matches!(reason(&refusal), ChannelOpenFailure::Other { code, .. } if code == wanted));
        }
    }
}
