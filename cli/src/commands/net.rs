//! `msb net`: what a sandbox's network refused, and why it would.

use clap::{Args, Subcommand};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use msb_protocol::control::{NetworkDecision, NetworkLogQuery};
use msb_protocol::vmm::NetworkExplanation;

use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::printer::plain;
use crate::{parse, time};

/// What to ask of a network.
#[derive(Debug, Subcommand)]
pub enum NetCommand {
    /// Show what was refused, and by which rule
    Log(NetLogArgs),
    /// Say which rule would decide about a target, without sending anything
    Explain(NetExplainArgs),
}

/// Options of `net log`.
#[derive(Debug, Args)]
pub struct NetLogArgs {
    /// The sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Go on with new lines until the sandbox rests
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "COUNT")]
    pub tail: Option<u64>,
}

/// Options of `net explain`.
#[derive(Debug, Args)]
pub struct NetExplainArgs {
    /// The sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Where to: a URL, NAME:PORT, ADDRESS:PORT, udp://NAME:PORT or icmp://ADDRESS
    #[arg(value_name = "TARGET")]
    pub target: String,
}

/// Carries it out.
///
/// # Errors
/// `sandbox_not_found`, `invalid_request`.
pub async fn run(command: NetCommand, context: &Context) -> Result<ExitStatus, Failure> {
    match command {
        NetCommand::Log(args) => log(args, context).await,
        NetCommand::Explain(args) => explain(args, context).await,
    }
}

async fn log(args: NetLogArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let (name, zone) = (parse::name(&args.name)?, context.zone());
    let query = NetworkLogQuery { follow: args.follow, tail: args.tail };
    let mut decisions = context.client().await?.network_log(&name, &query).await?;
    while let Some(decision) = decisions.next().await? {
        if context.printer.is_json() {
            context.printer.json_line(&decision)?;
        } else {
            context.printer.text(&render_decision(&decision, &zone))?;
        }
    }
    Ok(ExitStatus::SUCCESS)
}

async fn explain(args: NetExplainArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let name = parse::name(&args.name)?;
    let explanation = context.client().await?.explain_network(&name, &args.target).await?;
    if context.printer.is_json() {
        context.printer.json(&explanation)?;
    } else {
        context.printer.text(&render_explanation(&explanation))?;
    }
    Ok(ExitStatus::SUCCESS)
}

/// One decision in a line.
#[must_use]
pub fn render_decision(decision: &NetworkDecision, zone: &TimeZone) -> String {
    let time = i64::try_from(decision.at_ns / 1_000_000).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    let mut text = format!(
        "{} {} {} {}",
        time::precise(time.unwrap_or_default(), zone),
        decision.verdict,
        decision.direction,
        decision.transport
    );
    let place = match (&decision.address, decision.port) {
        (Some(address), Some(port)) if address.contains(':') => Some(format!("[{address}]:{port}")),
        (Some(address), Some(port)) => Some(format!("{address}:{port}")),
        (Some(address), None) => Some(address.clone()),
        (None, _) => None,
    };
    let kind = decision.record_type.as_ref().map(|kind| format!("type {kind}"));
    let class = decision.class.as_ref().map(|class| format!("({class})"));
    for part in [&decision.name, &kind, &place, &class].into_iter().flatten() {
        text.push(' ');
        text.push_str(part);
    }
    if let Some(by) = &decision.by {
        text.push_str(&format!(" by {}", decider(by, decision.index, &decision.rule)));
    }
    if decision.suppressed > 0 {
        text.push_str(&format!(" ({} lines before it are left out)", decision.suppressed));
    }
    format!("{}\n", plain(&text.replace('\n', "\\n")))
}

fn decider(by: &str, index: Option<usize>, rule: &str) -> String {
    let number = index.map(|index| index + 1).unwrap_or_default();
    match by {
        "rule" => format!("rule {number} {rule}"),
        "profile_rule" => format!("rule {number} of its profile {rule}"),
        "default" => "default".into(),
        "encrypted_dns" => "the rule against encrypted DNS".into(),
        other => other.into(),
    }
}

/// An explanation for people: the verdict, then each step.
#[must_use]
pub fn render_explanation(explanation: &NetworkExplanation) -> String {
    let mut text = format!("{}\n", explanation.action);
    for step in &explanation.steps {
        text.push_str(&format!("  {:5} {}: {}\n", step.action, step.about, step.because));
    }
    plain(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decisions_are_lines_for_people() {
        let text = r#"{"at_ns":1500000000,"verdict":"deny","direction":"egress","transport":"tcp","address":"10.0.0.1","port":443,"class":"private","by":"rule","index":2,"rule":"deny@private"}"#;
        let decision: NetworkDecision = serde_json::from_str(text).unwrap();
        assert_eq!(
            render_decision(&decision, &TimeZone::UTC),
            "1970-01-01T00:00:01.500+00:00 deny egress tcp 10.0.0.1:443 (private) by rule 3 deny@private\n"
        );
        let text = r#"{"at_ns":0,"verdict":"deny","direction":"egress","transport":"udp","name":"x.test","record_type":"A","by":"default","rule":"default","suppressed":3}"#;
        let decision: NetworkDecision = serde_json::from_str(text).unwrap();
        assert_eq!(
            render_decision(&decision, &TimeZone::UTC),
            "1970-01-01T00:00:00.000+00:00 deny egress udp x.test type A by default (3 lines before it are left out)\n"
        );
    }
}
