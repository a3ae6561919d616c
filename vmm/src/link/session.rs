//! The order of messages on the agent link, without I/O: a message in, what to do about it out.

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::guest::{Exited, Failure, GuestBody, Output, OutputStream, Step};
use msb_protocol::version::{GUEST_GENERATION, GUEST_GENERATION_MIN, negotiate};

/// Longest log line taken from an agent, in characters.
const LOG_LINE_CHARS_MAX: usize = 1024;
/// Most set-up steps taken into the phases.
const STEPS_MAX: usize = 16;
/// Stage names of a failed boot that are passed on as they are.
const STAGES: [&str; 4] = ["agent", "mount", "setup", "kernel"];

/// Where the link is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LinkState {
    /// Nothing was said.
    Waiting,
    /// A guest that was made of a saved one was told what it is now.
    Renewing,
    /// The agent said hello and was welcomed.
    Greeted,
    /// The guest is renewed, and stands by until it is renewed again.
    Standing,
    /// The guest is set up.
    Up,
    /// The agent said goodbye.
    Gone,
}

/// What a message asks for.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Answer the hello.
    Welcome {
        /// The agent's generation.
        generation: u32,
        /// Kernel start to init, in microseconds, as the guest says.
        init_uptime_us: u64,
        /// Kernel start to hello, in microseconds, as the guest says.
        hello_uptime_us: u64,
    },
    /// The guest is set up; these were the steps.
    Ready(Vec<Step>),
    /// The guest stands by.
    Stands,
    /// The boot has failed in this stage.
    BootFailed {
        /// One of the known stages.
        stage: String,
        /// For users.
        error: ApiError,
    },
    /// The main workload runs under this process id.
    MainStarted(u32),
    /// Output of the main workload.
    Output(OutputStream, Vec<u8>),
    /// The main workload ended.
    MainExited(Exited),
    /// A line of the agent's log, cleaned.
    Log(String),
    /// The workload is frozen, or why it is not.
    Quiesced(Result<(), String>),
    /// A guest that was made of a saved one heard what it is now.
    Renewed {
        /// The agent's generation.
        generation: u32,
        /// The process of its main workload, which goes on; 0: none.
        main_pid: u32,
    },
    /// Acknowledge the goodbye.
    Goodbye,
    /// Close the link: the peer broke the order.
    Close(&'static str),
}

/// The link's state.
#[derive(Debug)]
pub struct LinkSession {
    state: LinkState,
    /// Whether the guest is to stand by once it is renewed.
    holds: bool,
    main_started: bool,
    main_exited: bool,
}

impl LinkSession {
    /// Before the hello.
    pub fn new() -> Self {
        Self { state: LinkState::Waiting, holds: false, main_started: false, main_exited: false }
    }

    /// Of a guest that was made of a saved one, and is to stand by if it `holds`.
    pub fn renewing(holds: bool) -> Self {
        Self { state: LinkState::Renewing, holds, ..Self::new() }
    }

    /// Whether the guest is on its way to stand by.
    pub fn holds(&self) -> bool {
        self.holds
    }

    /// Where it is.
    pub fn state(&self) -> LinkState {
        self.state
    }

