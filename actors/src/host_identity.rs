//! Who this host and this service are, for whoever collects from many: stable, unique, and no secret given away. Called by the metrics
//! operation, on a blocking thread.

use std::path::Path;

use msb_image::Digest;

/// Identities for metrics and traces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostIdentity {
    /// Of the host: its machine id, hashed for this application as machine-id(5) asks.
    pub host_id: String,
    /// The host's name.
    pub host_name: String,
    /// Of the service of one home on this host; stays the same across restarts.
    pub instance_id: String,
}

impl HostIdentity {
    /// Reads the identities of this machine for the service of `home`.
    #[must_use]
    pub fn read(home: &Path) -> Self {
        let host_name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        // A machine without an id is told apart by its name at least.
        let machine = ["/etc/machine-id", "/var/lib/dbus/machine-id"]
            .iter()
            .find_map(|path| std::fs::read_to_string(path).ok().filter(|text| !text.trim().is_empty()))
            .unwrap_or_else(|| host_name.clone());
        Self::of(machine.trim(), host_name, home)
    }

    fn of(machine: &str, host_name: String, home: &Path) -> Self {
        let host_id = Digest::of(format!("msb host {machine}").as_bytes()).hex()[..32].to_owned();
        let service = format!("msb service {machine} {}", home.display());
        let instance_id = Digest::of(service.as_bytes()).hex()[..32].to_owned();
        Self { host_id, host_name, instance_id }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_stable_apart_and_hide_the_machine_id() {
        let one = HostIdentity::of("0123456789abcdef", "h".into(), Path::new("/a"));
        assert_eq!(one, HostIdentity::of("0123456789abcdef", "h".into(), Path::new("/a")));
        let other_home = HostIdentity::of("0123456789abcdef", "h".into(), Path::new("/b"));
        assert_eq!(one.host_id, other_home.host_id);
        assert_ne!(one.instance_id, other_home.instance_id);
        assert_ne!(one.host_id, HostIdentity::of("fedcba9876543210", "h".into(), Path::new("/a")).host_id);
        assert!(!format!("{one:?}").contains("0123456789abcdef"));
    }
}
