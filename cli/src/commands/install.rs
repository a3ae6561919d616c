//! `msb install`: a command on the host that runs an image, as a small script in `MSB_HOME/bin`. Also what `uninstall` shares with it.

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Args;
use msb_protocol::error::{ApiError, ErrorCode};

use crate::context::Context;
use crate::failure::{ExitStatus, Failure, invalid};
use crate::table::Table;
use crate::{parse, root};

/// The line by which such a script is known; nothing else is ever overwritten or removed.
const MARK: &str = "# made by msb install for image ";
/// Longest script that is looked at, in bytes.
const SCRIPT_LEN_MAX: usize = 256 << 10;

/// Options of `install`.
#[derive(Debug, Args)]
#[command(
    override_usage = "msb install [OPTIONS] IMAGE [COMMAND]...\n       msb install --list",
    after_help = "The command runs the image in a sandbox of its own each time, with stdin, and with a terminal where there is one. Its \
                  arguments come after COMMAND, or after the image's entrypoint. Variables given as a bare KEY are taken when it runs."
)]
pub struct InstallArgs {
    /// Name of the command; without it the last part of the image's name
    #[arg(short, long)]
    pub name: Option<String>,
    /// Processors
    #[arg(short, long, value_name = "COUNT")]
    pub cpus: Option<u32>,
    /// Memory, as in 512M
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Set a variable; a bare KEY takes the host's value when the command runs
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub env: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "PATH")]
    pub workdir: Option<String>,
    /// Replace a command that msb installed under this name
    #[arg(short, long)]
    pub force: bool,
    /// Show the commands that are installed
    #[arg(short, long, conflicts_with = "image_and_command")]
    pub list: bool,
    /// The image, and what to run of it; without a command the image's own
    #[arg(required_unless_present = "list", num_args = 1.., trailing_var_arg = true, value_names = ["IMAGE", "COMMAND"])]
    pub image_and_command: Vec<String>,
}

/// Carries it out.
///
/// # Errors
/// `invalid_name`, `invalid_config`, `path_exists` for a name that is taken, `home_unusable`.
pub async fn run(args: InstallArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let directory = directory(context);
    if args.list {
        return list(&directory, context);
    }
    let (image, command) = super::create::split(args.image_and_command.clone());
    // The command runs from anywhere.
    let image = root::local(&image)?.map_or(image, |(_, path)| path);
    let name = match &args.name {
        Some(name) => name.clone(),
        None => name_of(&image).ok_or_else(|| invalid(format!("--name is needed: {image:?} has no name to take")))?,
    };
    parse::name(&name)?;
    let program =
        std::env::current_exe().map_err(|error| ApiError::internal(format!("cannot find msb itself: {error}")))?;
    let script = script(&args, &image, &command, &program)?;
    let path = directory.join(&name);
    match image_of(&path) {
        Ok(Some(_)) if args.force => {}
        Ok(Some(old)) => {
            let message = format!("the command {name} is installed already, for image {old}");
            return Err(ApiError::new(ErrorCode::PathExists, message)
                .with_hint("choose another --name, or use --force")
                .into());
        }
        Ok(None) if path.symlink_metadata().is_ok() => {
            let message = format!("{} exists and was not made by msb install", path.display());
            return Err(ApiError::new(ErrorCode::PathExists, message).with_hint("choose another --name").into());
        }
        Ok(None) => {}
        Err(error) => return Err(failed(&path, &error)),
    }
    write(&directory, &name, &script).map_err(|error| failed(&path, &error))?;
    if context.printer.is_json() {
        context.printer.json(&serde_json::json!({ "name": name, "image": image, "path": path }))?;
    } else {
        context.printer.text(&path.display().to_string())?;
    }
    let on_path =
        std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|entry| entry == directory));
    if !on_path {
        context.printer.note(&format!("{} is not in PATH; add it to type just {name}", directory.display()));
    }
    Ok(ExitStatus::SUCCESS)
}

/// Where installed commands are.
pub(super) fn directory(context: &Context) -> PathBuf {
    context.locator.surroundings.home_dir().join("bin")
}

/// The error of a script that cannot be read or written.
pub(super) fn failed(path: &Path, error: &std::io::Error) -> Failure {
    let code = match error.kind() {
        std::io::ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
        std::io::ErrorKind::StorageFull => ErrorCode::DiskFull,
        _ => ErrorCode::HomeUnusable,
    };
    ApiError::new(code, format!("{}: {error}", path.display())).into()
}

/// The image of an installed command; none for anything else, or nothing.
///
/// # Errors
/// Those of reading.
pub(super) fn image_of(path: &Path) -> std::io::Result<Option<String>> {
    use std::io::Read;
    match path.symlink_metadata() {
        Ok(file) if file.is_file() => {}
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    }
    let mut text = Vec::new();
    std::fs::File::open(path)?.take(SCRIPT_LEN_MAX as u64).read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().nth(1).and_then(|line| line.strip_prefix(MARK)).map(str::to_owned))
}

