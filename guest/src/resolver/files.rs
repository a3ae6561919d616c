//! hosts(5) and resolv.conf(5) as the guest has them. Pure; both files are the image's or the workload's and hostile.

use std::net::IpAddr;
use std::time::Duration;

/// Most name servers that are asked (as in glibc).
const SERVERS_MAX: usize = 3;
/// Most search domains.
const SEARCH_MAX: usize = 6;
/// Most addresses one name has.
pub const ADDRESSES_MAX: usize = 8;

/// Whom to ask and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvConf {
    /// Name servers in the order they are asked.
    pub servers: Vec<IpAddr>,
    /// Domains tried with names of few dots.
    pub search: Vec<String>,
    /// A name with this many dots is tried as it is first.
    pub ndots: usize,
    /// Time for one server to answer.
    pub timeout: Duration,
    /// Rounds over all servers.
    pub attempts: u32,
}

impl ResolvConf {
    /// Reads the file's text; what is not understood is passed over. No name server means the local one, as in resolv.conf(5).
    #[must_use]
    pub fn parse(text: &[u8]) -> Self {
        let mut conf =
            Self { servers: Vec::new(), search: Vec::new(), ndots: 1, timeout: Duration::from_secs(3), attempts: 2 };
        for line in String::from_utf8_lossy(text).lines() {
            let line = line.split(['#', ';']).next().unwrap_or_default();
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    if let Some(Ok(server)) = words.next().map(str::parse)
                        && conf.servers.len() < SERVERS_MAX
                    {
                        conf.servers.push(server);
                    }
                }
                // The last one wins.
                Some("search" | "domain") => {
                    conf.search = words.take(SEARCH_MAX).map(|word| word.trim_matches('.').to_owned()).collect();
                }
                Some("options") => {
                    for option in words {
                        let Some((name, value)) = option.split_once(':') else { continue };
                        let Ok(value) = value.parse::<u32>() else { continue };
                        match name {
                            "ndots" => conf.ndots = value.min(15) as usize,
                            "timeout" => conf.timeout = Duration::from_secs(u64::from(value.clamp(1, 5))),
                            "attempts" => conf.attempts = value.clamp(1, 3),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        if conf.servers.is_empty() {
            conf.servers.push(IpAddr::from([127, 0, 0, 1]));
        }
        conf
    }

    /// The full names to ask for, in order.
    #[must_use]
    pub fn candidates(&self, name: &str) -> Vec<String> {
        if let Some(whole) = name.strip_suffix('.') {
            return vec![whole.to_owned()];
        }
        let searched = self.search.iter().filter(|domain| !domain.is_empty()).map(|domain| format!("{name}.{domain}"));
        if name.matches('.').count() >= self.ndots {
            std::iter::once(name.to_owned()).chain(searched).collect()
        } else {
            searched.chain(std::iter::once(name.to_owned())).collect()
        }
    }
}

/// The addresses a hosts file has for a name.
#[must_use]
pub fn hosts(text: &[u8], name: &str) -> Vec<IpAddr> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let mut addresses = Vec::new();
    for line in String::from_utf8_lossy(text).lines() {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        let Some(Ok(address)) = words.next().map(str::parse) else { continue };
        if words.any(|word| word.eq_ignore_ascii_case(name))
            && addresses.len() < ADDRESSES_MAX
            && !addresses.contains(&address)
        {
            addresses.push(address);
        }
    }
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_found_by_any_of_their_names() {
        let text = b"# comment\n127.0.0.1 localhost lo # box\n::1 localhost\n10.0.0.9\tDB db.internal\nnonsense x\n";
        assert_eq!(hosts(text, "localhost").len(), 2);
        assert_eq!(hosts(text, "db"), [IpAddr::from([10, 0, 0, 9])]);
        assert_eq!(hosts(text, "DB.INTERNAL."), [IpAddr::from([10, 0, 0, 9])]);
        for missing in ["box", "x", "nonsense", ""] {
            assert!(hosts(text, missing).is_empty(), "{missing}");
        }
    }

    #[test]
    fn resolv_conf_is_read_within_limits() {
        let conf = ResolvConf::parse(
            b"nameserver 10.0.0.1\nnameserver bad\nnameserver fe80::1\nsearch a.test. b.test\noptions ndots:2 timeout:99 rotate\n",
        );
        assert_eq!(conf.servers.len(), 2);
        assert_eq!((conf.ndots, conf.timeout), (2, Duration::from_secs(5)));
        assert_eq!(conf.candidates("db"), ["db.a.test", "db.b.test", "db"]);
        assert_eq!(conf.candidates("x.y.z"), ["x.y.z", "x.y.z.a.test", "x.y.z.b.test"]);
        assert_eq!(conf.candidates("whole."), ["whole"]);
        assert_eq!(ResolvConf::parse(b"").servers, [IpAddr::from([127, 0, 0, 1])]);
        assert_eq!(ResolvConf::parse(&b"nameserver 1.1.1.1\n".repeat(9)).servers.len(), SERVERS_MAX);
    }
}
