//! The options that `run` and `create` share, and how they become a spec: flag over variable over file over default.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};
use msb_protocol::config::Config;
use msb_protocol::error::ApiError;
use msb_protocol::security::SecurityProfile;
use msb_protocol::snapshot::SnapshotDetail;
use msb_protocol::spec::{EngineChoice, OnIdle, RestartPolicy, Rlimit, STOP_GRACE_MS_DEFAULT, SandboxSpec};

use crate::care::CareArgs;
use crate::failure::{self, Failure};
use crate::mounts::MountArgs;
use crate::network_options::NetworkArgs;
use crate::{env_file, parse};

/// Which engine runs the virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// kvm where the host's KVM passes the probe, else qemu
    Auto,
    /// Hardware virtualisation
    Kvm,
    /// Software emulation: slow, and not a security boundary
    Qemu,
}

/// When to fetch the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Pull {
    /// Even if the store has it: a tag may have moved
    Always,
    /// If the store does not have it
    #[default]
    IfMissing,
    /// Never
    Never,
}

/// What a workload may do inside its sandbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Security {
    /// What root of a machine may do: sudo and container engines work
    #[default]
    Default,
    /// No new privileges, no capability that reaches the guest's kernel, nosuid and nodev on every mount
    Restricted,
    /// As restricted, with a list of allowed system calls and a read-only root
    Strict,
}

impl From<Security> for SecurityProfile {
    fn from(security: Security) -> Self {
        match security {
            Security::Default => Self::Default,
            Security::Restricted => Self::Restricted,
            Security::Strict => Self::Strict,
        }
    }
}

/// What follows an idle stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Idle {
    /// Sleep until somebody needs it
    #[default]
    Stop,
    /// Start again at once
    Restart,
    /// Sleep with its memory on disk, and go on from it (engine kvm)
    Suspend,
}

/// Options that `run` and `create` share.
#[derive(Clone, Debug, Args)]
#[command(disable_help_flag = true)]
pub struct CreationArgs {
    /// Name of the sandbox; one is made up if there is none
    #[arg(short, long, value_name = "NAME")]
    pub name: Option<String>,
    /// Begin with the disk, image, environment and size of a snapshot, in place of an image
    #[arg(long, value_name = "NAME", conflicts_with = "pull")]
    pub snapshot: Option<String>,
    /// Virtual CPUs
    #[arg(short, long, value_name = "COUNT")]
    pub cpus: Option<u32>,
    /// Memory, as in 512M or 2G; a bare number counts MiB
    #[arg(short, long, value_name = "SIZE", value_parser = parse::mib)]
    pub memory: Option<u32>,
    /// Size of the writable root; it takes host space only as it fills
    #[arg(long, value_name = "SIZE", value_parser = parse::mib)]
    pub root_size: Option<u32>,
    /// Set a variable; a bare KEY takes the host's value
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub env: Vec<String>,
    /// Set the variables of a file in docker's form
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Set a label
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub label: Vec<String>,
    /// Set the labels of a file in docker's form
    #[arg(long, value_name = "FILE")]
    pub label_file: Vec<PathBuf>,
    /// Working directory, in place of the image's
    #[arg(short, long, value_name = "PATH")]
    pub workdir: Option<String>,
    /// User, in place of the image's
    #[arg(short, long, value_name = "USER|UID[:GROUP|GID]")]
    pub user: Option<String>,
    /// Hostname, in place of the sandbox's name
    #[arg(short = 'h', short_alias = 'H', long, value_name = "HOST")]
    pub hostname: Option<String>,
    /// Entrypoint, in place of the image's; an empty one removes it
    #[arg(long, value_name = "WORD")]
    pub entrypoint: Option<String>,
    /// Set a limit of every process, as in nofile=1024:4096
    #[arg(long = "rlimit", visible_alias = "ulimit", value_name = "RES=SOFT[:HARD]", value_parser = parse::rlimit)]
    pub rlimits: Vec<Rlimit>,
    /// Signal that asks the workload to stop, in place of the image's
    #[arg(long, value_name = "SIGNAL")]
    pub stop_signal: Option<String>,
    /// Time between that signal and the kill, as in 10s; a bare number counts seconds
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    pub stop_timeout: Option<u64>,
    /// Engine of the virtual machine
    #[arg(long, value_enum)]
    pub engine: Option<Engine>,
    /// Kernel of the guest, a vmlinux or bzImage, in place of the installed one
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Remove an existing sandbox of this name first
    #[arg(long, requires = "name")]
    pub replace: bool,
    /// As --replace, with this time for it to stop; 0 kills it at once
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms, requires = "name")]
    pub replace_with_timeout: Option<u64>,
    /// When to fetch the image
    #[arg(long, value_enum, default_value_t)]
    pub pull: Pull,
    /// What the workload may do in its sandbox; without it, `default` or what the snapshot says
    #[arg(long, value_enum)]
    pub security: Option<Security>,
    /// What follows the workload's end: no, on-failure[:N], always, unless-stopped
    #[arg(long, value_name = "POLICY", value_parser = parse::restart)]
    pub restart: Option<RestartPolicy>,
    /// Stop it after this time without activity
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    pub idle_timeout: Option<u64>,
    /// What follows an idle stop
    #[arg(long, value_enum, requires = "idle_timeout")]
    pub on_idle: Option<Idle>,
    /// End every run after this time
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms)]
    pub max_duration: Option<u64>,
    /// Its network.
    #[command(flatten)]
    pub network: NetworkArgs,
    /// Health checks and the pre-stop hook.
    #[command(flatten)]
    pub care: CareArgs,
    /// Print help
    #[arg(long, action = ArgAction::Help, help_heading = "Options")]
    pub help: Option<bool>,
    /// Mounts and patches.
    #[command(flatten)]
    pub mounts: MountArgs,
    /// Options of parts that have yet to be built.
    #[command(flatten)]
    pub unbuilt: UnbuiltArgs,
}

