//! `msb inspect`: everything about one sandbox.

use std::fmt::Write as _;

use clap::Args;
use msb_protocol::control::SandboxDetail;
use msb_protocol::mount::{Mount, MountOptions};
use msb_protocol::quantity::show_bytes;
use msb_protocol::spec::{RootKind, Workload};

use super::status::{end, quoted};
use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::printer::plain;
use crate::{parse, time};

/// Options of `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// Carries it out.
///
/// # Errors
/// `sandbox_not_found`.
pub async fn run(args: InspectArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let name = parse::name(&args.name)?;
    let detail = context.client().await?.inspect(&name).await?;
    if context.printer.is_json() {
        context.printer.json(&detail)?
    } else {
        context.printer.text(&render(&detail, &context.zone()))?
    }
    Ok(ExitStatus::SUCCESS)
}

/// The detail for people.
#[must_use]
pub fn render(detail: &SandboxDetail, zone: &jiff::tz::TimeZone) -> String {
    let (summary, spec) = (&detail.summary, &detail.spec);
    let mut text = Lines::default();
    text.line("Name", summary.name.as_str());
    text.line("Id", &summary.id.to_string());
    text.line("State", summary.status.as_str());
    match spec.root {
        RootKind::Image => {
            text.line("Image", &summary.image);
            text.line("Image digest", &detail.image_digest);
        }
        RootKind::Directory => text.line("Root", &format!("directory {}, unchanged", summary.image)),
        RootKind::Disk => text.line("Root", &format!("disk {}, unchanged", summary.image)),
    }
    text.optional("Snapshot", spec.snapshot.as_ref().map(ToString::to_string));
    let workload = match spec.workload {
        Workload::None => "none: it waits for exec".to_owned(),
        Workload::Main => words(&summary.command),
    };
    text.line("Workload", &workload);
    text.line("Created", &time::local(summary.created_at, zone));
    text.optional("Ready since", summary.started_at.map(|at| time::local(at, zone)));
    text.optional(
        "Last end",
        summary.last_end.as_ref().map(|run| format!("{} at {}", end(run), time::local(run.at, zone))),
    );
    text.optional("", summary.last_end.as_ref().map(|run| run.message.clone()).filter(|message| !message.is_empty()));
    text.line("Restarts", &summary.restarts.to_string());
    text.optional("Next try", detail.next_try_at.map(|at| time::local(at, zone)));
    text.line("CPUs", &spec.cpus.to_string());
    text.line("Memory", &show_bytes(u64::from(spec.memory_mib) << 20));
    let root = format!(
        "{} ({} on the host)",
        show_bytes(u64::from(spec.root_size_mib) << 20),
        show_bytes(detail.root_allocated_bytes)
    );
    text.line("Writable root", &root);
    let engine = summary.engine.unwrap_or(spec.engine).as_str();
    text.line(
        "Engine",
        &detail.engine_reason.as_ref().map_or(engine.to_owned(), |reason| format!("{engine} ({reason})")),
    );
    text.optional("Kernel", spec.kernel.clone());
    for (index, line) in security(detail).iter().enumerate() {
        text.line(if index == 0 { "Security" } else { "" }, line);
    }
    for (index, mount) in spec.mounts.iter().enumerate() {
        text.line(if index == 0 { "Mounts" } else { "" }, &mounted(mount, spec.security.forced_mount_options()));
    }
    if !spec.patches.is_empty() {
        let paths: Vec<&str> = spec.patches.iter().map(msb_protocol::mount::Patch::path).collect();
        text.line("Patches", &paths.join(" "));
    }
    network(&mut text, detail);
    text.optional("Ports", Some(summary.ports.join(", ")).filter(|ports| !ports.is_empty()));
    text.optional("User", spec.user.clone());
    text.optional("Workdir", spec.workdir.clone());
    text.optional("Hostname", spec.hostname.clone());
    text.line(
        "Lives",
        match (spec.detached, spec.ephemeral) {
            (true, false) => "until somebody removes it",
            (true, true) => "until its workload ends",
            (false, false) => "attached: it stops with its creator",
            (false, true) => "attached: it is removed with its creator",
        },
    );
    // Values of variables may be secrets and are long; JSON has them.
    text.optional(
        "Variables",
        Some(spec.env.keys().cloned().collect::<Vec<_>>().join(" ")).filter(|names| !names.is_empty()),
    );
    for (index, (key, value)) in summary.labels.iter().enumerate() {
        text.line(if index == 0 { "Labels" } else { "" }, &format!("{key}={value}"));
    }
    if let Some(report) = &detail.health_report {
        let streak = if report.failing_streak > 0 {
            format!(", {} failures in a row", report.failing_streak)
        } else {
            String::new()
        };
        text.line("Health", &format!("{}{streak}", report.status.as_str()));
        let checked = report.checked_at.map(|at| format!("{} at {}", report.outcome, time::local(at, zone)));
        text.optional("Last check", checked);
        for line in report.output.lines() {
            text.line("", line);
        }
    }
    text.optional("Health command", spec.health.as_ref().map(|check| words(&check.command)));
    text.optional("Pre-stop hook", spec.pre_stop.as_ref().map(|hook| words(&hook.command)));
    text.optional("Memory kept", detail.memory_allocated_bytes.map(show_bytes));
    text.optional("Idle for", detail.idle_for_ms.map(time::duration));
    text.optional("Stops in", detail.stops_in_ms.map(time::duration));
    text.optional("Last activity", detail.last_activity.clone());
    text.optional("Run", detail.boot_id.map(|id| id.to_string()));
    text.optional("VM process", detail.vmm_pid.map(|pid| pid.to_string()));
    let phases = detail
        .boot_phases
        .iter()
        .map(|phase| format!("{} {} ms", phase.name, phase.duration_us / 1000))
        .collect::<Vec<_>>();
    text.optional("Boot", Some(phases.join(", ")).filter(|phases| !phases.is_empty()));
    text.optional("Jail", Some(detail.jail.in_force.join(", ")).filter(|list| !list.is_empty()));
    text.optional("Jail lacks", Some(detail.jail.missing.join(", ")).filter(|list| !list.is_empty()));
    text.line("Directory", &detail.directory);
    text.line("Heartbeat", &detail.heartbeat_file);
    if let Some(error) = &detail.boot_error {
        text.line("Boot error", &format!("{} ({})", error.error.message, error.stage));
        for line in error.console_tail.lines() {
            text.line("", line);
        }
    }
    text.0
}

