//! `msb metrics`: what sandboxes use now, as a table, a stream of lines or JSON. One request whatever the number of sandboxes.

use std::time::Duration;

use clap::{Args, ValueEnum};
use jiff::Timestamp;
use msb_protocol::control::{MetricsSnapshot, SandboxMetrics};
use msb_protocol::id::SandboxName;
use msb_protocol::quantity;
use msb_sdk::Client;
use serde::Serialize;

use super::bulk::FilterArgs;
use crate::context::Context;
use crate::failure::{ExitStatus, Failure, invalid};
use crate::table::Table;
use crate::{parse, time};

/// Options of `metrics`.
#[derive(Debug, Args)]
pub struct MetricsArgs {
    /// Only these sandboxes, those that ended too
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// Only these.
    #[command(flatten)]
    pub filter: FilterArgs,
    /// Also the last values of those whose virtual machine ended
    #[arg(short, long)]
    pub all: bool,
    /// Show the table again and again, in the same place on a terminal
    #[arg(short, long, conflicts_with = "follow")]
    pub watch: bool,
    /// Go on with a line for each new sample
    #[arg(short, long)]
    pub follow: bool,
    /// Order of the rows
    #[arg(short, long, value_enum, value_name = "KEY", default_value_t)]
    pub sort: Sort,
    /// Time between two looks with --watch or --follow
    #[arg(short, long, value_name = "DURATION", default_value = "1s")]
    pub interval: String,
}

/// Order of the rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// The busiest first
    Cpu,
    /// Those with the most memory in use first
    Mem,
    /// By name
    #[default]
    Name,
}

/// One sandbox as programs read it: the keys of microsandbox, and ours behind them.
#[derive(Debug, Serialize)]
struct Row<'a> {
    name: &'a SandboxName,
    timestamp: Timestamp,
    cpu_percent: f64,
    memory_bytes: u64,
    memory_limit_bytes: u64,
    disk_read_bytes: u64,
    disk_write_bytes: u64,
    net_rx_bytes: u64,
    net_tx_bytes: u64,
    uptime_secs: f64,
    #[serde(flatten)]
    more: More<'a>,
}

#[derive(Debug, Serialize)]
struct More<'a> {
    id: String,
    status: &'static str,
    /// The run has ended: these are its last values.
    last: bool,
    restarts: u32,
    cpu_time_secs: f64,
    memory_resident_bytes: u64,
    disk_read_operations: u64,
    disk_write_operations: u64,
    net_rx_packets: u64,
    net_tx_packets: u64,
    root_used_bytes: Option<u64>,
    root_free_bytes: Option<u64>,
    root_allocated_bytes: u64,
    labels: &'a std::collections::BTreeMap<String, String>,
}

/// Memory in use as the guest counts it; before its agent has said so, what the host holds.
#[must_use]
pub fn memory_used(sandbox: &SandboxMetrics) -> u64 {
    sandbox.guest.map_or(sandbox.sample.memory_resident_bytes, |guest| guest.memory_used_bytes)
}

/// When a sample was taken.
#[must_use]
pub fn sampled_at(sandbox: &SandboxMetrics) -> Timestamp {
    Timestamp::from_nanosecond(i128::from(sandbox.sample.at_ns)).unwrap_or_default()
}

#[allow(clippy::cast_precision_loss, reason = "times stay exact far beyond any uptime")]
fn row(sandbox: &SandboxMetrics) -> Row<'_> {
    let sample = &sandbox.sample;
    Row {
        name: &sandbox.name,
        timestamp: sampled_at(sandbox),
        cpu_percent: (sandbox.cpu_utilization * 10_000.0).round() / 100.0,
        memory_bytes: memory_used(sandbox),
        memory_limit_bytes: sample.memory_limit_bytes,
        disk_read_bytes: sample.disk_read_bytes,
        disk_write_bytes: sample.disk_written_bytes,
        net_rx_bytes: sample.network_received_bytes,
        net_tx_bytes: sample.network_sent_bytes,
        uptime_secs: sample.uptime_ms as f64 / 1e3,
        more: More {
            id: sandbox.id.to_string(),
            status: sandbox.status.as_str(),
            last: sandbox.last,
            restarts: sandbox.restarts,
            cpu_time_secs: sample.cpu_time_us as f64 / 1e6,
            memory_resident_bytes: sample.memory_resident_bytes,
            disk_read_operations: sample.disk_read_operations,
            disk_write_operations: sample.disk_write_operations,
            net_rx_packets: sample.network_received_packets,
            net_tx_packets: sample.network_sent_packets,
            root_used_bytes: sandbox.guest.map(|guest| guest.root_used_bytes),
            root_free_bytes: sandbox.guest.map(|guest| guest.root_free_bytes),
            root_allocated_bytes: sample.root_allocated_bytes,
            labels: &sandbox.labels,
        },
    }
}