macro_rules! unbuilt_options {
    ($($field:ident $part:literal $(#[$attribute:meta])*;)*) => {
        /// Options of parts that are not built yet. They are known, so that the answer is `not_implemented` and not a guess about a typing error.
        #[derive(Clone, Debug, Default, Args)]
        pub struct UnbuiltArgs {
            $(#[doc = $part] $(#[$attribute])* #[arg(long, hide = true, num_args = 0..=1, value_name = "VALUE", action = ArgAction::Append)] pub $field: Option<Vec<String>>,)*
        }

        impl UnbuiltArgs {
            /// The first option that was given, and the part it belongs to.
            fn given(&self) -> Option<(&'static str, &'static str)> {
                $(if self.$field.is_some() { return Some((stringify!($field), $part)); })*
                None
            }
        }
    };
}

unbuilt_options! {
    secret "secrets";
    tls_intercept "TLS interception";
    init "handing PID 1 to another init";
    shell "choosing a shell";
    log_level "a log level for each sandbox";
}

impl CreationArgs {
    /// The spec of an image, or of a snapshot in its place, with these options. What can be checked later (by the SDK and the daemon) is not checked here.
    ///
    /// # Errors
    /// `not_implemented` for what is not built, `invalid_config` and `path_not_found` naming the value.
    pub fn spec(
        &self,
        (image, snapshot): (&str, Option<&SnapshotDetail>),
        config: &Config,
        host: &dyn Fn(&str) -> Option<String>,
    ) -> Result<SandboxSpec, Failure> {
        self.refuse_unbuilt()?;
        let mut spec = match snapshot {
            Some(snapshot) => SandboxSpec { snapshot: Some(snapshot.summary.name.clone()), ..snapshot.spec.clone() },
            None => SandboxSpec {
                cpus: u32::try_from(config.number("sandbox.cpus")).unwrap_or(u32::MAX),
                memory_mib: whole_mib(config.bytes("sandbox.memory")),
                root_size_mib: whole_mib(config.bytes("sandbox.root_size")),
                stop_grace_ms: config.duration_ms("sandbox.stop_grace"),
                ..SandboxSpec::new(image)
            },
        };
        spec.name = self.name.as_deref().map(parse::name).transpose()?;
        spec.cpus = self.cpus.unwrap_or(spec.cpus);
        spec.memory_mib = self.memory.unwrap_or(spec.memory_mib);
        spec.root_size_mib = self.root_size.unwrap_or(spec.root_size_mib);
        // As in docker, the command line wins over files, and of two files the later.
        for path in &self.env_file {
            spec.env.extend(env_file::read(path, host)?);
        }
        for text in &self.env {
            let (name, value) = parse::env(text, host)?;
            spec.env.insert(name, value);
        }
        for path in &self.label_file {
            spec.labels.extend(env_file::read_labels(path)?);
        }
        spec.labels.extend(parse::labels(&self.label));
        over(&mut spec.workdir, &self.workdir);
        over(&mut spec.user, &self.user);
        over(&mut spec.hostname, &self.hostname);
        if let Some(word) = &self.entrypoint {
            spec.entrypoint = Some(if word.is_empty() { Vec::new() } else { vec![word.clone()] });
            // As with an image: another entrypoint does not take the words that were meant for the first.
            spec.command = None;
        }
        if !self.rlimits.is_empty() {
            spec.rlimits.clone_from(&self.rlimits);
        }
        over(&mut spec.stop_signal, &self.stop_signal);
        spec.stop_grace_ms = self.stop_timeout.unwrap_or(spec.stop_grace_ms);
        spec.engine = self.engine.map_or_else(|| engine_of(config), engine);
        spec.kernel = self.kernel(config)?;
        spec.restart = self.restart.unwrap_or_default();
        spec.idle_timeout_ms = self.idle_timeout;
        spec.on_idle = match self.on_idle {
            Some(Idle::Restart) => OnIdle::Restart,
            Some(Idle::Suspend) => OnIdle::Suspend,
            Some(Idle::Stop) | None => OnIdle::Stop,
        };
        spec.max_duration_ms = self.max_duration;
        spec.network = self.network.spec()?;
        spec.security = self.security.map_or(spec.security, SecurityProfile::from);
        self.mounts.apply(&mut spec)?;
        self.care.apply(&mut spec)?;
        Ok(spec)
    }

    /// Time for a sandbox that is to be replaced to stop, if one may be.
    #[must_use]
    pub fn replace_grace_ms(&self) -> Option<u64> {
        self.replace_with_timeout.or(self.replace.then_some(STOP_GRACE_MS_DEFAULT))
    }

    fn refuse_unbuilt(&self) -> Result<(), Failure> {
        let refuse =
            |option: &str, part: &str| Err(Failure::Api(ApiError::not_implemented(&format!("{option} ({part})"))));
        if let Some((field, part)) = self.unbuilt.given() {
            return refuse(&format!("--{}", field.replace('_', "-")), part);
        }
        Ok(())
    }

    fn kernel(&self, config: &Config) -> Result<Option<String>, Failure> {
        let configured = || config.text("kernel").map(PathBuf::from);
        let Some(path) = self.kernel.clone().or_else(configured) else { return Ok(None) };
        // The daemon lives in another directory than the caller.
        let whole = path.canonicalize().map_err(|error| failure::file(&path, &error))?;
        match whole.into_os_string().into_string() {
            Ok(text) => Ok(Some(text)),
            Err(_) => Err(failure::invalid(format!("the path of the kernel is no UTF-8 text: {}", path.display()))),
        }
    }
}

/// What was said on the command line, if something was.
fn over(field: &mut Option<String>, said: &Option<String>) {
    if said.is_some() {
        field.clone_from(said);
    }
}

fn whole_mib(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX)
}

fn engine(engine: Engine) -> EngineChoice {
    match engine {
        Engine::Auto => EngineChoice::Auto,
        Engine::Kvm => EngineChoice::Kvm,
        Engine::Qemu => EngineChoice::Qemu,
    }
}

fn engine_of(config: &Config) -> EngineChoice {
    match config.text("engine") {
        Some("kvm") => EngineChoice::Kvm,
        Some("qemu") => EngineChoice::Qemu,
        _ => EngineChoice::Auto,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use msb_protocol::error::ErrorCode;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        creation: CreationArgs,
    }

    fn spec_with(words: &[&str], config: &Config) -> Result<SandboxSpec, Failure> {
        let line = Line::try_parse_from(std::iter::once("x").chain(words.iter().copied())).unwrap();
        line.creation.spec(("busybox", None), config, &|name| (name == "FROM_HOST").then(|| "h".into()))
    }

    fn spec(words: &[&str]) -> SandboxSpec {
        spec_with(words, &Config::default()).unwrap()
    }

    fn refused(words: &[&str]) -> ErrorCode {
        match spec_with(words, &Config::default()) {
            Err(Failure::Api(error)) => error.code,
            other => panic!("{words:?}: {other:?}"),
        }
    }

    #[test]
    fn without_options_a_spec_has_the_defaults() {
        assert_eq!(spec(&[]), SandboxSpec::new("busybox"));
    }

    #[test]
    fn options_reach_their_fields() {
        let spec = spec(&[
            "-n",
            "box",
            "-c",
            "2",
            "-m",
            "256M",
            "--root-size",
            "1G",
            "-e",
            "A=1",
            "-e",
            "FROM_HOST",
            "-l",
            "team=ml",
            "--label",
            "bare",
            "-w",
            "/w",
            "-u",
            "1000:1000",
            "-h",
            "host",
            "--entrypoint",
            "/bin/x",
            "--ulimit",
            "nofile=10",
            "--stop-signal",
            "INT",
            "--stop-timeout",
            "3",
            "--engine",
            "qemu",
            "--restart",
            "on-failure:2",
            "--idle-timeout",
            "5m",
            "--on-idle",
            "restart",
            "--max-duration",
            "1h",
        ]);
        assert_eq!(spec.name.as_ref().unwrap().as_str(), "box");
        assert_eq!((spec.cpus, spec.memory_mib, spec.root_size_mib), (2, 256, 1024));
        assert_eq!((spec.env["A"].as_str(), spec.env["FROM_HOST"].as_str()), ("1", "h"));
        assert_eq!((spec.labels["team"].as_str(), spec.labels["bare"].as_str()), ("ml", ""));
        assert_eq!(
            (spec.workdir.as_deref(), spec.user.as_deref(), spec.hostname.as_deref()),
            (Some("/w"), Some("1000:1000"), Some("host"))
        );
        assert_eq!(spec.entrypoint, Some(vec!["/bin/x".to_owned()]));
        assert_eq!((spec.rlimits[0].resource.as_str(), spec.rlimits[0].hard), ("nofile", 10));
        assert_eq!(
            (spec.stop_signal.as_deref(), spec.stop_grace_ms, spec.engine),
            (Some("INT"), 3_000, EngineChoice::Qemu)
        );
        assert_eq!(spec.restart, RestartPolicy::OnFailure { max_retries: Some(2) });
        assert_eq!(
            (spec.idle_timeout_ms, spec.on_idle, spec.max_duration_ms),
            (Some(300_000), OnIdle::Restart, Some(3_600_000))
        );
    }

    #[test]
    fn a_snapshot_is_where_options_begin() {
        let mut spec = SandboxSpec::new("busybox");
        spec.memory_mib = 128;
        spec.env.insert("A".into(), "old".into());
        spec.env.insert("B".into(), "old".into());
        spec.command = Some(vec!["serve".into()]);
        spec.security = SecurityProfile::Restricted;
        let snapshot = crate::commands::snapshot::example(spec.clone());
        let made = |words: &[&str]| {
            let line = Line::try_parse_from(std::iter::once("x").chain(words.iter().copied())).unwrap();
            line.creation.spec(("", Some(&snapshot)), &Config::default(), &|_| None).unwrap()
        };
        spec.snapshot = Some("warm".parse().unwrap());
        assert_eq!(made(&[]), spec);
        let other = made(&["-m", "1G", "-e", "A=new", "--entrypoint", "sh", "--security", "default"]);
        assert_eq!((other.memory_mib, other.env["A"].as_str(), other.env["B"].as_str()), (1024, "new", "old"));
        assert_eq!((other.command, other.security), (None, SecurityProfile::Default));
        assert!(Line::try_parse_from(["x", "--snapshot", "a", "--pull", "always"]).is_err());
    }

    #[test]
    fn an_empty_entrypoint_removes_the_images_own() {
        assert_eq!(spec(&["--entrypoint", ""]).entrypoint, Some(vec![]));
        assert_eq!(spec(&[]).entrypoint, None);
    }

    #[test]
    fn settings_are_the_defaults_of_flags() {
        let text = "engine = \"qemu\"\n[sandbox]\ncpus = 3\nmemory = \"1G\"\nroot_size = \"2G\"\nstop_grace = \"1s\"\n";
        let config = Config::merge(&[("f", text)], |_| None).unwrap();
        let spec = spec_with(&["-m", "128"], &config).unwrap();
        assert_eq!((spec.cpus, spec.memory_mib, spec.root_size_mib, spec.stop_grace_ms), (3, 128, 2048, 1_000));
        assert_eq!(spec.engine, EngineChoice::Qemu);
        assert_eq!(spec_with(&["--engine", "auto"], &config).unwrap().engine, EngineChoice::Auto);
    }

    #[test]
    fn the_command_line_wins_over_files_and_later_files_over_earlier() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (one, two) = (file("one", "A=1\nB=1\nC=1\n"), file("two", "B=2\nC=2\nFROM_HOST\nUNSET\n"));
        let spec = spec(&["-e", "C=3", "--env-file", &one, "--env-file", &two]);
        let variables: Vec<_> = spec.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(variables, ["A=1", "B=2", "C=3", "FROM_HOST=h"]);
        assert_eq!(refused(&["--env-file", "/nowhere/at/all"]), ErrorCode::PathNotFound);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name_never_ignored() {
        for words in [&["--tls-intercept"][..], &["--secret", "A@b"]] {
            assert_eq!(refused(words), ErrorCode::NotImplemented, "{words:?}");
        }
        let Err(Failure::Api(error)) = spec_with(&["--tls-intercept", "x"], &Config::default()) else { panic!() };
        assert_eq!(error.message, "--tls-intercept (TLS interception) is not built yet");
    }

    #[test]
    fn names_and_host_variables_are_checked_here() {
        assert_eq!(refused(&["-n", "../x"]), ErrorCode::InvalidName);
        assert_eq!(refused(&["-e", "NOT_SET"]), ErrorCode::InvalidConfig);
        assert_eq!(refused(&["--kernel", "/nowhere/vmlinux"]), ErrorCode::PathNotFound);
    }

    #[test]
    fn replacing_needs_a_name_and_has_a_time() {
        let line = |words: &[&str]| Line::try_parse_from(std::iter::once("x").chain(words.iter().copied()));
        assert!(line(&["--replace"]).is_err());
        assert_eq!(line(&["-n", "a", "--replace"]).unwrap().creation.replace_grace_ms(), Some(STOP_GRACE_MS_DEFAULT));
        assert_eq!(line(&["-n", "a", "--replace-with-timeout", "0"]).unwrap().creation.replace_grace_ms(), Some(0));
        assert_eq!(line(&["-n", "a"]).unwrap().creation.replace_grace_ms(), None);
    }
}
