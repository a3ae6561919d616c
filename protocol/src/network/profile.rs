//! What each profile stands for: rules and defaults. Read by the policy engine, which decides, and by `inspect`, which shows them.

use super::{Action, AddressGroup, NetworkProfile, NetworkSpec, Rule, Target, Transport};

/// Rules and defaults of a profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProfilePolicy {
    /// Rules, first match wins, after the sandbox's own.
    pub rules: Vec<Rule>,
    /// What happens to outbound connections that no rule decides.
    pub default_egress: Action,
    /// What happens to inbound connections that no rule decides.
    pub default_ingress: Action,
}

impl NetworkProfile {
    /// Its name in settings and documents.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Private => "private",
            Self::Host => "host",
            Self::All => "all",
            Self::None => "none",
        }
    }

    /// What it stands for.
    #[must_use]
    pub fn policy(self) -> ProfilePolicy {
        let group = |group| Rule::egress(Action::Allow, Target::Group(group));
        let dns =
            || [group(AddressGroup::Host).on(Transport::Udp, 53), group(AddressGroup::Host).on(Transport::Tcp, 53)];
        let with = |groups: &[AddressGroup]| dns().into_iter().chain(groups.iter().copied().map(group)).collect();
        let (rules, default_egress, default_ingress) = match self {
            Self::Public => (with(&[AddressGroup::Public]), Action::Deny, Action::Allow),
            Self::Private => (with(&[AddressGroup::Public, AddressGroup::Private]), Action::Deny, Action::Allow),
            Self::Host => (with(&[AddressGroup::Public, AddressGroup::Host]), Action::Deny, Action::Allow),
            Self::All => (Vec::new(), Action::Allow, Action::Allow),
            Self::None => (Vec::new(), Action::Deny, Action::Deny),
        };
        ProfilePolicy { rules, default_egress, default_ingress }
    }
}

impl NetworkSpec {
    /// The policy as it is tried, one line for each rule and default: what `inspect` shows.
    #[must_use]
    pub fn policy_lines(&self) -> Vec<String> {
        let profile = self.profile.policy();
        let own = self.rules.iter().map(|rule| format!("{rule}"));
        let theirs = profile.rules.iter().map(|rule| format!("{rule} (profile {})", self.profile.as_str()));
        let default = |direction: &str, own: Option<Action>, of_profile: Action| match own {
            Some(action) => format!("default {direction}: {}", action.as_str()),
            None => format!("default {direction}: {} (profile {})", of_profile.as_str(), self.profile.as_str()),
        };
        own.chain(theirs)
            .chain([
                default("egress", self.default_egress, profile.default_egress),
                default("ingress", self.default_ingress, profile.default_ingress),
            ])
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_reads_in_the_order_it_is_tried() {
        let spec = NetworkSpec {
            rules: vec!["deny@93.184.0.0/16".parse().unwrap()],
            default_ingress: Some(Action::Deny),
            ..NetworkSpec::default()
        };
        assert_eq!(
            spec.policy_lines(),
            [
                "deny@93.184.0.0/16",
                "allow@host:udp:53 (profile public)",
                "allow@host:tcp:53 (profile public)",
                "allow@public (profile public)",
                "default egress: deny (profile public)",
                "default ingress: deny",
            ]
        );
    }
}
