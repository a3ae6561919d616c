//! Running other programs: one line that says what runs, output to a log when it is long, the log's end when it fails.
//!
//! Nothing here ever waits for an answer: standard input is `/dev/null`.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// A command that reads nothing and speaks English, started in the repository.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).env("LC_ALL", "C.UTF-8").current_dir(crate::cache::repository());
    command
}

/// The same, as root: directly, or through `sudo` that must not ask.
pub(crate) fn command_as_root(program: &str) -> Result<Command> {
    if rustix::process::geteuid().is_root() {
        return Ok(command(program));
    }
    if !can_become_root() {
        bail!("`{program}` needs root: run as root, or allow this user `sudo` without a password");
    }
    let mut sudo = command("sudo");
    sudo.args(["--non-interactive", "--preserve-env=DEBIAN_FRONTEND", program]);
    Ok(sudo)
}

/// Whether [`command_as_root`] will work here.
pub(crate) fn can_become_root() -> bool {
    rustix::process::geteuid().is_root()
        || command("sudo")
            .args(["--non-interactive", "true"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
}

/// Runs to the end with our own output streams; an error names the command.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let _ = std::io::stdout().flush();
    let status = command.status().with_context(|| format!("cannot start {}", describe(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", describe(command));
    }
    Ok(())
}

/// Runs to the end with all output in `log`; prints one line before and one after, and the log's last lines on failure.
pub(crate) fn run_logged(what: &str, command: &mut Command, log: &Path) -> Result<()> {
    if let Some(folder) = log.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut file = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot open {}", log.display()))?;
    writeln!(file, "$ {}", describe(command))?;
    println!("  {what} …");
    let began = Instant::now();
    let status = command
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("cannot start {}", describe(command)))?;
    if !status.success() {
        let text = std::fs::read(log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(30)..] {
            eprintln!("    {line}");
        }
        bail!("{what}: {} ended with {status}; the whole log is {}", describe(command), log.display());
    }
    println!("  {what}: {:.0} s", began.elapsed().as_secs_f64());
    Ok(())
}

/// Runs to the end and returns what it printed; its complaints are part of the error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {}", describe(command)))?;
    if !output.status.success() {
        bail!("{} ended with {}: {}", describe(command), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("{} printed something that is not text", describe(command)))
}

/// Whether a program of this name is on the path (or in the folders of the administrator, which a user's path may lack).
pub(crate) fn is_installed(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).any(|folder| folder.join(name).is_file())
}

/// The command as a person would type it.
fn describe(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    words.join(" ")
}
