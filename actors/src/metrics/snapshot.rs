//! From samples and views to what the API answers. Called by `crate::daemon`; it asks the actor, never a VM.

use std::collections::BTreeMap;

use jiff::Timestamp;
use msb_protocol::control::{GuestMetrics, HistoryPoint, MetricsSnapshot, SandboxMetrics};
use msb_protocol::id::{BootId, SandboxName};
use msb_protocol::labels::LabelTerm;
use msb_protocol::state::SandboxState;
use msb_protocol::vmm::Sample;

use super::ring::Entry;
use super::{Departed, Latest, Measured, MetricsHandle, Newest, utilization};
use crate::supervisor::SandboxRef;

/// Which sandboxes are wanted: one of the names, if any is given, and every term.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// Names.
    pub names: Vec<SandboxName>,
    /// Label terms.
    pub terms: Vec<LabelTerm>,
}

impl Choice {
    fn takes(&self, name: &SandboxName, labels: &BTreeMap<String, String>) -> bool {
        (self.names.is_empty() || self.names.contains(name)) && self.terms.iter().all(|term| term.matches(labels))
    }
}

/// The newest sample of each sandbox that is wanted.
///
/// # Errors
/// The actor is gone.
pub async fn take(
    metrics: &MetricsHandle,
    sandboxes: Vec<SandboxRef>,
    choice: &Choice,
    (now_ms, taken_at): (u64, Timestamp),
) -> Result<MetricsSnapshot, actix::MailboxError> {
    let (newest, departed) = metrics.actor().send(Latest { now_ms }).await?;
    let mut newest: BTreeMap<_, _> = newest.into_iter().map(|newest| (newest.measured.id, newest)).collect();
    let mut states: BTreeMap<String, u64> = BTreeMap::new();
    let mut rows = Vec::with_capacity(newest.len());
    for sandbox in sandboxes {
        // Looked at in its place: a copy of a thousand whole specs each second is the larger part of this.
        let view = sandbox.view.borrow();
        let summary = &view.detail.summary;
        *states.entry(summary.status.as_str().to_owned()).or_default() += 1;
        if !choice.takes(&summary.name, &summary.labels) {
            continue;
        }
        let Some(newest) = newest.remove(&sandbox.id) else { continue };
        let live = view.detail.boot_id == Some(newest.measured.boot_id);
        rows.push(SandboxMetrics {
            vmm_pid: view.detail.vmm_pid.filter(|_| live).unwrap_or(0),
            status: summary.status,
            labels: summary.labels.clone(),
            restarts: summary.restarts,
            created_at: summary.created_at,
            last: !live,
            boot_phases: view.detail.boot_phases.clone(),
            ..row(newest)
        });
    }
    rows.extend(departed.into_iter().map(of_departed).filter(|row| choice.takes(&row.name, &row.labels)));
    rows.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
    let identity = metrics.identity();
    Ok(MetricsSnapshot {
        host_id: identity.host_id.clone(),
        host_name: identity.host_name.clone(),
        instance_id: identity.instance_id.clone(),
        taken_at,
        states,
        sandboxes: rows,
    })
}

fn of_departed(Departed { newest, last_words, .. }: Departed) -> SandboxMetrics {
    SandboxMetrics {
        labels: last_words.labels,
        restarts: last_words.restarts,
        created_at: last_words.created_at,
        ..row(newest)
    }
}

/// A row as of a run that ended; who knows better overwrites it.
fn row(newest: Newest) -> SandboxMetrics {
    let Newest { measured, cpu_utilization } = newest;
    SandboxMetrics {
        name: measured.name,
        id: measured.id,
        boot_id: measured.boot_id,
        vmm_pid: 0,
        status: SandboxState::Stopped,
        labels: BTreeMap::new(),
        restarts: 0,
        created_at: Timestamp::UNIX_EPOCH,
        started_at: started_at(&measured.sample),
        last: true,
        sample: measured.sample,
        cpu_utilization,
        guest: measured.guest,
        boot_phases: Vec::new(),
    }
}

