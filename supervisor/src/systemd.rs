//! What the daemon says to systemd and asks of it: that it is ready, that it is alive, a scope for each VM process. Without systemd all of
//! it is nothing. Called by `main`.

use std::path::PathBuf;
use std::time::Duration;

use msb_actors::daemon::Daemon;
use msb_actors::vm::scope::{Manager, Scopes};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};

/// Time for systemd to make a scope when the daemon starts.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// Says that the service is ready, and from then on that it is alive: as long as its supervisor answers.
pub fn ready(daemon: &Daemon) {
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        tracing::debug!(%error, "nobody waits for a notification");
    }
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let daemon = daemon.clone();
    tokio::spawn(async move {
        let pause = limit / 3;
        loop {
            match tokio::time::timeout(pause, daemon.count()).await {
                Ok(Ok(_)) => {
                    if let Err(error) = sd_notify::notify(&[NotifyState::Watchdog]) {
                        tracing::warn!(%error, "the watchdog cannot be told that all is well");
                    }
                }
                Ok(Err(error)) => tracing::warn!(error = %error.message, "the supervisor does not answer well"),
                Err(_) => tracing::warn!("the supervisor does not answer in time"),
            }
            tokio::time::sleep(pause).await;
        }
    });
}

/// For the front door, which has no supervisor: says that it is ready and alive, until it is told to end.
pub async fn ready_and_alive() {
    let mut ends: Vec<_> = [SignalKind::terminate(), SignalKind::interrupt()]
        .into_iter()
        .filter_map(|kind| signal(kind).inspect_err(|error| tracing::error!(%error, "a signal cannot be watched")).ok())
        .collect();
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    let pause = sd_notify::watchdog_enabled().map_or(Duration::from_secs(3_600), |limit| limit / 3);
    let told = std::future::poll_fn(|context| match ends.iter_mut().any(|end| end.poll_recv(context).is_ready()) {
        true => std::task::Poll::Ready(()),
        false => std::task::Poll::Pending,
    });
    tokio::pin!(told);
    loop {
        tokio::select! {
            () = &mut told => return,
            () = tokio::time::sleep(pause) => drop(sd_notify::notify(&[NotifyState::Watchdog])),
        }
    }
}

/// How VM processes get scopes of their own; `None` where systemd did not start this service or makes none for it. A service behind the
/// door of a host, which was started for a user and not by systemd, is told its `door`'s socket for that.
pub async fn scopes(door: Option<PathBuf>) -> Option<Scopes> {
    if let Some(socket) = door {
        return Some(Scopes::Door(socket));
    }
    let manager = Manager::of_this_service()?;
    let mut command =
        tokio::process::Command::from(manager.command(&format!("msb-probe-{}.scope", std::process::id())));
    match tokio::time::timeout(PROBE_TIMEOUT, command.arg("/bin/true").kill_on_drop(true).status()).await {
        Ok(Ok(status)) if status.success() => Some(Scopes::Manager(manager)),
        outcome => {
            tracing::warn!(?outcome, "systemd makes no scopes: VM processes stay in the service's own group");
            None
        }
    }
}
