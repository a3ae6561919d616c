//! One run of a program: how it is started, what came of it, and the checks tests make of that.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A command with a guest under software emulation behind it takes seconds; one that takes this long hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// A program about to be started.
pub struct Invocation {
    command: Command,
    line: String,
    input: Option<Vec<u8>>,
    patience: Duration,
}

impl Invocation {
    pub(crate) fn new(command: Command) -> Self {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let line = words.map(|word| shorten(&word.to_string_lossy())).collect::<Vec<_>>().join(" ");
        Self { command, line, input: None, patience: PATIENCE }
    }

    /// What it reads; without this its standard input is `/dev/null`.
    #[must_use]
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = Some(input.into());
        self
    }

    /// One more environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Started in this folder.
    #[must_use]
    pub fn folder(mut self, folder: &Path) -> Self {
        self.command.current_dir(folder);
        self
    }

    /// How long it may take.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Starts it and goes on.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start(mut self) -> Running {
        let stdin = if self.input.is_some() { Stdio::piped() } else { Stdio::null() };
        self.command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.command.spawn().unwrap_or_else(|error| panic!("cannot start {}: {error}", self.line));
        let input = self.input.zip(child.stdin.take()).map(|(bytes, mut pipe)| {
            // A program that ends without reading everything is its right, so a broken pipe is no fault.
            std::thread::spawn(move || drop(pipe.write_all(&bytes)))
        });
        let stdout = Collector::start(child.stdout.take());
        let stderr = Collector::start(child.stderr.take());
        Running { child, line: self.line, began: Instant::now(), patience: self.patience, input, stdout, stderr }
    }

    /// Runs it to its end.
    ///
    /// # Panics
    ///
    /// When it cannot be started or takes too long.
    #[must_use]
    pub fn run(self) -> Finished {
        self.start().finish()
    }
}

/// A program that runs.
pub struct Running {
    child: Child,
    line: String,
    began: Instant,
    patience: Duration,
    input: Option<JoinHandle<()>>,
    stdout: Collector,
    stderr: Collector,
}

impl Running {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed so far.
    #[must_use]
    pub fn printed(&self) -> String {
        self.stdout.text()
    }