/// Carries it out.
///
/// # Errors
/// `sandbox_not_found` for a name, `invalid_label`, `invalid_selector`, and those of the service.
pub async fn run(args: MetricsArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let names = args.names.iter().map(|text| parse::name(text)).collect::<Result<Vec<_>, _>>()?;
    args.filter.check()?;
    let interval_ms = quantity::parse_duration_ms(&args.interval).map_err(|error| invalid(error.to_string()))?;
    if !(100..=3_600_000).contains(&interval_ms) {
        return Err(invalid(format!("an interval is 100ms to 1h, not {}", args.interval)));
    }
    let client = context.client().await?;
    let query = args.filter.metrics_query(args.names.clone());
    if args.watch || args.follow {
        let mut snapshots = client.metrics_stream(&query, Duration::from_millis(interval_ms)).await?;
        let mut seen = Seen::default();
        let mut first = true;
        while let Some(mut snapshot) = snapshots.next().await? {
            if std::mem::take(&mut first) {
                missing(&client, &names, &snapshot, context).await?;
            }
            choose(&mut snapshot, &args);
            if args.follow {
                snapshot.sandboxes.retain(|sandbox| seen.is_new(sandbox));
                follow(&snapshot, context)?;
            } else if context.printer.is_json() {
                let rows: Vec<_> = snapshot.sandboxes.iter().map(row).collect();
                context.printer.json_line(&rows)?;
            } else {
                context.printer.redraw(&table(&snapshot))?;
            }
        }
        return Ok(ExitStatus::SUCCESS);
    }
    let mut snapshot = client.metrics_of(&query).await?;
    missing(&client, &names, &snapshot, context).await?;
    choose(&mut snapshot, &args);
    if context.printer.is_json() {
        context.printer.json(&snapshot.sandboxes.iter().map(row).collect::<Vec<_>>())?;
    } else if context.printer.is_quiet() {
        let names: String = snapshot.sandboxes.iter().map(|sandbox| format!("{}\n", sandbox.name)).collect();
        context.printer.text(&names)?;
    } else {
        context.printer.table(&table(&snapshot))?;
    }
    Ok(ExitStatus::SUCCESS)
}

/// A name without a sample either does not exist, which is an error, or has not run.
async fn missing(
    client: &Client,
    names: &[SandboxName],
    snapshot: &MetricsSnapshot,
    context: &Context,
) -> Result<(), Failure> {
    for name in names {
        if !snapshot.sandboxes.iter().any(|sandbox| sandbox.name == *name) {
            let detail = client.inspect(name).await?;
            let state = detail.summary.status.as_str();
            context.printer.warning(&format!("sandbox {name} has no samples yet; it is {state}"));
        }
    }
    Ok(())
}

/// Leaves out what is not wanted and puts the rest in order.
fn choose(snapshot: &mut MetricsSnapshot, args: &MetricsArgs) {
    let by_name = !args.names.is_empty();
    snapshot.sandboxes.retain(|sandbox| args.all || by_name || !sandbox.last);
    sort(&mut snapshot.sandboxes, args.sort);
}

/// Puts sandboxes in order; those that are equal by name.
pub fn sort(sandboxes: &mut [SandboxMetrics], by: Sort) {
    sandboxes.sort_by(|a, b| {
        let order = match by {
            Sort::Cpu => b.cpu_utilization.total_cmp(&a.cpu_utilization),
            Sort::Mem => memory_used(b).cmp(&memory_used(a)),
            Sort::Name => std::cmp::Ordering::Equal,
        };
        order.then_with(|| a.name.cmp(&b.name))
    });
}

fn table(snapshot: &MetricsSnapshot) -> Table {
    let mut table =
        Table::new(&["NAME", "STATUS", "CPU", "MEMORY", "LIMIT", "DISK R / W", "NET RX / TX", "ROOT", "UPTIME"]);
    for sandbox in &snapshot.sandboxes {
        let (sample, show) = (&sandbox.sample, quantity::show_bytes);
        table.row(vec![
            sandbox.name.to_string(),
            sandbox.status.as_str().into(),
            format!("{:.1}%", sandbox.cpu_utilization * 100.0),
            show(memory_used(sandbox)),
            show(sample.memory_limit_bytes),
            format!("{} / {}", show(sample.disk_read_bytes), show(sample.disk_written_bytes)),
            format!("{} / {}", show(sample.network_received_bytes), show(sample.network_sent_bytes)),
            sandbox.guest.map_or_else(|| "-".into(), |guest| show(guest.root_used_bytes)),
            time::duration(sample.uptime_ms),
        ]);
    }
    table
}

