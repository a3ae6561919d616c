//! What becomes of the guest when its machine was made of a saved one: another run, that shares nothing with its twins which must be there
//! only once. Called by `connection` for the stream that becomes the new agent link.
//!
//! ```text
//!  saved: workload frozen, link open ─► copied ─► link lost ─► Renew{welcome} ─► boot id, clock, entropy, names ─► link replaced ─► Ready ─► thawed
//!                                                                 │ holds                                                           ▲
//!                                                                 └─► the same ─► Ready ─► (halted, maybe for days) ─► Renew on the link ─► the same
//! ```
//!
//! Nothing of the workload runs before all of it is done: it was frozen before the machine was saved. It never runs in a machine that was not.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use msb_protocol::error::ErrorCode;
use msb_protocol::guest::{GuestBody, Opened, Ready, Renew, Welcome};
use msb_protocol::version::GUEST_GENERATION;

use super::boot::Steps;
use super::clock::{self, uptime_us};
use super::link::Link;
use super::{Agent, VERSION};
use crate::failure::GuestError;
use crate::root::environment;
use crate::session::exec;
use crate::session::stream::FrameStream;
use crate::session::workload::Host;
use crate::sys;

/// What was renewed, and what it takes.
#[derive(Debug, Default)]
pub(crate) struct Renewals {
    link: OnceLock<Arc<Link>>,
    boot_id: Mutex<Option<Vec<u8>>>,
}

impl Renewals {
    /// The link that is renewed.
    pub(crate) fn set_link(&self, link: &Arc<Link>) {
        let _ = self.link.set(Arc::clone(link));
    }
}

impl Agent {
    /// The run that this is.
    pub(crate) fn boot_id(&self) -> Vec<u8> {
        let renewed = self.renewal.boot_id.lock().unwrap_or_else(PoisonError::into_inner);
        renewed.clone().unwrap_or_else(|| self.guest.boot_id.clone())
    }
}

type Refused = (FrameStream, GuestError);

/// Makes this guest the run that the host says it is.
pub(super) fn renew(agent: &Agent, mut stream: FrameStream, renew: Renew, boot_id: Vec<u8>) -> Result<(), Refused> {
    let refuse = |stream, message: String| Err((stream, GuestError::new(ErrorCode::BootFailed, message)));
    let Some(link) = agent.renewal.link.get().filter(|link| link.is_quiesced()) else {
        return refuse(stream, "this machine was not made of a saved one".into());
    };
    let Some(welcome) = renew.welcome.filter(|welcome| welcome.boot_id == boot_id) else {
        return refuse(stream, "a renewal without a welcome".into());
    };
    let mut steps = Steps::new();
    if let Err(message) = become_new(agent, &welcome, &mut steps) {
        return refuse(stream, message);
    }
    stream.send(GuestBody::Opened(Opened {
        generation: GUEST_GENERATION,
        agent_version: VERSION.into(),
        main_exited: agent.main.end(),
        main_pid: agent.main.pid(),
        holds: renew.holds,
    }));
    if !link.replace(stream) {
        link.log("a renewal came for a link that is still there");
        return Ok(());
    }
    steps.done("link");
    if renew.holds {
        if let Err(error) = exec::rehearse(&agent.guest) {
            link.log(&format!("a session could not be rehearsed: {}", error.message));
        }
        steps.done("rehearsal");
        // What is due by the time it goes on would be done before the first command of whoever takes it.
        rustix::fs::sync();
        steps.done("flush");
        link.send(GuestBody::Ready(Ready { ready_uptime_us: uptime_us(), steps: steps.steps }));
    } else if go_on(agent, link, *welcome, steps) {
        // This thread's stream is the link's now. A failed start is told there by the workload itself.
        drop(agent.run_main(None));
    }
    Ok(())
}

/// Makes a guest that stands by the run of whoever took it. Called by the link's own thread.
pub(super) fn renew_again(agent: &Arc<Agent>, renew: Renew) {
    let Some(link) = agent.renewal.link.get() else { return };
    let mut steps = Steps::new();
    let renewed = match renew.welcome {
        Some(welcome) => become_new(agent, &welcome, &mut steps).map(|()| welcome),
        None => Err("a renewal without a welcome".into()),
    };
    match renewed {
        Ok(welcome) => {
            if go_on(agent, link, *welcome, steps) {
                let agent = Arc::clone(agent);
                if let Err(error) = super::boot::thread(move || drop(agent.run_main(None))) {
                    link.log(&format!("the main workload cannot be started: {}", error.message));
                }
            }
        }
        Err(message) => {
            let error = GuestError::new(ErrorCode::BootFailed, message);
            link.send(GuestBody::BootFailed(error.into_failure("agent")));
        }
    }
}

/// Says that it is ready and lets the workload go on. Whether a main workload is to be started.
fn go_on(agent: &Agent, link: &Link, welcome: Welcome, steps: Steps) -> bool {
    // Before `Ready`: whoever starts it by hand comes right after that.
    let autostart = match welcome.config.and_then(|config| config.main) {
        Some(main) if agent.main.appear() => {
            let autostart = main.autostart;
            let _ = agent.guest.late_main.set(main);
            autostart
        }
        // It goes on, or has ended; or there is none.
        _ => false,
    };
    link.send(GuestBody::Ready(Ready { ready_uptime_us: uptime_us(), steps: steps.steps }));
    link.thaw();
    autostart
}

/// Clock, entropy, names, and the run.
fn become_new(agent: &Agent, welcome: &Welcome, steps: &mut Steps) -> Result<(), String> {
    clock::set(welcome.realtime_ns).map_err(|errno| format!("cannot set the clock: {errno}"))?;
    if welcome.entropy.is_empty() {
        return Err("a renewal without entropy".into());
    }
    let random = std::fs::File::open("/dev/urandom").map_err(|error| format!("cannot open /dev/urandom: {error}"))?;
    sys::add_entropy(&random, &welcome.entropy).map_err(|errno| format!("cannot seed the entropy pool: {errno}"))?;
    sys::reseed_entropy(&random).map_err(|errno| format!("cannot reseed the random generator: {errno}"))?;
    steps.done("clock and entropy");
    let Some(config) = &welcome.config else { return Err("a renewal without a configuration".into()) };
    rustix::system::sethostname(config.hostname.as_bytes())
        .map_err(|errno| format!("cannot set the host name: {errno}"))?;
    environment::renew_boot_id(&agent.guest.root).map_err(|error| format!("cannot renew the boot id: {error}"))?;
    steps.done("identity");
    // A root that is read-only (profile strict) keeps its files.
    if let Err(error) = environment::write_names(&agent.guest.root, config) {
        agent.host.log(&format!("files of the network keep what they were: {error}"));
    }
    steps.done("names");
    *agent.renewal.boot_id.lock().unwrap_or_else(PoisonError::into_inner) = Some(welcome.boot_id.clone());
    Ok(())
}
