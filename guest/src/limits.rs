//! Resource limits by name: the sixteen of setrlimit(2), and the defaults a container user expects. Pure; used by `command`.

use msb_protocol::error::ErrorCode;
use msb_protocol::guest::ResourceLimit;

use crate::failure::GuestError;

/// A limit as the kernel takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Which one (`RLIMIT_*`).
    pub resource: u32,
    /// Soft limit; `u64::MAX` is none.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is none.
    pub hard: u64,
    /// Nobody asked for it: where it may not be set (a test machine without privileges), the inherited one stays.
    pub is_default: bool,
}

/// Names without `RLIMIT_` and their numbers on x86-64.
const NAMES: [(&str, u32); 16] = [
    ("cpu", libc::RLIMIT_CPU),
    ("fsize", libc::RLIMIT_FSIZE),
    ("data", libc::RLIMIT_DATA),
    ("stack", libc::RLIMIT_STACK),
    ("core", libc::RLIMIT_CORE),
    ("rss", libc::RLIMIT_RSS),
    ("nproc", libc::RLIMIT_NPROC),
    ("nofile", libc::RLIMIT_NOFILE),
    ("memlock", libc::RLIMIT_MEMLOCK),
    ("as", libc::RLIMIT_AS),
    ("locks", libc::RLIMIT_LOCKS),
    ("sigpending", libc::RLIMIT_SIGPENDING),
    ("msgqueue", libc::RLIMIT_MSGQUEUE),
    ("nice", libc::RLIMIT_NICE),
    ("rtprio", libc::RLIMIT_RTPRIO),
    ("rttime", libc::RLIMIT_RTTIME),
];

/// What holds when nobody says otherwise: as docker's containers have it.
const DEFAULTS: [Limit; 3] = [
    Limit { resource: libc::RLIMIT_NOFILE, soft: 1024, hard: 1 << 20, is_default: true },
    Limit { resource: libc::RLIMIT_CORE, soft: u64::MAX, hard: u64::MAX, is_default: true },
    Limit { resource: libc::RLIMIT_NPROC, soft: u64::MAX, hard: u64::MAX, is_default: true },
];

/// The limits of a process: the defaults, over them each list in turn.
///
/// # Errors
/// `invalid_config` for an unknown name or a soft limit above the hard one.
pub fn merge(lists: &[&[ResourceLimit]]) -> Result<Vec<Limit>, GuestError> {
    let mut limits = DEFAULTS.to_vec();
    for wanted in lists.iter().copied().flatten() {
        let name = wanted.resource.as_str();
        let Some((_, resource)) = NAMES.iter().find(|(known, _)| *known == name) else {
            return Err(GuestError::new(ErrorCode::InvalidConfig, "unknown resource limit"));
        };
        if wanted.soft > wanted.hard {
            let message = format!("resource limit {name}: the soft limit is above the hard limit");
            return Err(GuestError::new(ErrorCode::InvalidConfig, message));
        }
        limits.retain(|limit| limit.resource != *resource);
        limits.push(Limit { resource: *resource, soft: wanted.soft, hard: wanted.hard, is_default: false });
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(resource: &str, soft: u64, hard: u64) -> ResourceLimit {
        ResourceLimit { resource: resource.into(), soft, hard }
    }

    #[test]
    fn later_lists_win_and_defaults_hold_otherwise() {
        let limits = merge(&[&[limit("nofile", 10, 20), limit("cpu", 1, 1)], &[limit("nofile", 11, 21)]]).unwrap();
        let of = |resource| limits.iter().filter(|limit| limit.resource == resource).collect::<Vec<_>>();
        assert_eq!(
            of(libc::RLIMIT_NOFILE),
            [&Limit { resource: libc::RLIMIT_NOFILE, soft: 11, hard: 21, is_default: false }]
        );
        assert_eq!(of(libc::RLIMIT_CPU).len(), 1);
        assert_eq!(of(libc::RLIMIT_CORE)[0].soft, u64::MAX);
    }

    #[test]
    fn unknown_names_and_crossed_limits_are_refused() {
        assert_eq!(merge(&[&[limit("memory", 1, 1)]]).unwrap_err().code, ErrorCode::InvalidConfig);
        assert!(merge(&[&[limit("cpu", 2, 1)]]).unwrap_err().message.contains("cpu"));
    }
}