    /// Takes one message.
    pub fn take(&mut self, message: GuestBody) -> Action {
        match (self.state, message) {
            (LinkState::Waiting, GuestBody::AgentHello(hello)) => {
                if negotiate(GUEST_GENERATION, GUEST_GENERATION_MIN, hello.generation).is_err() {
                    return Action::Close("agent is too old");
                }
                self.state = LinkState::Greeted;
                Action::Welcome {
                    generation: hello.generation,
                    init_uptime_us: hello.init_uptime_us.min(hello.hello_uptime_us),
                    hello_uptime_us: hello.hello_uptime_us,
                }
            }
            (LinkState::Renewing, GuestBody::Opened(opened)) => {
                if let Err(error) = negotiate(GUEST_GENERATION, GUEST_GENERATION_MIN, opened.generation) {
                    let stage = STAGES[0].to_owned();
                    return Action::BootFailed { stage, error: error.into() };
                }
                if self.holds && !opened.holds {
                    let message = "its agent cannot stand by: it was saved by another msb";
                    let error = ApiError::new(ErrorCode::UnsupportedOperation, message);
                    return Action::BootFailed { stage: STAGES[0].to_owned(), error };
                }
                self.state = LinkState::Greeted;
                (self.main_started, self.main_exited) = (opened.main_pid != 0, opened.main_exited.is_some());
                Action::Renewed { generation: opened.generation, main_pid: opened.main_pid }
            }
            (LinkState::Renewing, GuestBody::Refused(failure)) => {
                boot_failed(Failure { stage: STAGES[0].into(), ..failure })
            }
            (LinkState::Up, GuestBody::Quiesced(quiesced)) => {
                let error: String =
                    quiesced.error.chars().filter(|c| !c.is_control()).take(LOG_LINE_CHARS_MAX).collect();
                Action::Quiesced(if error.is_empty() { Ok(()) } else { Err(error) })
            }
            (LinkState::Greeted, GuestBody::Ready(_)) if self.holds => {
                (self.state, self.holds) = (LinkState::Standing, false);
                Action::Stands
            }
            (LinkState::Greeted | LinkState::Standing, GuestBody::Ready(ready)) => {
                self.state = LinkState::Up;
                let mut steps = ready.steps;
                steps.truncate(STEPS_MAX);
                Action::Ready(steps)
            }
            (LinkState::Greeted | LinkState::Standing, GuestBody::BootFailed(failure)) => boot_failed(failure),
            (LinkState::Greeted | LinkState::Standing | LinkState::Up, GuestBody::Log(log)) => {
                Action::Log(log.line.chars().filter(|c| !c.is_control()).take(LOG_LINE_CHARS_MAX).collect())
            }
            (LinkState::Up, GuestBody::MainStarted(started)) if !self.main_started => {
                self.main_started = true;
                Action::MainStarted(started.pid)
            }
            (LinkState::Up, GuestBody::MainOutput(Output { stream, data })) => match OutputStream::try_from(stream) {
                Ok(stream) => Action::Output(stream, data),
                Err(_) => Action::Close("output of an unknown stream"),
            },
            (LinkState::Up, GuestBody::MainExited(end)) if !self.main_exited => {
                self.main_exited = true;
                Action::MainExited(end)
            }
            (LinkState::Greeted | LinkState::Up, GuestBody::Goodbye(_)) => {
                self.state = LinkState::Gone;
                Action::Goodbye
            }
            (LinkState::Waiting, _) => Action::Close("first message is not a hello"),
            _ => Action::Close("message out of order"),
        }
    }
}

impl Default for LinkSession {
    fn default() -> Self {
        Self::new()
    }
}

fn boot_failed(failure: Failure) -> Action {
    let stage = if STAGES.contains(&failure.stage.as_str()) { failure.stage.clone() } else { "other".to_owned() };
    let unknown = ErrorCode::from_name(&failure.code).is_none();
    let mut error = ApiError::from(failure);
    if unknown {
        error = ApiError::new(ErrorCode::BootFailed, error.message);
    }
    Action::BootFailed { stage, error }
}

#[cfg(test)]
mod tests {
    use msb_protocol::guest::{AgentHello, Goodbye, Log, Opened, Ready, Started};
    use proptest::prelude::*;

    use super::*;

    fn hello() -> GuestBody {
        GuestBody::AgentHello(AgentHello { generation: GUEST_GENERATION, ..Default::default() })
    }

    fn ready() -> GuestBody {
        GuestBody::Ready(Ready::default())
    }

