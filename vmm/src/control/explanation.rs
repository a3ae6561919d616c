//! The policy's explanation in the words of the border. Called by the control thread for `ExplainNetwork`, and by `main` for a network
//! that does not run.

use std::net::IpAddr;
use std::time::Duration;

use msb_network::policy::explain::{Explanation, Question, Step};
use msb_network::policy::pins::Pins;
use msb_network::policy::{Decider, Policy};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::network::VmNetwork;
use msb_protocol::vmm::{NetworkExplanation, NetworkExplanationStep};

/// A question in the words of people.
pub(super) fn question(target: &str) -> Result<Question, ApiError> {
    let shown: String = target.chars().take(200).collect();
    target.parse().map_err(|error| ApiError::new(ErrorCode::InvalidRequest, format!("{shown:?}: {error}")))
}

/// What the policy of a network says about a target before anything was resolved.
///
/// # Errors
/// `invalid_request` for a target that is none.
pub fn explain_network(network: &VmNetwork, target: &str) -> Result<NetworkExplanation, ApiError> {
    let question = question(target)?;
    let gateway = [IpAddr::V4(network.addresses.gateway_ipv4), IpAddr::V6(network.addresses.gateway_ipv6)];
    let host = gateway.into_iter().chain(network.host_addresses.iter().copied()).collect();
    let policy = Policy::new(&network.spec, host);
    Ok(explanation(policy.explain(Duration::ZERO, &question, &Pins::default())))
}

/// Translates.
pub(super) fn explanation(from: Explanation) -> NetworkExplanation {
    NetworkExplanation { action: from.action.as_str().into(), steps: from.steps.into_iter().map(step).collect() }
}

fn step(from: Step) -> NetworkExplanationStep {
    let (by, index) = match from.decider {
        Decider::Rule { index } => ("rule", Some(index)),
        Decider::ProfileRule { index } => ("profile_rule", Some(index)),
        Decider::Default => ("default", None),
        Decider::EncryptedDns => ("encrypted_dns", None),
    };
    NetworkExplanationStep {
        about: from.about,
        action: from.action.as_str().into(),
        by: by.into(),
        index,
        rule: from.rule,
        because: from.because,
    }
}
