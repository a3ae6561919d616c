//! `msb self`: the installation itself. `stop` ends the service; `uninstall` takes away what `cargo xtask install` or the tarball laid down,
//! after the manifest that they left.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use clap::{Args, Subcommand};
use msb_protocol::control::ShutdownRequest;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_sdk::Client;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};
use serde::Serialize;

use crate::context::Context;
use crate::failure::{self, ExitStatus, Failure, invalid};
use crate::terminal;

/// The manifest below the prefix: one path a line, relative to the prefix.
pub const MANIFEST: &str = "share/msb/installed.txt";
/// Longest wait for the end of a service that has promised it.
const END_PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
/// State and sockets of the host's service.
const OF_THE_HOST: [&str; 2] = ["/var/lib/msb", "/run/msb"];
/// Units that may be active.
const UNITS: [&str; 3] = ["msbd.socket", "msbd.service", "msb-flush.service"];

/// What to do with the installation.
#[derive(Debug, Subcommand)]
pub enum SelfCommand {
    /// Stop the service; sandboxes go on
    Stop(StopArgs),
    /// Stop everything and remove msb from this host
    Uninstall(UninstallArgs),
}

/// Options of `self stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Stop the sandboxes first; those with --restart always or unless-stopped come back with the service
    #[arg(long)]
    pub sandboxes: bool,
}

/// Options of `self uninstall`.
#[derive(Debug, Args)]
pub struct UninstallArgs {
    /// Also remove every sandbox, image, volume and setting of yours
    #[arg(long)]
    pub purge: bool,
    /// Only print what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Do not ask; needed where nobody can be asked
    #[arg(short, long)]
    pub yes: bool,
}

/// Carries it out.
///
/// # Errors
/// Those of the service and of the file system.
pub async fn run(command: SelfCommand, context: &Context) -> Result<ExitStatus, Failure> {
    match command {
        SelfCommand::Stop(args) => stop(args.sandboxes, context).await,
        SelfCommand::Uninstall(args) => uninstall(&args, context).await,
    }
}

async fn stop(sandboxes: bool, context: &Context) -> Result<ExitStatus, Failure> {
    // Nothing is started to be stopped.
    let Some(client) = context.locator.find().await? else {
        context.printer.note("no service runs");
        return Ok(ExitStatus::SUCCESS);
    };
    let progress = context.printer.spinner("stopping the service");
    let process = process_of(&client);
    client.shut_down(ShutdownRequest { sandboxes }).await?;
    if let Some(process) = process {
        // Nothing of it writes into its home or answers on its socket afterwards.
        let waited = tokio::task::spawn_blocking(move || {
            rustix::event::poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&END_PATIENCE))
        });
        if !matches!(waited.await, Ok(Ok(1))) {
            context.printer.warning("the service has not ended yet");
        }
    }
    drop(progress);
    Ok(ExitStatus::SUCCESS)
}

/// The service's process, to see its end; none if it runs elsewhere or as somebody else's.
fn process_of(client: &Client) -> Option<OwnedFd> {
    let pid = Pid::from_raw(client.version().pid.try_into().ok()?)?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()
}

#[derive(Serialize)]
struct Removed {
    removed: Vec<PathBuf>,
    kept: Vec<PathBuf>,
}

async fn uninstall(args: &UninstallArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let prefix = prefix()?;
    let Installed { files, folders } = installed(&prefix)?;
    let home = context.locator.surroundings.home_dir();
    let sockets = context.locator.surroundings.runtime_dir();
    let (mut removed, mut kept) = (Vec::from_iter(files.iter().cloned()), Vec::new());
    let mut own = vec![home, sockets];
    // The service of the host is root's; somebody who names a home of their own means no other.
    if context.locator.surroundings.uid == 0 && context.locator.surroundings.msb_home.is_none() {
        own.extend(OF_THE_HOST.map(PathBuf::from));
    }
    own.retain(|path| path.exists());
    if args.purge {
        removed.extend(own.clone());
    } else {
        kept.extend(own.clone());
    }
    if !args.dry_run {
        if !args.yes && !agreed(args, &prefix)? {
            context.printer.note("Nothing was removed.");
            return Ok(ExitStatus::FAILURE);
        }
        // Sandboxes end with a flush whether or not they are kept: nothing of msb may run afterwards.
        stop(true, context).await?;
        disable_units(context);
        // Sockets may lie in the home, and are gone with it.
        for path in own.iter().filter(|path| args.purge && path.exists()) {
            remove_own(path)?;
        }
        for path in &files {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failure::file(path, &error)),
                _ => {}
            }
        }
        // The inner ones first; one that holds something of somebody else's stays.
        folders.iter().rev().for_each(|folder| drop(std::fs::remove_dir(folder)));
    }
    if context.printer.is_json() {
        context.printer.json(&Removed { removed, kept })?;
    } else if !context.printer.is_quiet() {
        let lines: String = removed.iter().map(|path| format!("{}\n", path.display())).collect();
        context.printer.text(&lines)?;
        for path in kept {
            context.printer.note(&format!("{} stays; --purge removes it too", path.display()));
        }
    }
    Ok(ExitStatus::SUCCESS)
}

