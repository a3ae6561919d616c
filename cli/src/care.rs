//! Options of health checks and of the pre-stop hook, which `run` and `create` share, and how they become parts of a spec.

use clap::Args;
use msb_protocol::health::{HealthCheck, PRE_STOP_MS_DEFAULT, PreStop};
use msb_protocol::spec::SandboxSpec;

use crate::failure::{Failure, invalid};
use crate::parse;

/// Health and hooks.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Health options")]
pub struct CareArgs {
    /// Command that says whether the workload is well: a line for /bin/sh, or a JSON list of words
    #[arg(long, value_name = "COMMAND")]
    pub health_cmd: Option<String>,
    /// Time between health checks (30s)
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms, requires = "health_cmd")]
    pub health_interval: Option<u64>,
    /// Time for one health check (30s)
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms, requires = "health_cmd")]
    pub health_timeout: Option<u64>,
    /// Failures in a row that make it unhealthy (3); a restart policy then starts it anew
    #[arg(long, value_name = "COUNT", requires = "health_cmd")]
    pub health_retries: Option<u32>,
    /// Time after the start in which failures do not count (0s)
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms, requires = "health_cmd")]
    pub health_start_period: Option<u64>,
    /// Command to run in it before the workload is asked to stop: a line for /bin/sh, or a JSON list of words
    #[arg(long, value_name = "COMMAND")]
    pub pre_stop: Option<String>,
    /// Time for that command (10s); the time of the stop itself begins after it
    #[arg(long, value_name = "TIME", value_parser = parse::duration_ms, requires = "pre_stop")]
    pub pre_stop_timeout: Option<u64>,
}

impl CareArgs {
    /// Puts what was given into a spec.
    ///
    /// # Errors
    /// `invalid_config` for a list that is none.
    pub fn apply(&self, spec: &mut SandboxSpec) -> Result<(), Failure> {
        if let Some(text) = &self.health_cmd {
            let defaults = HealthCheck::new(command("--health-cmd", text)?);
            spec.health = Some(HealthCheck {
                interval_ms: self.health_interval.unwrap_or(defaults.interval_ms),
                timeout_ms: self.health_timeout.unwrap_or(defaults.timeout_ms),
                retries: self.health_retries.unwrap_or(defaults.retries),
                start_period_ms: self.health_start_period.unwrap_or(defaults.start_period_ms),
                command: defaults.command,
            });
        }
        if let Some(text) = &self.pre_stop {
            let timeout_ms = self.pre_stop_timeout.unwrap_or(PRE_STOP_MS_DEFAULT);
            spec.pre_stop = Some(PreStop { command: command("--pre-stop", text)?, timeout_ms });
        }
        Ok(())
    }
}

/// A line for the shell, or `["word", …]` where there is no shell.
fn command(option: &str, text: &str) -> Result<Vec<String>, Failure> {
    if text.trim().is_empty() {
        return Err(invalid(format!("{option} has no command")));
    }
    if text.trim_start().starts_with("[\"") {
        return serde_json::from_str(text)
            .map_err(|error| invalid(format!("{option} is no JSON list of words: {error}")));
    }
    Ok(["/bin/sh", "-c", text].map(String::from).to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(args: &CareArgs) -> Result<SandboxSpec, Failure> {
        let mut spec = SandboxSpec::new("i");
        args.apply(&mut spec).map(|()| spec)
    }

    #[test]
    fn a_line_goes_to_the_shell_and_a_list_does_not() {
        let args = CareArgs {
            health_cmd: Some("test -e /ready".into()),
            health_retries: Some(5),
            pre_stop: Some(r#"["/bin/save", "now"]"#.into()),
            pre_stop_timeout: Some(1_500),
            ..CareArgs::default()
        };
        let spec = spec(&args).unwrap();
        let health = spec.health.unwrap();
        assert_eq!(health.command, ["/bin/sh", "-c", "test -e /ready"]);
        assert_eq!(
            (health.interval_ms, health.timeout_ms, health.retries, health.start_period_ms),
            (30_000, 30_000, 5, 0)
        );
        let hook = spec.pre_stop.unwrap();
        assert_eq!((hook.command, hook.timeout_ms), (vec!["/bin/save".to_owned(), "now".to_owned()], 1_500));
    }

    #[test]
    fn nothing_is_nothing_and_an_empty_command_is_refused() {
        let none = spec(&CareArgs::default()).unwrap();
        assert!(none.health.is_none() && none.pre_stop.is_none());
        for text in ["", "  ", "[\"a\""] {
            assert!(spec(&CareArgs { pre_stop: Some(text.into()), ..CareArgs::default() }).is_err(), "{text}");
        }
        // A shell line may begin with a bracket: it is a command's name.
        assert!(spec(&CareArgs { health_cmd: Some("[ -e /ready ]".into()), ..CareArgs::default() }).is_ok());
    }
}
