//! What every command gets: the printer, the surroundings, and the way to the service.

use jiff::tz::TimeZone;
use msb_protocol::config::Config;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::paths::HomeLayout;
use msb_sdk::{Client, Locator};

use crate::failure::Failure;
use crate::printer::Printer;

/// The configuration of the whole host.
const SYSTEM_CONFIG: &str = "/etc/msb/config.toml";

/// What every command gets.
pub struct Context {
    /// Where output goes.
    pub printer: Printer,
    /// How services are found.
    pub locator: Locator,
}

impl Context {
    /// The context of this process.
    #[must_use]
    pub fn new(printer: Printer) -> Self {
        Self { printer, locator: Locator::from_environment() }
    }

    /// The service, started if there is none.
    ///
    /// # Errors
    /// `daemon_unavailable`, `runtime_not_found`.
    pub async fn client(&self) -> Result<Client, Failure> {
        Ok(self.locator.connect().await?)
    }

    /// The reader's time zone.
    #[must_use]
    pub fn zone(&self) -> TimeZone {
        // To learn the zone's name, `system` walks the whole database (5 of the 12 ms of `msb ls` in the exact lab). Only TZ needs that:
        // what localtime(5) holds are the rules themselves.
        let rules = || TimeZone::tzif("Local", &std::fs::read("/etc/localtime").ok()?).ok();
        let named = std::env::var_os("TZ").is_some();
        if named { TimeZone::system() } else { rules().unwrap_or_else(TimeZone::system) }
    }

    /// The merged settings.
    ///
    /// # Errors
    /// `config_file` naming file and line.
    pub fn config(&self) -> Result<Config, Failure> {
        let own = HomeLayout::new(self.locator.surroundings.home_dir()).config();
        let mut files = Vec::new();
        for path in [std::path::Path::new(SYSTEM_CONFIG), &own] {
            match std::fs::read_to_string(path) {
                Ok(text) => files.push((path.display().to_string(), text)),
                Err(error)
                    if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {}
                Err(error) => {
                    return Err(ApiError::new(ErrorCode::ConfigFile, format!("{}: {error}", path.display())).into());
                }
            }
        }
        let files: Vec<_> = files.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
        Config::merge(&files, |name| std::env::var(name).ok()).map_err(Failure::Api)
    }
}

/// A variable of this process's environment, if it is set and text.
#[must_use]
pub fn host_variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}
