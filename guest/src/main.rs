//! `msb-agent`: started by the kernel as `/init` it is PID 1, started by PID 1 it is the agent, started by the agent as a user it is
//! that user's SFTP server, or ends at once. It takes no other orders.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        return msb_guest::init::run();
    }
    let mut arguments = std::env::args_os().skip(1);
    match (arguments.next(), arguments.next()) {
        (Some(word), None) if word == msb_guest::init::AGENT_ARGUMENT => msb_guest::agent::run(),
        (Some(word), None) if word == msb_guest::sftp::ARGUMENT => msb_guest::sftp::run(),
        (Some(word), None) if word == msb_guest::session::exec::REHEARSAL_ARGUMENT => ExitCode::SUCCESS,
        _ => {
            say("msb-agent runs inside a sandbox: it is started by its kernel, not by hand");
            ExitCode::from(2)
        }
    }
}

#[expect(clippy::print_stderr, reason = "the one line for a person who starts this program by hand")]
fn say(line: &str) {
    eprintln!("{line}");
}
