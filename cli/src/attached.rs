//! A running command joined to this process: its output to our streams, our stdin to it, our signals and terminal to it.
//!
//! ```text
//!  stdin ──thread──► channel(1) ──► detach keys ──► SessionStdin (waits for credit) ──► service
//!  signals ─────────────────────► SessionControl ─────────────────────────────────────► service
//!  stdout, stderr ◄──thread── channel(4) ◄── Session::next, only when the channel has room ◄── service
//! ```
//!
//! What can block (a terminal that stopped, a pipe nobody reads) blocks a thread, never the loop: signals always get through. A
//! reader that stops stops the workload's output, and nothing grows meanwhile. Nobody stops a file or `/dev/null`: those are read and
//! written by the loop itself, which saves two switches of threads for each piece.

use std::os::fd::AsFd;

use bytes::Bytes;
use msb_protocol::frame::DATA_LEN_MAX;
use msb_protocol::state::ProcessEnd;
use msb_sdk::{Session, SessionEvent, SessionStdin};
use rustix::fs::{FileType, major, minor};
use tokio::sync::{mpsc, oneshot};

use crate::detach_keys::{DetachFilter, DetachKeys};
use crate::failure::Failure;
use crate::printer::{Printer, write_failure};
use crate::signals::{Meaning, Signals};
use crate::terminal::{self, RawTerminal};

/// Pieces of output between the loop and the writing thread.
const OUTPUT_QUEUE_LEN: usize = 4;

/// Major and minor number of `/dev/null` (null(4)).
const NULL_DEVICE: (u32, u32) = (1, 3);

/// How a session is joined.
#[derive(Clone, Debug)]
pub struct Joining {
    /// Whether the terminal is handed over.
    pub tty: bool,
    /// The keys that leave it.
    pub detach_keys: DetachKeys,
}

/// How it came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parting {
    /// The command ended.
    Ended(ProcessEnd),
    /// The detach keys were typed.
    Detached,
    /// The person insisted, with this signal.
    Insisted(i32),
}

#[derive(Clone, Copy)]
enum Stream {
    Out,
    Error,
}

/// Joins a session until it ends.
///
/// # Errors
/// The session's error; [`Failure::BrokenPipe`] and [`Failure::Output`] if our own output fails.
pub async fn join(
    mut session: Session,
    joining: &Joining,
    signals: &mut Signals,
    printer: &Printer,
) -> Result<Parting, Failure> {
    let raw = if joining.tty { Some(RawTerminal::enter()?) } else { None };
    let control = session.control();
    let mut typed = session.take_stdin().map(|stdin| {
        let filter = joining.tty.then(|| DetachFilter::new(&joining.detach_keys));
        tokio::spawn(pump_stdin(stdin, filter))
    });
    let (output, mut written) = start_writer();
    let at_once = [is_at_once(&std::io::stdout()), is_at_once(&std::io::stderr())];
    let parting = loop {
        // Takes an event only when there is room to put it.
        let event = async {
            match output.reserve().await {
                Ok(room) => Some((room, session.next().await)),
                Err(_) => None,
            }
        };
        tokio::select! {
            biased;
            meaning = signals.next() => match meaning {
                // In a task, because a service that does not read must not keep the next signal from being seen. A failure to send
                // is a lost session, which its reader tells.
                Meaning::Forward(number) => {
                    let control = control.clone();
                    tokio::spawn(async move { control.signal(number).await });
                }
                Meaning::Resize => if let (true, Some(size)) = (joining.tty, terminal::size()) {
                    control.resize(size).await?;
                },
                Meaning::Insist(number) => break Parting::Insisted(number),
            },
            result = &mut written => {
                let result = result.unwrap_or(Ok(()));
                drop(raw);
                return Err(write_failure(result).err().unwrap_or(Failure::BrokenPipe));
            }
            detached = async { match typed.as_mut() { Some(task) => task.await, None => std::future::pending().await } } => {
                typed = None;
                if detached.unwrap_or(false) {
                    break Parting::Detached;
                }
            }
            Some((room, event)) = event => match event? {
                Some(SessionEvent::Stdout(data)) if at_once[0] => write_failure(write_all(&std::io::stdout(), &data))?,
                Some(SessionEvent::Stderr(data)) if at_once[1] => write_failure(write_all(&std::io::stderr(), &data))?,
                Some(SessionEvent::Stdout(data)) => room.send((Stream::Out, data)),
                Some(SessionEvent::Stderr(data)) => room.send((Stream::Error, data)),
                Some(SessionEvent::OutputLost { bytes }) => printer.warning(&format!("{bytes} bytes of output were missed")),
                Some(SessionEvent::Started { .. }) => {}
                Some(SessionEvent::Exited(end)) => break Parting::Ended(end),
                None => break Parting::Ended(ProcessEnd::default()),
            },
        }
    };
    if let Some(task) = typed {
        task.abort();
    }
    drop(output);
    if let Parting::Insisted(_) = parting {
        // The writing thread may be stuck for ever; it ends with the process.
        return Ok(parting);
    }
    // The last output is written before the end is told, unless nobody reads it and the person does not want to wait.
    tokio::select! {
        biased;
        result = &mut written => {
            drop(raw);
            write_failure(result.unwrap_or(Ok(())))?;
            Ok(parting)
        }
        number = signals.ending() => Ok(Parting::Insisted(number)),
    }
}

