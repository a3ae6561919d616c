//! From what the user asked for and what the image says to what is booted: pure.
//!
//! The rules are docker's: an entrypoint of the user's replaces the image's and drops its cmd; a command replaces the image's cmd;
//! the environment is the image's with the user's over it. The image is hostile: what makes no sense in it is left out.

use std::collections::BTreeMap;
use std::path::PathBuf;

use msb_protocol::control::ImageConfigDetail;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::guest::{EnvVar, ExecConfig, GuestConfig, MainConfig, ResourceLimit, TerminalSize};
use msb_protocol::id::{SandboxId, SandboxName};
use msb_protocol::mount::SCRIPTS_DIRECTORY;
use msb_protocol::network::PublishedPort;
use msb_protocol::spec::{EngineChoice, OnIdle, RLIMIT_NAMES, Rlimit, RootKind, SandboxSpec, Workload};
use msb_protocol::version::VMM_GENERATION;
use msb_protocol::vmm::{DiskPart, LOWER_SERIAL, LOWER_SHARE, UPPER_SERIAL, VmSpec};

use super::directories::Directories;
use super::machine::Run;
use super::mounts;
use super::network;
use crate::volumes::Volumes;

/// Memory that the workload's limit leaves for the agent, in bytes.
pub const MEMORY_RESERVE_BYTES: u64 = 16 << 20;
/// Volumes of an image that are honoured.
const VOLUMES_MAX: usize = 64;
/// PATH where neither image nor user has one (as docker).
const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Directories that container engines inside the guest need on a real file system: an overlay cannot be the upper of another.
const VOLUMES_ALWAYS: [&str; 2] = ["/var/lib/docker", "/var/lib/containerd"];

/// What the host brings to every boot.
#[derive(Clone, Debug)]
pub struct HostSettings {
    /// The installed kernel.
    pub kernel: PathBuf,
    /// The installed initramfs.
    pub initramfs: PathBuf,
    /// Words added to the kernel's command line.
    pub cmdline_extra: Vec<String>,
    /// QEMU in place of the one in PATH.
    pub qemu: Option<PathBuf>,
    /// Engine of specs that say `auto`.
    pub engine: EngineChoice,
    /// Time for a boot in milliseconds.
    pub boot_timeout_ms: u64,
    /// Time for a full disk in milliseconds.
    pub disk_full_timeout_ms: u64,
    /// Size at which logs rotate in bytes.
    pub log_size_max_bytes: u64,
    /// Rotated logs kept.
    pub log_files_max: u32,
}

/// The words of the main workload; empty if image and user name none.
#[must_use]
pub fn command_line(spec: &SandboxSpec, image: &ImageConfigDetail) -> Vec<String> {
    let (entrypoint, fallback) = match &spec.entrypoint {
        Some(own) => (own, &[][..]),
        None => (&image.entrypoint, image.cmd.as_slice()),
    };
    let command = spec.command.as_deref().filter(|words| !words.is_empty()).unwrap_or(fallback);
    entrypoint.iter().chain(command).cloned().collect()
}

/// The VM of one run; `ports` are the published ones as they were bound.
///
/// # Errors
/// `invalid_config` for a workload without a command or a stop signal that is none.
pub fn vm_spec(
    (id, name): (SandboxId, &SandboxName),
    (spec, ports): (&SandboxSpec, &[PublishedPort]),
    run: Run,
    image: (&ImageConfigDetail, Vec<DiskPart>),
    host: &HostSettings,
    directories: &Directories,
    volumes: &Volumes,
) -> Result<VmSpec, ApiError> {
    let (config, lower) = image;
    let mounts = mounts::plan(spec, volumes)?;
    Ok(VmSpec {
        generation: VMM_GENERATION,
        sandbox_id: id,
        name: name.clone(),
        boot_id: run.boot_id,
        engine: if spec.engine == EngineChoice::Auto { host.engine } else { spec.engine },
        cpus: spec.cpus,
        memory_mib: spec.memory_mib,
        kernel: spec.kernel.as_ref().map_or_else(|| host.kernel.clone(), PathBuf::from),
        initramfs: host.initramfs.clone(),
        cmdline_extra: host.cmdline_extra.clone(),
        lower,
        upper: directories.upper.clone(),
        run_dir: directories.run.clone(),
        log_dir: directories.logs.clone(),
        log_size_max_bytes: host.log_size_max_bytes,
        log_files_max: host.log_files_max,
        guest: GuestConfig { mounts: mounts.guest, ..guest_config(name, spec, run, config)? },
        boot_timeout_ms: host.boot_timeout_ms,
        disk_full_timeout_ms: host.disk_full_timeout_ms,
        qemu: host.qemu.clone(),
        network: network::vm_network(&spec.network, ports),
        shares: mounts.shares,
        disks: mounts.disks,
        restore: None,
        suspends: spec.on_idle == OnIdle::Suspend,
    })
}