/// When the counters began at zero. Must be the same for each sample of a run: backends take another one for a reset.
fn started_at(sample: &Sample) -> Timestamp {
    Timestamp::from_nanosecond(i128::from(sample.started_at_ns)).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// What the history keeps of a sample.
#[must_use]
pub fn entry(measured: &Measured) -> Entry {
    let (sample, guest) = (&measured.sample, measured.guest.unwrap_or_default());
    // One more than there are, so that 0 says that the guest has not spoken yet.
    let processes = measured.guest.map_or(0, |guest| u64::from(guest.processes) + 1);
    [
        measured.at_ms,
        sample.at_ns / 1_000_000,
        sample.cpu_time_us,
        guest.memory_used_bytes,
        sample.memory_resident_bytes,
        sample.memory_limit_bytes,
        sample.disk_read_bytes,
        sample.disk_written_bytes,
        sample.disk_read_operations.wrapping_add(sample.disk_write_operations),
        sample.network_received_bytes,
        sample.network_sent_bytes,
        sample.network_received_packets.wrapping_add(sample.network_sent_packets),
        guest.root_used_bytes,
        guest.root_free_bytes,
        sample.root_allocated_bytes,
        processes,
    ]
}

/// The history as the API tells it: at most `points_max` points, evenly spread, the newest among them.
#[must_use]
pub fn history(entries: &[(BootId, Entry)], points_max: usize) -> Vec<HistoryPoint> {
    let step = entries.len().div_ceil(points_max.max(1)).max(1);
    let mut points = Vec::with_capacity(entries.len().min(points_max));
    let mut before: Option<&(BootId, Entry)> = None;
    // Counted from the end, so that the newest is always there.
    let first = if entries.is_empty() { 0 } else { (entries.len() - 1) % step };
    for now in entries.iter().skip(first).step_by(step) {
        let (boot_id, entry) = now;
        let clock = |entry: &Entry| Sample { at_ns: entry[1] * 1_000_000, cpu_time_us: entry[2], ..Sample::default() };
        let cpu_utilization = before
            .filter(|(run, _)| run == boot_id)
            .map_or(0.0, |(_, before)| utilization(&clock(before), &clock(entry)));
        points.push(HistoryPoint {
            at: Timestamp::from_millisecond(i64::try_from(entry[1]).unwrap_or_default()).unwrap_or_default(),
            boot_id: *boot_id,
            cpu_utilization,
            cpu_time_us: entry[2],
            memory_resident_bytes: entry[4],
            memory_limit_bytes: entry[5],
            disk_read_bytes: entry[6],
            disk_written_bytes: entry[7],
            disk_operations: entry[8],
            network_received_bytes: entry[9],
            network_sent_bytes: entry[10],
            network_packets: entry[11],
            root_allocated_bytes: entry[14],
            guest: entry[15].checked_sub(1).map(|processes| GuestMetrics {
                memory_used_bytes: entry[3],
                memory_total_bytes: 0,
                root_used_bytes: entry[12],
                root_free_bytes: entry[13],
                processes: u32::try_from(processes).unwrap_or(u32::MAX),
            }),
        });
        before = Some(now);
    }
    points
}

#[cfg(test)]
mod tests {
    use msb_protocol::id::SandboxId;

    use super::*;

    #[test]
    fn history_is_thinned_evenly_and_keeps_the_newest() {
        let boot_id = BootId(uuid::Uuid::from_u128(1));
        let entries: Vec<(BootId, Entry)> = (0..100u64)
            .map(|second| {
                let mut entry = [0; super::super::ring::FIELDS];
                (entry[0], entry[1], entry[2]) = (second * 1_000, second * 1_000, second * 250_000);
                (boot_id, entry)
            })
            .collect();
        let all = history(&entries, 1_000);
        assert_eq!(all.len(), 100);
        assert!((all[50].cpu_utilization - 0.25).abs() < 1e-9);
        let thin = history(&entries, 10);
        assert_eq!(thin.len(), 10);
        assert_eq!(thin.last().unwrap().at, Timestamp::from_second(99).unwrap());
        assert!((thin[5].cpu_utilization - 0.25).abs() < 1e-9);
        assert!(history(&[], 10).is_empty());
    }

    #[test]
    fn a_guest_that_has_not_spoken_is_absent_and_one_without_processes_is_not() {
        let guest = |guest| {
            let measured = Measured {
                id: SandboxId(uuid::Uuid::from_u128(1)),
                name: SandboxName::parse("web").unwrap(),
                boot_id: BootId(uuid::Uuid::from_u128(2)),
                at_ms: 1,
                sample: Sample::default(),
                guest,
            };
            history(&[(measured.boot_id, entry(&measured))], 10)[0].guest
        };
        assert_eq!(guest(None), None);
        let said = GuestMetrics { memory_used_bytes: 5, root_free_bytes: 7, ..GuestMetrics::default() };
        assert_eq!(guest(Some(said)), Some(said));
        assert_eq!(guest(Some(GuestMetrics { processes: 3, ..said })).unwrap().processes, 3);
    }
}