fn network(text: &mut Lines, detail: &SandboxDetail) {
    match &detail.network.addresses {
        None => text.line("Network", "loopback only"),
        Some(link) => text.line(
            "Network",
            &format!("{}/{}, {}/{}", link.guest_ipv4, link.ipv4_prefix_len, link.guest_ipv6, link.ipv6_prefix_len),
        ),
    }
    for (index, line) in detail.network.policy.iter().enumerate() {
        text.line(if index == 0 { "Policy" } else { "" }, line);
    }
}

/// What the profile comes to.
fn security(detail: &SandboxDetail) -> Vec<String> {
    let report = &detail.security;
    let mut words = vec![report.profile.as_str()];
    let facts = [
        (report.no_new_privs, "no_new_privs"),
        (report.system_call_allow_list, "system calls by allow-list"),
        (report.read_only_root, "read-only root"),
        (!report.user_namespaces, "no new user namespaces"),
    ];
    words.extend(facts.into_iter().filter_map(|(holds, word)| holds.then_some(word)));
    let mut lines = vec![words.join(", ")];
    if report.no_new_privs {
        lines.push(format!("capabilities: {}", report.capabilities.join(" ")));
    }
    if !report.forced_mount_options.is_empty() {
        lines.push(format!("forced on mounts: {}", report.forced_mount_options.join(",")));
    }
    lines
}

/// A mount with its options, and what the profile adds to them.
fn mounted(mount: &Mount, forced: MountOptions) -> String {
    let own = mount.options.words();
    let added: Vec<&str> = mount.options.with(forced).words().into_iter().filter(|word| !own.contains(word)).collect();
    if added.is_empty() {
        format!("{mount} ({})", mount.options)
    } else {
        format!("{mount} ({}; forced: {})", mount.options, added.join(","))
    }
}

fn words(command: &[String]) -> String {
    command.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn line(&mut self, key: &str, value: &str) {
        let colon = if key.is_empty() { ' ' } else { ':' };
        let _ = writeln!(self.0, "{:16}{}", format!("{key}{colon}"), plain(&value.replace('\n', "\\n")));
    }

    fn optional(&mut self, key: &str, value: Option<String>) {
        if let Some(value) = value {
            self.line(key, &value);
        }
    }
}