/// What the agent gets, but for its mounts.
///
/// # Errors
/// As [`vm_spec`].
pub fn guest_config(
    name: &SandboxName,
    spec: &SandboxSpec,
    run: Run,
    image: &ImageConfigDetail,
) -> Result<GuestConfig, ApiError> {
    // Names may be longer than a hostname (sethostname(2): 64 bytes).
    let hostname = spec.hostname.clone().unwrap_or_else(|| name.as_str().chars().take(63).collect());
    let main = match spec.workload {
        Workload::None => None,
        Workload::Main => {
            let argv = command_line(spec, image);
            if argv.is_empty() {
                return Err(ApiError::new(ErrorCode::InvalidConfig, format!("image {} names no command", spec.image))
                    .with_hint("give one after the image"));
            }
            spec.security.check_command(&argv)?;
            let stop_signal = spec.stop_signal.as_deref().or(image.stop_signal.as_deref());
            // A signal that an image gets wrong is SIGTERM; one that the user gets wrong is an error.
            let stop_signal = match stop_signal.map(|text| (text, signal_number(text))) {
                None => libc_sigterm(),
                Some((_, Some(number))) => number,
                Some((text, None)) if spec.stop_signal.is_some() => {
                    return Err(ApiError::new(ErrorCode::InvalidConfig, format!("{text:?} is not a signal"))
                        .with_hint("name one, as SIGINT, or give its number"));
                }
                Some((_, None)) => libc_sigterm(),
            };
            // Whoever starts it or attaches brings the true size.
            let terminal = spec.tty.then_some(TerminalSize { rows: 24, columns: 80 });
            let exec = ExecConfig { argv, stdin: spec.stdin_open, terminal, ..ExecConfig::default() };
            Some(MainConfig { exec: Some(exec), autostart: !run.hold_main, stop_signal })
        }
    };
    let image_workdir = Some(image.working_dir.clone()).filter(|path| is_plain_path(path));
    Ok(GuestConfig {
        hosts: format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"),
        hostname,
        resolv_conf: network::resolv_conf(&spec.network),
        lower_serial: LOWER_SERIAL.into(),
        upper_serial: UPPER_SERIAL.into(),
        lower_share: if spec.root == RootKind::Directory { LOWER_SHARE.into() } else { String::new() },
        volume_paths: volume_paths(&image.volumes),
        env: with_scripts(environment(&image.env, &spec.env), spec),
        user: spec.user.clone().unwrap_or_else(|| image.user.clone()),
        workdir: spec.workdir.clone().or(image_workdir).unwrap_or_else(|| "/".into()),
        rlimits: resource_limits(&spec.rlimits)?,
        main,
        memory_reserve_bytes: MEMORY_RESERVE_BYTES,
        network: network::guest_network(&spec.network),
        security: if spec.security.confines() { spec.security.as_str().into() } else { String::new() },
        mounts: Vec::new(),
        patches: mounts::guest_patches(spec),
    })
}

/// The image's environment with the user's over it. A later value of a name wins and keeps the first one's place.
#[must_use]
pub fn environment(image: &[String], user: &BTreeMap<String, String>) -> Vec<EnvVar> {
    let mut merged: Vec<EnvVar> = Vec::with_capacity(image.len() + user.len() + 1);
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    let from_image = image
        .iter()
        .filter_map(|pair| pair.split_once('='))
        .filter(|(name, value)| !name.is_empty() && !name.contains('\0') && !value.contains('\0'));
    let from_user = user.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    for (name, value) in from_image.chain(from_user) {
        let variable = EnvVar { name: name.into(), value: value.into() };
        match places.get(name) {
            Some(place) => merged[*place] = variable,
            None => {
                places.insert(name.into(), merged.len());
                merged.push(variable);
            }
        }
    }
    if !places.contains_key("PATH") {
        merged.push(EnvVar { name: "PATH".into(), value: PATH_DEFAULT.into() });
    }
    merged
}