/// Which samples were printed already.
#[derive(Default)]
struct Seen(std::collections::BTreeMap<SandboxName, (u64, bool)>);

impl Seen {
    fn is_new(&mut self, sandbox: &SandboxMetrics) -> bool {
        let now = (sandbox.sample.at_ns, sandbox.last);
        self.0.insert(sandbox.name.clone(), now) != Some(now)
    }
}

fn follow(snapshot: &MetricsSnapshot, context: &Context) -> Result<(), Failure> {
    for sandbox in &snapshot.sandboxes {
        if context.printer.is_json() {
            context.printer.json_line(&row(sandbox))?;
            continue;
        }
        let (sample, show) = (&sandbox.sample, quantity::show_bytes);
        context.printer.text(&format!(
            "{} {} {} cpu {:.1}%, memory {} of {}, disk {} / {}, net {} / {}",
            time::precise(sampled_at(sandbox), &context.zone()),
            sandbox.name,
            sandbox.status.as_str(),
            sandbox.cpu_utilization * 100.0,
            show(memory_used(sandbox)),
            show(sample.memory_limit_bytes),
            show(sample.disk_read_bytes),
            show(sample.disk_written_bytes),
            show(sample.network_received_bytes),
            show(sample.network_sent_bytes),
        ))?;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use msb_protocol::control::GuestMetrics;
    use msb_protocol::id::{BootId, SandboxId};
    use msb_protocol::state::SandboxState;
    use msb_protocol::vmm::Sample;

    use super::*;

    /// A sandbox that is this busy, with so much memory in use, `second` seconds after its boot.
    pub(crate) fn sandbox(name: &str, cpu: f64, memory_mib: u64, second: u64) -> SandboxMetrics {
        let id = name.bytes().fold(0u128, |id, byte| id << 8 | u128::from(byte));
        SandboxMetrics {
            name: SandboxName::parse(name).unwrap(),
            id: SandboxId(uuid::Uuid::from_u128(id)),
            boot_id: BootId(uuid::Uuid::from_u128(1)),
            vmm_pid: 7,
            status: SandboxState::Running,
            labels: BTreeMap::from([("team".to_owned(), if cpu > 0.5 { "ml" } else { "web" }.to_owned())]),
            restarts: 0,
            created_at: Timestamp::UNIX_EPOCH,
            started_at: Timestamp::UNIX_EPOCH,
            last: false,
            sample: Sample {
                at_ns: second * 1_000_000_000,
                uptime_ms: second * 1_000,
                cpu_time_us: (cpu * 1e6) as u64 * second,
                memory_limit_bytes: 512 << 20,
                memory_resident_bytes: memory_mib << 20,
                disk_read_bytes: 1 << 20,
                disk_written_bytes: second * (3 << 20),
                network_received_bytes: second * 2_048,
                network_sent_bytes: second * 512,
                ..Sample::default()
            },
            cpu_utilization: cpu,
            guest: Some(GuestMetrics {
                memory_used_bytes: memory_mib << 20,
                memory_total_bytes: 500 << 20,
                root_used_bytes: 12 << 20,
                root_free_bytes: 7 << 30,
                processes: 3,
            }),
            boot_phases: Vec::new(),
        }
    }

    #[test]
    fn rows_are_in_the_order_that_was_asked_for() {
        let mut rows = vec![sandbox("b", 0.1, 30, 1), sandbox("a", 0.1, 20, 1), sandbox("c", 0.9, 10, 1)];
        let mut names = |by| {
            sort(&mut rows, by);
            rows.iter().map(|row| row.name.to_string()).collect::<String>()
        };
        assert_eq!([names(Sort::Cpu), names(Sort::Mem), names(Sort::Name)], ["cab", "bac", "abc"]);
    }

    #[test]
    fn a_sample_is_followed_once_and_its_end_once_more() {
        let (mut seen, mut one) = (Seen::default(), sandbox("a", 0.1, 1, 1));
        assert!(seen.is_new(&one) && !seen.is_new(&one));
        one.last = true;
        assert!(seen.is_new(&one) && !seen.is_new(&one));
    }

    #[test]
    fn programs_find_the_keys_they_know() {
        let json = serde_json::to_value(row(&sandbox("a", 0.123_456, 1, 2))).unwrap();
        for key in [
            "name",
            "timestamp",
            "cpu_percent",
            "memory_bytes",
            "memory_limit_bytes",
            "disk_read_bytes",
            "disk_write_bytes",
            "net_rx_bytes",
            "net_tx_bytes",
            "uptime_secs",
        ] {
            assert!(json.get(key).is_some(), "{key}");
        }
        assert_eq!(
            (json["cpu_percent"].as_f64(), json["timestamp"].as_str()),
            (Some(12.35), Some("1970-01-01T00:00:02Z"))
        );
    }
}
