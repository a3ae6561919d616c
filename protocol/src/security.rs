//! Security profiles: what a workload may do inside its sandbox. One table of capabilities with the reason of each line; the agent
//! applies it, `msb inspect` shows it, docs/security.md explains it. Nothing here does I/O.

use serde::{Deserialize, Serialize};

use crate::error::{ApiError, ErrorCode};
use crate::mount::MountOptions;

/// What a workload may do inside its sandbox.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum SecurityProfile {
    /// What root of a machine may do: sudo and container engines work.
    #[default]
    Default,
    /// No new privileges, and no capability that reaches the guest's kernel or the agent.
    Restricted,
    /// As `Restricted`, with an allow-list of system calls, a read-only root and no new user namespaces.
    Strict,
}

/// One capability (capabilities(7)) and the profiles that keep it.
#[derive(Clone, Copy, Debug)]
pub struct Capability {
    /// Its name without `CAP_`, lower case. Its number is its place in [`CAPABILITIES`].
    pub name: &'static str,
    /// The strictest profile that keeps it; none: no profile does.
    pub kept_until: Option<SecurityProfile>,
    /// Why it ends there, or why it stays.
    pub reason: &'static str,
}

macro_rules! capabilities {
    ($($name:literal $kept:ident $reason:literal)*) => {
        /// Every capability of Linux 6.1, in the order of their numbers.
        pub const CAPABILITIES: &[Capability] = &[$(Capability { name: $name, kept_until: capabilities!(@ $kept), reason: $reason },)*];
    };
    (@ nobody) => { None };
    (@ default) => { Some(SecurityProfile::Default) };
    (@ restricted) => { Some(SecurityProfile::Restricted) };
    (@ strict) => { Some(SecurityProfile::Strict) };
}

capabilities! {
    "chown" strict "installers and daemons give files to their users; it ends at the file system"
    "dac_override" strict "root reads and writes every file of its own root, which has nothing of the agent's in it"
    "dac_read_search" default "open_by_handle_at reaches files outside the visible tree by guessing handles"
    "fowner" strict "as chown: modes and times of other users' files"
    "fsetid" strict "keeps set-group-id directories as they are"
    "kill" strict "a supervisor ends its children after they changed their user"
    "setgid" strict "a daemon that starts as root becomes its own group"
    "setuid" strict "a daemon that starts as root becomes its own user"
    "setpcap" restricted "only takes away; daemons use it to drop what they have"
    "linux_immutable" default "marks files so that later runs cannot change them"
    "net_bind_service" strict "ports below 1024 are open to everybody here, programs ask for it all the same"
    "net_broadcast" default "unused by the kernel"
    "net_admin" default "routes, firewalls and interfaces: netfilter is the most attacked part of the kernel"
    "net_raw" default "raw and packet sockets reach kernel code that ordinary ones do not; ping works without"
    "ipc_lock" default "locked memory starves the agent"
    "ipc_owner" default "System V objects of other users"
    "sys_module" default "loads code into the kernel; this kernel has no modules, another may"
    "sys_rawio" default "I/O ports, /dev/mem, raw commands to disks"
    "sys_chroot" restricted "package managers and tests use it; without mounts and mknod it leads nowhere"
    "sys_ptrace" default "reads and writes other processes, the agent among them"
    "sys_pacct" default "process accounting of the whole machine"
    "sys_admin" default "mounts, namespaces, BPF, device control: as good as the kernel"
    "sys_boot" nobody "resets the machine under the agent; `msb stop` is there for that"
    "sys_nice" default "real-time priorities starve the agent"
    "sys_resource" default "passes quotas and limits that the sandbox was given"
    "sys_time" default "the clock belongs to the host, which keeps it right"
    "sys_tty_config" default "virtual terminals, which there are none of"
    "mknod" default "device nodes open the disks below the file systems"
    "lease" default "stops other users' opens"
    "audit_write" default "writes records in the kernel's audit log"
    "audit_control" default "configures the kernel's audit"
    "setfcap" restricted "package managers set file capabilities; with no_new_privs they give nothing"
    "mac_override" default "passes mandatory access control"
    "mac_admin" default "configures mandatory access control"
    "syslog" default "the kernel's log and its addresses"
    "wake_alarm" default "wakes a machine that never sleeps"
    "block_suspend" default "as wake_alarm"
    "audit_read" default "reads the kernel's audit log"
    "perfmon" default "performance counters see the kernel and other processes"
    "bpf" default "runs programs in the kernel"
    "checkpoint_restore" default "chooses process ids and reads mappings of others"
}

/// Commands that cannot work without the privileges that `restricted` takes away, and what they lack.
const REFUSED_COMMANDS: [(&str, &str); 12] = [
    ("sudo", "no_new_privs"),
    ("doas", "no_new_privs"),
    ("pkexec", "no_new_privs"),
    ("dockerd", "CAP_SYS_ADMIN and CAP_NET_ADMIN"),
    ("containerd", "CAP_SYS_ADMIN"),
    ("buildkitd", "CAP_SYS_ADMIN"),
    ("systemd", "CAP_SYS_ADMIN"),
    ("mount", "CAP_SYS_ADMIN"),
    ("umount", "CAP_SYS_ADMIN"),
    ("nsenter", "CAP_SYS_ADMIN"),
    ("iptables", "CAP_NET_ADMIN"),
    ("insmod", "CAP_SYS_MODULE"),
];