/// PATH with the directory of the user's scripts, if there are any.
fn with_scripts(mut env: Vec<EnvVar>, spec: &SandboxSpec) -> Vec<EnvVar> {
    if mounts::has_scripts(spec)
        && let Some(path) = env.iter_mut().find(|variable| variable.name == "PATH")
    {
        path.value = format!("{}:{SCRIPTS_DIRECTORY}", path.value);
    }
    env
}

/// Resource limits, checked.
///
/// # Errors
/// `invalid_config` naming the limit.
pub fn resource_limits(limits: &[Rlimit]) -> Result<Vec<ResourceLimit>, ApiError> {
    limits
        .iter()
        .map(|limit| {
            if !RLIMIT_NAMES.contains(&limit.resource.as_str()) {
                let message = format!("{:?} is not a resource limit", limit.resource);
                return Err(ApiError::new(ErrorCode::InvalidConfig, message)
                    .with_hint(format!("use one of {}", RLIMIT_NAMES.join(", "))));
            }
            if limit.soft > limit.hard {
                return Err(ApiError::new(
                    ErrorCode::InvalidConfig,
                    format!("the soft limit of {} is above its hard limit", limit.resource),
                ));
            }
            Ok(ResourceLimit { resource: limit.resource.clone(), soft: limit.soft, hard: limit.hard })
        })
        .collect()
}

fn volume_paths(image: &[String]) -> Vec<String> {
    let mut paths: Vec<String> = image
        .iter()
        .filter(|path| is_plain_path(path) && !path.trim_matches('/').is_empty())
        .take(VOLUMES_MAX)
        .cloned()
        .collect();
    paths.extend(VOLUMES_ALWAYS.map(String::from));
    paths.sort();
    paths.dedup();
    paths
}

/// Absolute, bounded, and never upwards.
fn is_plain_path(path: &str) -> bool {
    path.starts_with('/') && path.len() <= 4096 && !path.contains('\0') && !path.split('/').any(|part| part == "..")
}

fn libc_sigterm() -> i32 {
    rustix::process::Signal::TERM.as_raw()
}

