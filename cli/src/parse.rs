//! Small values of the command line. Each parser names what it wanted.

use std::collections::BTreeMap;

use msb_protocol::id::SandboxName;
use msb_protocol::spec::{RLIMIT_NAMES, RestartPolicy, Rlimit};

use crate::failure::{Failure, invalid};

/// A sandbox's name.
///
/// # Errors
/// `invalid_name`.
pub fn name(text: &str) -> Result<SandboxName, Failure> {
    SandboxName::parse(text).map_err(Failure::Api)
}

/// `KEY=VALUE`, or `KEY` taken from the host's environment.
///
/// # Errors
/// `invalid_config` if the host has no such variable or it is no text.
pub fn env(text: &str, host: &dyn Fn(&str) -> Option<String>) -> Result<(String, String), Failure> {
    match text.split_once('=') {
        Some(("", _)) => Err(invalid(format!("environment variable {text:?} has no name"))),
        Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        None => match host(text) {
            Some(value) => Ok((text.to_owned(), value)),
            None => {
                Err(invalid(format!("environment variable {text} is not set here; write {text}=VALUE to give it one")))
            }
        },
    }
}

/// `KEY[=VALUE]`; a bare key has the empty value.
#[must_use]
pub fn label(text: &str) -> (String, String) {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    (key.to_owned(), value.to_owned())
}

/// Labels of which later ones win.
#[must_use]
pub fn labels(texts: &[String]) -> BTreeMap<String, String> {
    texts.iter().map(|text| label(text)).collect()
}

/// `RES=SOFT[:HARD]`, with `unlimited` or -1 for no limit.
///
/// # Errors
/// What is wrong, as clap shows it.
pub fn rlimit(text: &str) -> Result<Rlimit, String> {
    let (resource, limits) = text.split_once('=').ok_or("write it as RES=SOFT[:HARD], for example nofile=1024:4096")?;
    let resource = resource.to_ascii_lowercase();
    let resource = resource.strip_prefix("rlimit_").unwrap_or(&resource).to_owned();
    if !RLIMIT_NAMES.contains(&resource.as_str()) {
        return Err(format!("no resource is called {resource:?}; there are {}", RLIMIT_NAMES.join(", ")));
    }
    let value = |text: &str| match text {
        "unlimited" | "-1" => Ok(u64::MAX),
        _ => text.parse::<u64>().map_err(|_| format!("{text:?} is neither a whole number nor 'unlimited'")),
    };
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let (soft, hard) = (value(soft)?, value(hard)?);
    if soft > hard {
        return Err("the soft limit is above the hard limit".into());
    }
    Ok(Rlimit { resource, soft, hard })
}

/// `no`, `on-failure[:N]`, `always`, `unless-stopped`.
///
/// # Errors
/// What is wrong, as clap shows it.
pub fn restart(text: &str) -> Result<RestartPolicy, String> {
    match text.split_once(':') {
        None => match text {
            "no" => Ok(RestartPolicy::No),
            "on-failure" => Ok(RestartPolicy::OnFailure { max_retries: None }),
            "always" => Ok(RestartPolicy::Always),
            "unless-stopped" => Ok(RestartPolicy::UnlessStopped),
            _ => Err("it is one of no, on-failure[:N], always, unless-stopped".into()),
        },
        Some(("on-failure", count)) => {
            let count = count.parse().map_err(|_| format!("{count:?} is no number of restarts"))?;
            Ok(RestartPolicy::OnFailure { max_retries: Some(count) })
        }
        Some(_) => Err("only on-failure takes a number".into()),
    }
}

/// A duration, as clap wants a parser.
///
/// # Errors
/// What is wrong, as clap shows it.
pub fn duration_ms(text: &str) -> Result<u64, String> {
    msb_protocol::quantity::parse_duration_ms(text).map_err(|error| error.to_string())
}

/// A size in MiB, as clap wants a parser.
///
/// # Errors
/// What is wrong, as clap shows it.
pub fn mib(text: &str) -> Result<u32, String> {
    msb_protocol::quantity::parse_mib(text).map_err(|error| error.to_string())
}

/// A command after its subject: one `--` between them is optional and not part of it.
#[must_use]
pub fn words(mut rest: Vec<String>) -> Vec<String> {
    if rest.first().is_some_and(|word| word == "--") {
        rest.remove(0);
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_come_from_the_argument_or_the_host() {
        let host = |name: &str| (name == "HOSTVAR").then(|| "h=1".to_owned());
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(env("A=1", &host).unwrap(), pair("A", "1"));
        assert_eq!(env("A=", &host).unwrap(), pair("A", ""));
        assert_eq!(env("A=b=c", &host).unwrap(), pair("A", "b=c"));
        assert_eq!(env("HOSTVAR", &host).unwrap(), pair("HOSTVAR", "h=1"));
        assert!(env("UNSET", &host).is_err());
        assert!(env("=x", &host).is_err());
    }

    #[test]
    fn limits() {
        let limit = |resource: &str, soft, hard| Ok(Rlimit { resource: resource.into(), soft, hard });
        assert_eq!(rlimit("nofile=1024"), limit("nofile", 1024, 1024));
        assert_eq!(rlimit("RLIMIT_NOFILE=1:unlimited"), limit("nofile", 1, u64::MAX));
        assert_eq!(rlimit("core=-1"), limit("core", u64::MAX, u64::MAX));
        for bad in ["nofile", "nofiles=1", "nofile=x", "nofile=2:1", "nofile=", "=1"] {
            assert!(rlimit(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn restart_policies() {
        assert_eq!(restart("no"), Ok(RestartPolicy::No));
        assert_eq!(restart("on-failure:3"), Ok(RestartPolicy::OnFailure { max_retries: Some(3) }));
        assert_eq!(restart("on-failure"), Ok(RestartPolicy::OnFailure { max_retries: None }));
        for bad in ["", "yes", "always:3", "on-failure:", "on-failure:-1"] {
            assert!(restart(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn one_pair_of_dashes_is_not_part_of_the_command() {
        let words = |list: &[&str]| super::words(list.iter().map(|word| (*word).to_owned()).collect());
        assert_eq!(words(&["--", "cat", "-n"]), ["cat", "-n"]);
        assert_eq!(words(&["cat", "--", "x"]), ["cat", "--", "x"]);
        assert_eq!(words(&["--", "--", "x"]), ["--", "x"]);
        assert!(words(&["--"]).is_empty() && words(&[]).is_empty());
    }
}