fn list(directory: &Path, context: &Context) -> Result<ExitStatus, Failure> {
    let mut commands = Vec::new();
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => Some(entries),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed(directory, &error)),
    };
    for entry in entries.into_iter().flatten().flatten() {
        if let (Ok(name), Ok(Some(image))) = (entry.file_name().into_string(), image_of(&entry.path())) {
            commands.push((name, image));
        }
    }
    commands.sort();
    if context.printer.is_json() {
        let rows: Vec<_> =
            commands.iter().map(|(name, image)| serde_json::json!({ "name": name, "image": image })).collect();
        context.printer.json(&rows)?;
        return Ok(ExitStatus::SUCCESS);
    }
    let mut table = Table::new(&["NAME", "IMAGE"]);
    for (name, image) in commands {
        table.row(vec![name, image]);
    }
    context.printer.table(&table)?;
    Ok(ExitStatus::SUCCESS)
}

/// `registry/team/tool:1.2` is `tool`.
fn name_of(image: &str) -> Option<String> {
    let image = image.split('@').next().unwrap_or(image);
    let last = image.rsplit('/').next()?;
    let name = last.split(':').next()?;
    (!name.is_empty()).then(|| name.to_owned())
}

fn script(args: &InstallArgs, image: &str, command: &[String], program: &Path) -> Result<String, Failure> {
    let Some(program) = program.to_str() else {
        return Err(invalid(format!("the path of msb is not UTF-8: {}", program.display())));
    };
    if image.chars().any(char::is_control) {
        return Err(invalid("the image's name holds a control character"));
    }
    let mut words = vec![program.to_owned(), "run".to_owned(), "--interactive".to_owned()];
    let mut option = |name: &str, value: Option<String>| words.extend(value.map(|value| format!("--{name}={value}")));
    option("cpus", args.cpus.map(|cpus| cpus.to_string()));
    option("memory", args.memory.clone());
    option("workdir", args.workdir.clone());
    for variable in &args.env {
        option("env", Some(variable.clone()));
    }
    let options = words.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" ");
    let rest =
        std::iter::once(image).chain(command.iter().map(String::as_str)).map(quote).collect::<Vec<_>>().join(" ");
    let mut script = format!("#!/bin/sh\n{MARK}{image}\n");
    // The terminal only where there is one on both ends: in a pipe the command is a filter.
    let _ = writeln!(script, "tty=\nif [ -t 0 ] && [ -t 1 ]; then tty=--tty; fi");
    let _ = writeln!(script, "exec {options} $tty -- {rest} \"$@\"");
    if script.contains('\0') {
        return Err(invalid("an argument holds a NUL byte"));
    }
    Ok(script)
}

/// A word as the shell takes it literally.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// Written beside its place and renamed, so that a command that is being run is never half a script.
fn write(directory: &Path, name: &str, script: &str) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let temporary = directory.join(format!(".{name}.{}", std::process::id()));
    let outcome = std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o755)
        .open(&temporary)
        .and_then(|mut file| file.write_all(script.as_bytes()))
        .and_then(|()| std::fs::rename(&temporary, directory.join(name)));
    if outcome.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> InstallArgs {
        InstallArgs {
            name: None,
            cpus: Some(2),
            memory: Some("1G".into()),
            env: vec!["A=it's $HOME".into()],
            workdir: None,
            force: false,
            list: false,
            image_and_command: Vec::new(),
        }
    }

    #[test]
    fn the_script_passes_every_word_as_it_is() {
        // A program that prints its words in place of msb.
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("it's msb");
        std::fs::write(&program, "#!/bin/sh\nprintf '<%s>' \"$@\"\n").unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let script =
            script(&args(), "team/tool:1", &["sh".into(), "-c".into(), "echo \"$1\"; `x`".into()], &program).unwrap();
        write(directory.path(), "tool", &script).unwrap();
        let path = directory.path().join("tool");
        assert_eq!(image_of(&path).unwrap().as_deref(), Some("team/tool:1"));
        let output = std::process::Command::new(&path)
            .args(["a b", "*", ""])
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            "<run><--interactive><--cpus=2><--memory=1G><--env=A=it's $HOME><--><team/tool:1><sh><-c><echo \"$1\"; `x`><a b><*><>"
        );
    }

    #[test]
    fn names_come_from_the_image_and_foreign_files_are_left_alone() {
        for (image, name) in [
            ("busybox", Some("busybox")),
            ("registry:5000/team/tool:1.2", Some("tool")),
            ("tool@sha256:00", Some("tool")),
            ("x/", None),
        ] {
            assert_eq!(name_of(image).as_deref(), name, "{image}");
        }
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("mine"), "#!/bin/sh\necho mine\n").unwrap();
        assert_eq!(image_of(&directory.path().join("mine")).unwrap(), None);
        assert_eq!(image_of(&directory.path().join("none")).unwrap(), None);
        assert_eq!(image_of(directory.path()).unwrap(), None);
    }
}