/// The number of a signal on x86-64 Linux: `SIGTERM`, `term`, `15`, `SIGRTMIN+3`.
#[must_use]
pub fn signal_number(text: &str) -> Option<i32> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM",
        "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF",
        "WINCH", "IO", "PWR", "SYS",
    ];
    const REALTIME_MIN: i32 = 34;
    const REALTIME_MAX: i32 = 64;
    if let Ok(number) = text.parse::<i32>() {
        return (1..=REALTIME_MAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(place) = NAMES.iter().position(|known| *known == name) {
        return i32::try_from(place + 1).ok();
    }
    let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(""), _) => REALTIME_MIN,
        (Some(more), _) => REALTIME_MIN.checked_add(more.strip_prefix('+')?.parse().ok()?)?,
        (_, Some("")) => REALTIME_MAX,
        (_, Some(less)) => REALTIME_MAX.checked_sub(less.strip_prefix('-')?.parse().ok()?)?,
        _ => return None,
    };
    (REALTIME_MIN..=REALTIME_MAX).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use msb_protocol::id::BootId;

    fn image() -> ImageConfigDetail {
        ImageConfigDetail {
            env: vec!["PATH=/bin".into(), "A=image".into(), "broken".into(), "=x".into()],
            entrypoint: vec!["entry".into()],
            cmd: vec!["cmd".into(), "1".into()],
            working_dir: "/srv".into(),
            user: "app".into(),
            stop_signal: Some("SIGINT".into()),
            volumes: vec![
                "/data".into(),
                "relative".into(),
                "/a/../../etc".into(),
                "/".into(),
                "/var/lib/docker".into(),
            ],
            ..ImageConfigDetail::default()
        }
    }

    fn run(hold_main: bool) -> Run {
        Run { boot_id: BootId(uuid::Uuid::nil()), hold_main, by_policy: false, wakes: None }
    }

    fn config(edit: impl FnOnce(&mut SandboxSpec)) -> Result<GuestConfig, ApiError> {
        let mut spec = SandboxSpec::new("busybox");
        spec.workload = Workload::Main;
        edit(&mut spec);
        guest_config(&"box".parse().unwrap(), &spec, run(false), &image())
    }

    #[test]
    fn entrypoint_and_command_combine_as_in_docker() {
        let words = |text: &str| text.split(' ').map(String::from).collect::<Vec<_>>();
        for (entrypoint, command, expected) in [
            (None, None, "entry cmd 1"),
            (None, Some("ls -l"), "entry ls -l"),
            (Some("sh -c"), None, "sh -c"),
            (Some("sh -c"), Some("ls"), "sh -c ls"),
        ] {
            let mut spec = SandboxSpec::new("i");
            spec.entrypoint = entrypoint.map(words);
            spec.command = command.map(words);
            assert_eq!(command_line(&spec, &image()), words(expected));
        }
        let mut none = SandboxSpec::new("i");
        none.entrypoint = Some(Vec::new());
        assert!(command_line(&none, &image()).is_empty());
        none.command = Some(vec!["ls".into()]);
        assert_eq!(command_line(&none, &image()), ["ls"]);
    }

    #[test]
    fn the_users_environment_is_over_the_images_and_path_is_never_missing() {
        let user = BTreeMap::from([("A".to_owned(), "user".to_owned()), ("B".to_owned(), String::new())]);
        let shown = |list: Vec<EnvVar>| list.iter().map(|v| format!("{}={}", v.name, v.value)).collect::<Vec<_>>();
        assert_eq!(shown(environment(&image().env, &user)), ["PATH=/bin", "A=user", "B="]);
        assert_eq!(shown(environment(&[], &BTreeMap::new())), [format!("PATH={PATH_DEFAULT}")]);
    }

    #[test]
    fn the_guest_gets_the_images_defaults_and_the_users_wishes_over_them() {
        let plain = config(|_| {}).unwrap();
        let main = plain.main.unwrap();
        assert_eq!((plain.user.as_str(), plain.workdir.as_str(), plain.hostname.as_str()), ("app", "/srv", "box"));
        assert_eq!((main.stop_signal, main.autostart), (2, true));
        assert_eq!(plain.volume_paths, ["/data", "/var/lib/containerd", "/var/lib/docker"]);
        assert!(plain.hosts.contains("127.0.1.1\tbox\n"));
        let own = config(|spec| {
            spec.user = Some("0:0".into());
            spec.workdir = Some("/".into());
            spec.hostname = Some("h".into());
            spec.stop_signal = Some("9".into());
        })
        .unwrap();
        assert_eq!(
            (own.user.as_str(), own.workdir.as_str(), own.hostname.as_str(), own.main.unwrap().stop_signal),
            ("0:0", "/", "h", 9)
        );
        assert!(config(|spec| spec.workload = Workload::None).unwrap().main.is_none());
    }

    #[test]
    fn what_makes_no_sense_is_refused_when_the_user_wrote_it() {
        assert_eq!(
            config(|spec| spec.stop_signal = Some("SIGNOPE".into())).unwrap_err().code,
            ErrorCode::InvalidConfig
        );
        let no_command = |spec: &mut SandboxSpec| spec.entrypoint = Some(Vec::new());
        assert!(config(no_command).unwrap_err().message.contains("names no command"));
        let limit = |resource: &str, soft, hard| resource_limits(&[Rlimit { resource: resource.into(), soft, hard }]);
        assert!(limit("nofile", 1, 2).is_ok());
        assert!(limit("nofile", 3, 2).is_err());
        assert!(limit("nofiles", 1, 2).is_err());
        let mut image = image();
        image.stop_signal = Some("nonsense".into());
        let mut spec = SandboxSpec::new("i");
        spec.workload = Workload::Main;
        assert_eq!(
            guest_config(&"n".parse().unwrap(), &spec, run(false), &image).unwrap().main.unwrap().stop_signal,
            15
        );
    }

    #[test]
    fn a_held_workload_waits_for_its_caller() {
        let mut spec = SandboxSpec::new("i");
        spec.workload = Workload::Main;
        let main = guest_config(&"n".parse().unwrap(), &spec, run(true), &image()).unwrap().main.unwrap();
        assert!(!main.autostart && !main.exec.unwrap().stdin);
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("15", Some(15)),
            ("SIGSYS", Some(31)),
            ("RTMIN", Some(34)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-1", Some(63)),
            ("64", Some(64)),
            ("65", None),
            ("0", None),
            ("-1", None),
            ("SIGRTMIN+31", None),
            ("", None),
            ("SIG", None),
        ] {
            assert_eq!(signal_number(text), number, "{text}");
        }
    }
}
