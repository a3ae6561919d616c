//! The loop of one file session: requests are carried out in the order they came, answers wait in a bounded outbox. A host that does not
//! read its answers is not served further; nothing grows.

use std::os::fd::AsFd;

use msb_protocol::files::{FileFailure, FileOperation, FileOutcome, FileReply};
use msb_protocol::guest::{GuestBody, HostBody, Pong};
use rustix::event::{PollFd, PollFlags, poll};

use super::operations::Operations;
use super::person::Place;
use super::watch::Watches;
use crate::session::stream::FrameStream;

/// Serves until the host goes away or breaks the protocol.
pub(super) fn serve(stream: &mut FrameStream, place: Place) {
    let mut operations = Operations::new(place);
    let mut watches = Watches::default();
    loop {
        while stream.has_room() {
            match stream.next_message() {
                Ok(Some(HostBody::File(request))) => {
                    let outcome = match request.operation {
                        Some(FileOperation::Watch(watch)) => watches.add(request.id, &watch),
                        Some(operation) => operations.perform(operation),
                        None => FileOutcome::Failed(FileFailure {
                            errno: libc::EOPNOTSUPP,
                            message: "this agent does not know the operation".into(),
                        }),
                    };
                    stream.send(GuestBody::File(FileReply { id: request.id, outcome: Some(outcome) }));
                }
                Ok(Some(HostBody::Ping(ping))) => stream.send(GuestBody::Pong(Pong { token: ping.token })),
                Ok(None) => break,
                Ok(Some(_)) | Err(_) => return,
            }
        }
        if stream.flush().is_err() {
            return;
        }
        let (mut events, mut changes) = (PollFlags::empty(), PollFlags::empty());
        if stream.backlog() > 0 {
            events |= PollFlags::OUT;
        }
        if stream.has_room() {
            events |= PollFlags::IN;
            if stream.backlog() == 0 && stream.holds_message() {
                continue;
            }
            changes = PollFlags::IN;
        }
        let mut fds = vec![PollFd::from_borrowed_fd(stream.socket(), events)];
        if let Some(notifier) = watches.notifier() {
            fds.push(PollFd::from_borrowed_fd(notifier.as_fd(), changes));
        }
        if poll(&mut fds, None).is_err() {
            continue;
        }
        let heard = fds[0].revents();
        let changed = fds.get(1).is_some_and(|fd| fd.revents().intersects(PollFlags::IN));
        drop(fds);
        if heard.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) && stream.receive().is_err() {
            return;
        }
        if changed {
            for (id, changes) in watches.read() {
                stream.send(GuestBody::File(FileReply { id, outcome: Some(FileOutcome::Changes(changes)) }));
            }
        }
    }
}