    /// Waits until it has printed this text.
    ///
    /// # Panics
    ///
    /// When it ends or its time is up before.
    pub fn wait_for(&mut self, text: &str) {
        while !self.stdout.text().contains(text) {
            let ended = self.child.try_wait().expect("wait for the child");
            assert!(
                ended.is_none() && self.began.elapsed() < self.patience,
                "`{}` did not print {text:?} (ended: {ended:?})\nstdout: {}\nstderr: {}",
                self.line,
                self.stdout.text(),
                self.stderr.text()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a signal to it alone.
    pub fn signal(&self, signal: rustix::process::Signal) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Waits for its end.
    ///
    /// # Panics
    ///
    /// When it takes too long; it is killed then.
    #[must_use]
    pub fn finish(mut self) -> Finished {
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait for the child") {
                break status;
            }
            if self.began.elapsed() > self.patience {
                let _ = self.child.kill();
                let _ = self.child.wait();
                panic!(
                    "`{}` still ran after {:?} and was killed\nstdout: {}\nstderr: {}",
                    self.line,
                    self.patience,
                    self.stdout.text(),
                    self.stderr.text()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let took = self.began.elapsed();
        drop(self.input.take().map(JoinHandle::join));
        Finished { line: self.line, status, stdout: self.stdout.finish(), stderr: self.stderr.finish(), took }
    }
}

/// What came of a program.
#[derive(Debug)]
pub struct Finished {
    line: String,
    status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// How long it took.
    pub took: Duration,
}

impl Finished {
    /// Standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    #[must_use]
    pub fn complaint(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Its exit code; none when a signal killed it.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Checks the exit code.
    ///
    /// # Panics
    ///
    /// When it is another.
    #[track_caller]
    #[must_use]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.status.code(), Some(code), "{}", self.account());
        self
    }

    /// Checks that it succeeded.
    #[track_caller]
    #[must_use]
    pub fn succeeds(self) -> Self {
        self.exits(0)
    }

    /// Checks that its standard output is exactly this.
    ///
    /// # Panics
    ///
    /// When it is not.
    #[track_caller]
    pub fn prints(self, text: &str) -> Self {
        assert_eq!(self.text(), text, "{}", self.account());
        self
    }

    /// Checks that its standard output has this in it.
    ///
    /// # Panics
    ///
    /// When it has not.
    #[track_caller]
    pub fn shows(self, text: &str) -> Self {
        assert!(self.text().contains(text), "no {text:?} in\n{}", self.account());
        self
    }

    /// Checks that its standard error has this in it.
    ///
    /// # Panics
    ///
    /// When it has not.
    #[track_caller]
    pub fn complains(self, text: &str) -> Self {
        assert!(self.complaint().contains(text), "no {text:?} on standard error of\n{}", self.account());
        self
    }

    /// Checks that it wrote nothing to standard error.
    ///
    /// # Panics
    ///
    /// When it did.
    #[track_caller]
    pub fn is_quiet(self) -> Self {
        assert!(self.stderr.is_empty(), "{}", self.account());
        self
    }

    /// Everything about it, for a failed check.
    #[must_use]
    pub fn account(&self) -> String {
        format!(
            "`{}` ended with {} after {:.1?}\nstdout: {}\nstderr: {}",
            self.line,
            self.status,
            self.took,
            shorten(&self.text()),
            shorten(&self.complaint())
        )
    }
}

/// Reads a stream to its end beside everything else, so that a full pipe never stops the program.
struct Collector {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: Option<JoinHandle<()>>,
}

impl Collector {
    fn start(stream: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let thread = stream.map(|mut stream| {
            let bytes = Arc::clone(&bytes);
            std::thread::spawn(move || {
                let mut piece = vec![0; 64 << 10];
                while let Ok(count) = stream.read(&mut piece) {
                    if count == 0 {
                        break;
                    }
                    bytes.lock().expect("collected output").extend_from_slice(&piece[..count]);
                }
            })
        });
        Self { bytes, thread }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().expect("collected output")).into_owned()
    }

    fn finish(mut self) -> Vec<u8> {
        // The stream of a program that left a child behind (the daemon!) may stay open; what counts is what came until now.
        let deadline = Instant::now() + Duration::from_secs(2);
        if let Some(thread) = self.thread.take() {
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(thread.is_finished(), "something that outlived the command holds its output open");
        }
        std::mem::take(&mut *self.bytes.lock().expect("collected output"))
    }
}

/// The text, or its beginning and end when it is long.
fn shorten(text: &str) -> String {
    const KEPT: usize = 2000;
    let count = text.chars().count();
    if count <= 2 * KEPT {
        return text.to_owned();
    }
    let begin: String = text.chars().take(KEPT).collect();
    let end: String = text.chars().skip(count - KEPT).collect();
    format!("{begin}\n[… {} characters …]\n{end}", count - 2 * KEPT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(line: &str) -> Invocation {
        let mut command = Command::new("sh");
        command.arg("-c").arg(line);
        Invocation::new(command)
    }

    #[test]
    fn output_input_and_code_are_told_apart() {
        let finished = shell("cat; echo err >&2; exit 7").input("in").run().exits(7).prints("in").complains("err");
        assert_eq!(finished.code(), Some(7));
    }

    #[test]
    fn a_program_that_takes_too_long_is_killed_and_named() {
        let result = std::panic::catch_unwind(|| shell("exec sleep 60").patience(Duration::from_millis(200)).run());
        let message = *result.expect_err("a panic").downcast::<String>().expect("a message");
        assert!(message.contains("sleep 60") && message.contains("still ran"), "{message}");
    }

    #[test]
    fn something_that_holds_the_output_open_is_noticed() {
        assert!(std::panic::catch_unwind(|| shell("sleep 5 & exit 0").run()).is_err());
    }

    #[test]
    fn waiting_for_text_sees_it_while_the_program_runs() {
        let mut running = shell("echo ready; exec sleep 60").start();
        running.wait_for("ready");
        running.signal(rustix::process::Signal::KILL);
        assert_eq!(running.finish().code(), None);
    }
}
