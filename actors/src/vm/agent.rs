//! The control link to a VM's agent: beats come up, the shutdown goes down. Opened again when it breaks while the VM lives.
//!
//! Run by the driver of a VM as a task of its own, so that a silent agent never holds up the VM process's own events.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use msb_protocol::guest::{BEAT_INTERVAL_MS, GuestBody, HostBody, OpenControl, OpenKind, Shutdown};
use msb_protocol::id::BootId;
use tokio::sync::mpsc;

use super::session::{self, Session, SessionError};
use super::{EventSink, Launcher, VmEvent};

/// Time between two beats.
const BEAT_INTERVAL: Duration = Duration::from_millis(BEAT_INTERVAL_MS);
/// Wait before the link is opened again.
const REOPEN_AFTER: Duration = Duration::from_millis(500);

/// Keeps the control link open until the VM's events have no receiver any more or `shutdowns` is closed.
pub async fn run(
    launcher: Arc<dyn Launcher>,
    run_dir: PathBuf,
    boot_id: BootId,
    events: EventSink,
    mut shutdowns: mpsc::Receiver<Shutdown>,
) {
    // A shutdown that was asked for while the link was down is sent as soon as it is up.
    let mut due: Option<Shutdown> = None;
    loop {
        let opening = session::open(&*launcher, &run_dir, boot_id, OpenKind::Control(OpenControl {}));
        tokio::pin!(opening);
        let opened = loop {
            tokio::select! {
                outcome = &mut opening => break outcome,
                shutdown = shutdowns.recv() => match shutdown {
                    Some(shutdown) => due = Some(shutdown),
                    None => return,
                },
                () = events.closed() => return,
            }
        };
        // Beats are all that comes up here in time: that the workload ended is told by the VM process itself.
        let unhurried =
            |session: Session| session.unhurried(BEAT_INTERVAL).map_err(|error| SessionError::Io(error).into());
        match opened.and_then(unhurried) {
            Ok(session) => {
                if serve(session, &events, &mut shutdowns, &mut due).await.is_break() {
                    return;
                }
            }
            Err(error) => tracing::debug!(%boot_id, error = %error.message, "the agent's control stream did not open"),
        }
        tokio::time::sleep(REOPEN_AFTER).await;
    }
}

async fn serve(
    mut session: Session,
    events: &EventSink,
    shutdowns: &mut mpsc::Receiver<Shutdown>,
    due: &mut Option<Shutdown>,
) -> std::ops::ControlFlow<()> {
    use std::ops::ControlFlow::{Break, Continue};
    if let Some(exited) = session.opened.main_exited.take()
        && events.send(VmEvent::MainExited(exited.into())).await.is_err()
    {
        return Break(());
    }
    loop {
        if let Some(shutdown) = due.clone() {
            match session.writer.send(HostBody::Shutdown(shutdown)).await {
                Ok(()) => *due = None,
                Err(_) => return Continue(()),
            }
        }
        tokio::select! {
            message = session.reader.next() => {
                let event = match message {
                    Ok(Some(GuestBody::Beat(beat))) => VmEvent::Beat(beat),
                    Ok(Some(GuestBody::MainExited(exited))) => VmEvent::MainExited(exited.into()),
                    // What a later agent says beyond that is not for this daemon.
                    Ok(Some(_)) => continue,
                    Ok(None) | Err(_) => return Continue(()),
                };
                if events.send(event).await.is_err() {
                    return Break(());
                }
            }
            shutdown = shutdowns.recv() => match shutdown {
                Some(shutdown) => *due = Some(shutdown),
                None => return Break(()),
            },
            () = events.closed() => return Break(()),
        }
    }
}
