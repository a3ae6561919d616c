//! Where everything is and what is configured: read once at the start.

use std::path::{Path, PathBuf};

use msb_actors::sandbox::plan::HostSettings;
use msb_protocol::config::Config;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::paths::{HomeLayout, Surroundings};
use msb_protocol::spec::EngineChoice;

/// The system's configuration file.
const SYSTEM_CONFIG: &str = "/etc/msb/config.toml";
/// Largest configuration file in bytes.
const CONFIG_LEN_MAX: u64 = 1 << 20;
/// Least and longest time between two samples of a VM, in milliseconds.
const SAMPLE_INTERVAL_MS_MIN: u64 = 100;
const SAMPLE_INTERVAL_MS_MAX: u64 = 10_000;

/// Everything the daemon takes from its environment and files.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The home.
    pub home: HomeLayout,
    /// Directory of sockets.
    pub runtime_dir: PathBuf,
    /// The control socket.
    pub socket: PathBuf,
    /// Kernel, initramfs and templates.
    pub share_dir: PathBuf,
    /// The VM process's program.
    pub vmm_program: PathBuf,
    /// Merged settings.
    pub config: Config,
}

impl Settings {
    /// Reads environment and files.
    ///
    /// # Errors
    /// `config_file` naming file and line.
    pub fn load() -> Result<Self, ApiError> {
        let surroundings =
            Surroundings { msb_host: None, ..Surroundings::from_environment(rustix::process::getuid().as_raw()) };
        let variable = |name: &str| std::env::var(name).ok();
        let executable = std::env::current_exe()
            .map_err(|error| ApiError::internal(format!("msbd does not find itself: {error}")))?;
        let programs = executable.parent().unwrap_or(Path::new("/")).to_owned();
        let path = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = HomeLayout::new(absolute(surroundings.home_dir())?);
        let files = [PathBuf::from(SYSTEM_CONFIG), home.config()];
        let mut texts = Vec::new();
        for file in files {
            if let Some(text) = read_config(&file)? {
                texts.push((file.display().to_string(), text));
            }
        }
        let layers: Vec<(&str, &str)> = texts.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
        Ok(Self {
            runtime_dir: surroundings.runtime_dir(),
            socket: surroundings.control_socket(),
            share_dir: path("MSB_SHARE_DIR").unwrap_or_else(|| programs.join("../share/msb")),
            vmm_program: path("MSB_VMM").unwrap_or_else(|| programs.join("msb-vmm")),
            config: Config::merge(&layers, variable)?,
            home,
        })
    }

    /// The kernel in use.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.config.text("kernel").map_or_else(|| self.share_dir.join("vmlinux"), PathBuf::from)
    }

    /// Time between two samples of a VM. Seldom ones would also let a sandbox look idle that is visited through a published port.
    #[must_use]
    pub fn sample_interval_ms(&self) -> u64 {
        self.config.duration_ms("metrics.sample_interval").clamp(SAMPLE_INTERVAL_MS_MIN, SAMPLE_INTERVAL_MS_MAX)
    }

    /// The packed template of writable disks.
    #[must_use]
    pub fn upper_template(&self) -> PathBuf {
        self.share_dir.join("upper.ext4.zst")
    }

    /// What the host brings to every boot.
    #[must_use]
    pub fn host_settings(&self) -> HostSettings {
        HostSettings {
            kernel: self.kernel(),
            initramfs: self.share_dir.join("initramfs.cpio"),
            cmdline_extra: std::env::var("MSB_CMDLINE_EXTRA")
                .map(|words| words.split_whitespace().map(String::from).collect())
                .unwrap_or_default(),
            qemu: self.config.text("qemu").map(PathBuf::from),
            engine: match self.config.text("engine") {
                Some("kvm") => EngineChoice::Kvm,
                Some("qemu") => EngineChoice::Qemu,
                _ => EngineChoice::Auto,
            },
            boot_timeout_ms: self.config.duration_ms("boot_timeout"),
            disk_full_timeout_ms: self.config.duration_ms("disk_full_timeout"),
            log_size_max_bytes: self.config.bytes("logs.size_max"),
            log_files_max: u32::try_from(self.config.number("logs.files_max")).unwrap_or(u32::MAX),
        }
    }
}

fn absolute(path: PathBuf) -> Result<PathBuf, ApiError> {
    std::path::absolute(&path)
        .map_err(|error| ApiError::new(ErrorCode::HomeUnusable, format!("{}: {error}", path.display())))
}

fn read_config(path: &Path) -> Result<Option<String>, ApiError> {
    let refused =
        |why: &dyn std::fmt::Display| ApiError::new(ErrorCode::ConfigFile, format!("{}: {why}", path.display()));
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(refused(&error)),
        Ok(file) if file.len() > CONFIG_LEN_MAX => return Err(refused(&"larger than 1 MiB")),
        Ok(_) => {}
    }
    std::fs::read_to_string(path).map(Some).map_err(|error| refused(&error))
}