/// What a profile comes to, as `msb inspect` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SecurityReport {
    /// The profile.
    pub profile: SecurityProfile,
    /// Capabilities a process of root has, without `CAP_`.
    pub capabilities: Vec<String>,
    /// Whether set-user-id programs and file capabilities give nothing.
    pub no_new_privs: bool,
    /// Whether system calls are limited to a list.
    pub system_call_allow_list: bool,
    /// Whether the root is read-only, with tmpfs on /tmp, /run and /var/tmp.
    pub read_only_root: bool,
    /// Whether new user namespaces can be made.
    pub user_namespaces: bool,
    /// Options that every mount of the user's gets, whatever it says.
    pub forced_mount_options: Vec<String>,
}

impl SecurityProfile {
    /// Every profile, from the widest to the narrowest.
    pub const ALL: [Self; 3] = [Self::Default, Self::Restricted, Self::Strict];

    /// The profile as text.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Restricted => "restricted",
            Self::Strict => "strict",
        }
    }

    /// The profile of a text of the guest border; one that this version does not know counts as the narrowest.
    #[must_use]
    pub fn from_wire(text: &str) -> Self {
        match text {
            "" | "default" => Self::Default,
            "restricted" => Self::Restricted,
            _ => Self::Strict,
        }
    }

    /// Whether it takes privileges away at all.
    #[must_use]
    pub fn confines(self) -> bool {
        self != Self::Default
    }

    /// Capabilities that it keeps, one bit each by number.
    #[must_use]
    pub fn capability_mask(self) -> u64 {
        self.kept().fold(0, |mask, (number, _)| mask | 1 << number)
    }

    fn kept(self) -> impl Iterator<Item = (usize, &'static Capability)> {
        let keeps = move |capability: &Capability| capability.kept_until.is_some_and(|until| until >= self);
        CAPABILITIES.iter().enumerate().filter(move |(_, capability)| keeps(capability))
    }

    /// Options that it forces on every mount of the user's.
    #[must_use]
    pub fn forced_mount_options(self) -> MountOptions {
        MountOptions { no_suid: self.confines(), no_dev: self.confines(), ..MountOptions::default() }
    }

    /// What it comes to.
    #[must_use]
    pub fn report(self) -> SecurityReport {
        SecurityReport {
            profile: self,
            capabilities: self.kept().map(|(_, capability)| capability.name.to_owned()).collect(),
            no_new_privs: self.confines(),
            system_call_allow_list: self == Self::Strict,
            read_only_root: self == Self::Strict,
            user_namespaces: self != Self::Strict,
            forced_mount_options: self.forced_mount_options().words().into_iter().skip(1).map(String::from).collect(),
        }
    }

    /// Whether a main workload can work under it.
    ///
    /// # Errors
    /// `invalid_config` naming what the command would lack.
    pub fn check_command(self, argv: &[String]) -> Result<(), ApiError> {
        let Some(program) = argv.first().filter(|_| self.confines()) else { return Ok(()) };
        let name = program.rsplit('/').next().unwrap_or(program);
        match REFUSED_COMMANDS.iter().find(|(refused, _)| *refused == name) {
            None => Ok(()),
            Some((_, lacks)) => Err(ApiError::new(
                ErrorCode::InvalidConfig,
                format!("{name} cannot work with --security {}: it lacks {lacks}", self.as_str()),
            )
            .with_hint("use --security default, or another command")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_profile_keeps_less_than_the_one_before() {
        let masks = SecurityProfile::ALL.map(SecurityProfile::capability_mask);
        assert_eq!(CAPABILITIES.len(), 41);
        assert_eq!(masks[0], ((1 << 41) - 1) & !(1 << 22));
        assert_eq!(masks[1] & !masks[0], 0);
        assert_eq!(masks[2] & !masks[1], 0);
        assert_eq!(masks[2], 0b100_1111_1011);
        assert_eq!(masks[1].count_ones(), 11);
        for (number, name) in [(0, "chown"), (12, "net_admin"), (21, "sys_admin"), (39, "bpf")] {
            assert_eq!(CAPABILITIES[number].name, name);
        }
    }

    #[test]
    fn commands_that_cannot_work_are_refused_and_others_are_not() {
        let check = |profile: SecurityProfile, command: &str| profile.check_command(&[command.to_owned()]).is_ok();
        for command in ["sudo", "/usr/bin/dockerd"] {
            assert!(check(SecurityProfile::Default, command));
            assert!(!check(SecurityProfile::Restricted, command));
            assert!(!check(SecurityProfile::Strict, command));
        }
        assert!(check(SecurityProfile::Strict, "/bin/sh"));
        assert!(SecurityProfile::Strict.check_command(&[]).is_ok());
    }

    #[test]
    fn an_unknown_profile_of_a_newer_host_is_the_narrowest() {
        for profile in SecurityProfile::ALL {
            assert_eq!(SecurityProfile::from_wire(profile.as_str()), profile);
        }
        assert_eq!(SecurityProfile::from_wire("later"), SecurityProfile::Strict);
    }
}