    #[test]
    fn the_whole_life_of_a_link() {
        let mut link = LinkSession::new();
        assert!(matches!(link.take(hello()), Action::Welcome { .. }));
        assert_eq!(link.take(ready()), Action::Ready(vec![]));
        assert_eq!(link.take(GuestBody::MainStarted(Started { pid: 7 })), Action::MainStarted(7));
        let output = GuestBody::MainOutput(Output { stream: 1, data: b"x".to_vec() });
        assert_eq!(link.take(output), Action::Output(OutputStream::Stderr, b"x".to_vec()));
        assert!(matches!(link.take(GuestBody::MainExited(Exited::default())), Action::MainExited(_)));
        assert_eq!(link.take(GuestBody::Goodbye(Goodbye {})), Action::Goodbye);
        assert_eq!(link.state(), LinkState::Gone);
        assert!(matches!(link.take(ready()), Action::Close(_)));
    }

    #[test]
    fn a_guest_that_breaks_the_order_is_closed() {
        let mut link = LinkSession::new();
        assert!(matches!(link.take(ready()), Action::Close(_)));
        let mut old = LinkSession::new();
        assert!(matches!(old.take(GuestBody::AgentHello(AgentHello::default())), Action::Close(_)));
        let mut twice = LinkSession::new();
        twice.take(hello());
        assert!(matches!(twice.take(hello()), Action::Close(_)));
        let mut early = LinkSession::new();
        early.take(hello());
        assert!(matches!(early.take(GuestBody::MainStarted(Started { pid: 1 })), Action::Close(_)));
    }

    #[test]
    fn texts_of_the_guest_are_cut_and_cleaned() {
        let mut link = LinkSession::new();
        link.take(hello());
        let line = format!("\u{1b}[2J{}", "x".repeat(5000));
        let Action::Log(cleaned) = link.take(GuestBody::Log(Log { line })) else { panic!("a log line") };
        assert_eq!(cleaned.chars().count(), LOG_LINE_CHARS_MAX);
        assert!(!cleaned.contains('\u{1b}'));
        let failure = Failure { stage: "../../etc".into(), code: "nonsense".into(), ..Default::default() };
        let Action::BootFailed { stage, error } = link.take(GuestBody::BootFailed(failure)) else {
            panic!("a failure")
        };
        assert_eq!((stage.as_str(), error.code), ("other", ErrorCode::BootFailed));
    }

    #[test]
    fn a_guest_that_stands_by_is_up_when_it_is_renewed_again() {
        let opened = |holds| GuestBody::Opened(Opened { generation: GUEST_GENERATION, holds, ..Opened::default() });
        let mut link = LinkSession::renewing(true);
        assert_eq!(link.take(opened(true)), Action::Renewed { generation: GUEST_GENERATION, main_pid: 0 });
        assert_eq!(link.take(ready()), Action::Stands);
        assert_eq!(link.state(), LinkState::Standing);
        assert!(matches!(link.take(GuestBody::Log(Log { line: "x".into() })), Action::Log(_)));
        assert_eq!(link.take(ready()), Action::Ready(vec![]));
        assert_eq!(link.state(), LinkState::Up);
        assert!(matches!(link.take(ready()), Action::Close(_)));
        // Its workload would run by now.
        let Action::BootFailed { stage, error } = LinkSession::renewing(true).take(opened(false)) else {
            panic!("an agent that knows nothing of it")
        };
        assert_eq!((stage.as_str(), error.code), ("agent", ErrorCode::UnsupportedOperation));
        let mut other = LinkSession::renewing(false);
        other.take(opened(false));
        assert_eq!(other.take(ready()), Action::Ready(vec![]));
    }

    proptest! {
        #[test]
        fn nothing_is_believed_before_a_hello(kinds in prop::collection::vec(0u8..6, 1..20)) {
            let mut link = LinkSession::new();
            let mut greeted = false;
            for kind in kinds {
                let message = match kind {
                    0 => hello(),
                    1 => ready(),
                    2 => GuestBody::MainStarted(Started { pid: 1 }),
                    3 => GuestBody::MainExited(Exited::default()),
                    4 => GuestBody::Goodbye(Goodbye {}),
                    _ => GuestBody::MainOutput(Output { stream: 0, data: vec![] }),
                };
                let action = link.take(message);
                greeted |= matches!(action, Action::Welcome { .. });
                prop_assert!(greeted || matches!(action, Action::Close(_)));
            }
        }
    }
}
