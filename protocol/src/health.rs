//! Commands that msb itself runs in a sandbox beside its workload: health checks and the hook before a stop. Stored as parts of the spec,
//! so fields are only ever added, each with a default.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::{ApiError, ErrorCode};
use crate::spec::check_argv;

/// Time between two health checks in milliseconds when nobody says (as docker).
pub const HEALTH_INTERVAL_MS_DEFAULT: u64 = 30_000;
/// Time for one health check in milliseconds when nobody says (as docker).
pub const HEALTH_TIMEOUT_MS_DEFAULT: u64 = 30_000;
/// Failures in a row that make a sandbox unhealthy when nobody says (as docker).
pub const HEALTH_RETRIES_DEFAULT: u32 = 3;
/// Shortest interval and timeout of health checks in milliseconds.
pub const HEALTH_TIME_MS_MIN: u64 = 100;
/// Longest interval, timeout and start period in milliseconds: a day.
pub const HEALTH_TIME_MS_MAX: u64 = 86_400_000;
/// Most failures in a row.
pub const HEALTH_RETRIES_MAX: u32 = 1_000;
/// Time for the pre-stop hook in milliseconds when nobody says.
pub const PRE_STOP_MS_DEFAULT: u64 = 10_000;
/// Longest time for the pre-stop hook in milliseconds: an hour.
pub const PRE_STOP_MS_MAX: u64 = 3_600_000;
/// Bytes of a command's output that are kept to be shown.
pub const OUTPUT_LEN_MAX: usize = 4_096;

/// A command that says whether the workload is well: exit code 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HealthCheck {
    /// The command and its arguments; it runs as an exec does.
    pub command: Vec<String>,
    /// Time between the end of one check and the next in milliseconds, and before the first.
    #[serde(default = "interval")]
    pub interval_ms: u64,
    /// Time for one check in milliseconds; one that takes longer is killed and has failed.
    #[serde(default = "timeout")]
    pub timeout_ms: u64,
    /// Failures in a row that make the sandbox unhealthy.
    #[serde(default = "retries")]
    pub retries: u32,
    /// Time after the start in which failures do not count, until a first check succeeds.
    #[serde(default)]
    pub start_period_ms: u64,
}

/// A command that runs before the workload is asked to stop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PreStop {
    /// The command and its arguments; it runs as an exec does.
    pub command: Vec<String>,
    /// Its time in milliseconds; then it is killed and the stop goes on. The grace time begins after it.
    #[serde(default = "pre_stop")]
    pub timeout_ms: u64,
}

fn interval() -> u64 {
    HEALTH_INTERVAL_MS_DEFAULT
}
fn timeout() -> u64 {
    HEALTH_TIMEOUT_MS_DEFAULT
}
fn retries() -> u32 {
    HEALTH_RETRIES_DEFAULT
}
fn pre_stop() -> u64 {
    PRE_STOP_MS_DEFAULT
}

impl HealthCheck {
    /// A check by this command with docker's times.
    #[must_use]
    pub fn new(command: Vec<String>) -> Self {
        Self {
            command,
            interval_ms: HEALTH_INTERVAL_MS_DEFAULT,
            timeout_ms: HEALTH_TIMEOUT_MS_DEFAULT,
            retries: HEALTH_RETRIES_DEFAULT,
            start_period_ms: 0,
        }
    }

    /// Checks its limits.
    ///
    /// # Errors
    /// `invalid_config` naming the value.
    pub fn check(&self) -> Result<(), ApiError> {
        check_command("health check", &self.command)?;
        let times = HEALTH_TIME_MS_MIN..=HEALTH_TIME_MS_MAX;
        if !times.contains(&self.interval_ms) || !times.contains(&self.timeout_ms) {
            return refuse("interval and timeout of health checks must be 100ms to 24h");
        }
        if self.start_period_ms > HEALTH_TIME_MS_MAX {
            return refuse("the start period of health checks must be at most 24h");
        }
        if !(1..=HEALTH_RETRIES_MAX).contains(&self.retries) {
            return refuse("retries of health checks must be 1 to 1000");
        }
        Ok(())
    }
}

impl PreStop {
    /// Checks its limits.
    ///
    /// # Errors
    /// `invalid_config` naming the value.
    pub fn check(&self) -> Result<(), ApiError> {
        check_command("pre-stop hook", &self.command)?;
        if !(1..=PRE_STOP_MS_MAX).contains(&self.timeout_ms) {
            return refuse("the time of the pre-stop hook must be 1ms to 1h");
        }
        Ok(())
    }
}

fn check_command(what: &str, command: &[String]) -> Result<(), ApiError> {
    if command.first().is_none_or(String::is_empty) {
        return refuse(&format!("the {what} has no command"));
    }
    check_argv(command)
}

fn refuse<T>(message: &str) -> Result<T, ApiError> {
    Err(ApiError::new(ErrorCode::InvalidConfig, message))
}

/// What health checks say of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HealthStatus {
    /// No check has succeeded yet, and not enough have failed.
    Starting,
    /// The last checks succeeded.
    Healthy,
    /// As many checks as its retries failed in a row.
    Unhealthy,
}

impl HealthStatus {
    /// The status as text, as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// The health of the present run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HealthReport {
    /// What the checks say.
    pub status: HealthStatus,
    /// Failures in a row.
    pub failing_streak: u32,
    /// When the last check ended.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checked_at: Option<Timestamp>,
    /// How it ended, for people: `exit code 1`, `timed out`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub outcome: String,
    /// What it wrote, its last [`OUTPUT_LEN_MAX`] bytes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub output: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_on_both_sides() {
        let check = |edit: fn(&mut HealthCheck)| {
            let mut check = HealthCheck::new(vec!["true".into()]);
            edit(&mut check);
            check.check().is_ok()
        };
        assert!(check(|_| {}));
        assert!(check(|c| c.interval_ms = HEALTH_TIME_MS_MIN));
        assert!(!check(|c| c.interval_ms = HEALTH_TIME_MS_MIN - 1));
        assert!(!check(|c| c.timeout_ms = HEALTH_TIME_MS_MAX + 1));
        assert!(!check(|c| c.start_period_ms = HEALTH_TIME_MS_MAX + 1));
        assert!(!check(|c| c.retries = 0));
        assert!(!check(|c| c.retries = HEALTH_RETRIES_MAX + 1));
        assert!(!check(|c| c.command.clear()));
        assert!(!check(|c| c.command[0].clear()));
        let hook = |timeout_ms| PreStop { command: vec!["true".into()], timeout_ms }.check().is_ok();
        assert!(hook(1) && hook(PRE_STOP_MS_MAX) && !hook(0) && !hook(PRE_STOP_MS_MAX + 1));
    }

    #[test]
    fn a_command_alone_is_a_whole_check() {
        let check: HealthCheck = serde_json::from_str(r#"{"command":["true"]}"#).unwrap();
        assert_eq!(check, HealthCheck::new(vec!["true".into()]));
        let hook: PreStop = serde_json::from_str(r#"{"command":["true"]}"#).unwrap();
        assert_eq!(hook.timeout_ms, PRE_STOP_MS_DEFAULT);
    }
}