/// Sends a file on within the credit.
async fn send_file(mut stdin: SessionStdin) {
    let mut buffer = vec![0; DATA_LEN_MAX];
    loop {
        match rustix::io::read(std::io::stdin(), &mut buffer) {
            Ok(0) => break,
            // A command that ended without reading everything is no failure.
            Ok(len) => {
                if stdin.write_all(&buffer[..len]).await.is_err() {
                    return;
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    let _ = stdin.finish().await;
}

/// Reads stdin, on a thread if that may wait, and sends it on within the credit. True if the detach keys were typed.
async fn pump_stdin(mut stdin: SessionStdin, mut filter: Option<DetachFilter>) -> bool {
    if is_at_once(&std::io::stdin()) {
        send_file(stdin).await;
        return false;
    }
    let (sender, mut typed) = mpsc::channel::<Bytes>(1);
    std::thread::spawn(move || {
        loop {
            // Sent on as it is. What is not filled was never touched, and costs nothing.
            let mut buffer = Vec::with_capacity(DATA_LEN_MAX);
            match rustix::io::read(std::io::stdin(), rustix::buffer::spare_capacity(&mut buffer)) {
                Ok(0) => return,
                Ok(_) => {
                    if sender.blocking_send(Bytes::from(buffer)).is_err() {
                        return;
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => wait_for(&std::io::stdin(), rustix::event::PollFlags::IN),
                Err(_) => return,
            }
        }
    });
    while let Some(data) = typed.recv().await {
        let (data, detach) = match &mut filter {
            Some(filter) => {
                let (data, detach) = filter.take(&data);
                (Bytes::from(data), detach)
            }
            None => (data, false),
        };
        // A command that ended without reading everything is no failure.
        if stdin.write_all(&data).await.is_err() {
            return false;
        }
        if detach {
            return true;
        }
    }
    let _ = stdin.finish().await;
    false
}

/// Starts the thread that writes; its end or failure comes through the receiver.
fn start_writer() -> (mpsc::Sender<(Stream, Bytes)>, oneshot::Receiver<std::io::Result<()>>) {
    let (sender, mut queue) = mpsc::channel::<(Stream, Bytes)>(OUTPUT_QUEUE_LEN);
    let (tell, written) = oneshot::channel();
    std::thread::spawn(move || {
        while let Some((stream, data)) = queue.blocking_recv() {
            let result = match stream {
                Stream::Out => write_all(&std::io::stdout(), &data),
                Stream::Error => write_all(&std::io::stderr(), &data),
            };
            if result.is_err() {
                let _ = tell.send(result);
                return;
            }
        }
        let _ = tell.send(Ok(()));
    });
    (sender, written)
}

/// Writes everything, also to a file that somebody else made non-blocking (a shared terminal or pipe).
fn write_all(file: &impl AsFd, mut data: &[u8]) -> std::io::Result<()> {
    while !data.is_empty() {
        match rustix::io::write(file, data) {
            Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
            Ok(len) => data = &data[len..],
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => wait_for(file, rustix::event::PollFlags::OUT),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Whether reading and writing it waits for nobody: a file on a disk, or the null device.
fn is_at_once(file: &impl AsFd) -> bool {
    rustix::fs::fstat(file).is_ok_and(|stat| match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => true,
        FileType::CharacterDevice => (major(stat.st_rdev), minor(stat.st_rdev)) == NULL_DEVICE,
        _ => false,
    })
}

fn wait_for(file: &impl AsFd, flags: rustix::event::PollFlags) {
    // A failure shows again, and is told, at the next read or write.
    let _ = rustix::event::poll(&mut [rustix::event::PollFd::new(file, flags)], None);
}