/// The prefix of this very program: `P/bin/msb`.
fn prefix() -> Result<PathBuf, Failure> {
    let program = std::env::current_exe().map_err(|error| invalid(format!("msb does not find itself: {error}")))?;
    match (program.parent(), program.parent().and_then(Path::parent)) {
        (Some(folder), Some(prefix)) if folder.ends_with("bin") => Ok(prefix.to_owned()),
        _ => Err(not_installed(&program)),
    }
}

fn not_installed(place: &Path) -> Failure {
    let message = format!("{} was not laid down by an installation that can be taken back", place.display());
    let hint = "if it came as a package, use its manager: apt-get remove msb";
    ApiError::new(ErrorCode::RuntimeNotFound, message).with_hint(hint).into()
}

/// What an installation laid down, after its manifest.
#[derive(Debug, Default)]
struct Installed {
    files: BTreeSet<PathBuf>,
    /// Folders that were not there before.
    folders: BTreeSet<PathBuf>,
}

fn installed(prefix: &Path) -> Result<Installed, Failure> {
    let text = std::fs::read_to_string(prefix.join(MANIFEST)).map_err(|_| not_installed(prefix))?;
    listed(prefix, &text).ok_or_else(|| not_installed(prefix))
}

/// The manifest's paths, a folder's with a slash at its end; `None` if one of them leads out of the prefix.
fn listed(prefix: &Path, text: &str) -> Option<Installed> {
    let mut installed = Installed::default();
    installed.files.insert(prefix.join(MANIFEST));
    for line in text.lines().filter(|line| !line.is_empty()) {
        let (path, paths) = match line.strip_suffix('/') {
            Some(folder) => (Path::new(folder), &mut installed.folders),
            None => (Path::new(line), &mut installed.files),
        };
        if path.as_os_str().is_empty() || !path.components().all(|part| matches!(part, Component::Normal(_))) {
            return None;
        }
        paths.insert(prefix.join(path));
    }
    Some(installed)
}

fn agreed(args: &UninstallArgs, prefix: &Path) -> Result<bool, Failure> {
    if !terminal::stdin_is_terminal() {
        let error = ApiError::new(ErrorCode::InvalidConfig, "nobody can be asked here; use --yes to remove msb")
            .with_hint("--dry-run shows what would go");
        return Err(error.into());
    }
    let what = if args.purge { ", with every sandbox, image and volume of yours" } else { "" };
    terminal::agreed(&format!("Remove msb from {}{what}?", prefix.display()))
}

/// Stops and disables what systemd may know of msb, for this user and, as root, for the host. Without systemd there is nothing to do.
fn disable_units(context: &Context) {
    let root = rustix::process::geteuid().is_root();
    for scope in if root { &["--system", "--user"][..] } else { &["--user"] } {
        let outcome = std::process::Command::new("systemctl")
            .args([scope, "--quiet", "disable", "--now"])
            .args(UNITS)
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status();
        if outcome.is_ok_and(|status| status.success()) {
            context.printer.note(&format!("systemd ({}) has stopped its units", scope.trim_start_matches('-')));
        }
    }
}

/// A folder of msb's own. It is looked at twice before it goes: a home that holds no daemon's lock is not one.
fn remove_own(path: &Path) -> Result<(), Failure> {
    let known =
        ["msbd.lock", "msbd.sock", "state", "vm", "images", "users"].iter().any(|name| path.join(name).exists());
    let empty = path.read_dir().is_ok_and(|mut entries| entries.next().is_none());
    if !known && !empty {
        return Err(invalid(format!(
            "{} does not look like a folder of msb; nothing in it was removed",
            path.display()
        )));
    }
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failure::file(path, &error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_tells_files_from_folders_and_never_leads_out_of_its_prefix() {
        let prefix = Path::new("/opt/msb");
        let installed = listed(prefix, "bin/msb\nshare/msb/vmlinux\nshare/msb/\nshare/\n").unwrap();
        assert!(installed.files.contains(Path::new("/opt/msb/bin/msb")));
        assert_eq!(Vec::from_iter(installed.folders), [Path::new("/opt/msb/share"), Path::new("/opt/msb/share/msb")]);
        for bad in ["/etc/passwd", "../x", "bin/../../x", "./bin", "../x/", "/"] {
            assert!(listed(prefix, bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn only_folders_of_msb_are_purged() {
        let top = tempfile::tempdir().unwrap();
        let (home, other) = (top.path().join("home"), top.path().join("other"));
        std::fs::create_dir_all(home.join("state")).unwrap();
        std::fs::create_dir_all(other.join("thesis")).unwrap();
        remove_own(&home).unwrap();
        assert!(!home.exists());
        assert!(remove_own(&other).is_err() && other.join("thesis").exists());
        // A second time nothing is there.
        assert!(remove_own(&home).is_err());
    }
}
