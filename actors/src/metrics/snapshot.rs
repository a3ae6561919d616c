//! From samples and views to what the API answers. Called by `crate::daemon`; it asks the actor, never a VM.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use msb_protocol::control::{GuestMetrics, HistoryPoint, MetricsSnapshot, SandboxMetrics};
use msb_protocol::fleet::{self, Figures, FleetWriter};
use msb_protocol::id::{BootId, SandboxId, SandboxName};
use msb_protocol::labels::LabelTerm;
use msb_protocol::state::SandboxState;
use msb_protocol::vmm::Sample;

use super::ring::Entry;
use super::{Departed, LastWords, Measured, Newest, utilization};
use crate::host_identity::HostIdentity;
use crate::sandbox::view::{self, View};

/// Bytes for a row of the compact form: most are shorter.
const ROW_LEN: usize = 640;

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

/// The newest sample of each sandbox that is wanted, before it is told in one form or the other.
#[derive(Debug)]
pub struct Fleet {
    /// Everything but the rows.
    head: MetricsSnapshot,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    whose: Whose,
    newest: Newest,
}

/// Whom a row is of.
#[derive(Debug)]
enum Whose {
    /// As its actor shows it.
    Present(Arc<View>),
    /// It was removed.
    Departed(LastWords),
}

impl Fleet {
    /// Puts together what is seen of the sandboxes and what was measured, of those that are wanted.
    #[must_use]
    pub fn new(
        identity: &HostIdentity,
        taken_at: Timestamp,
        views: Vec<Arc<View>>,
        (newest, departed): (Vec<(SandboxId, Newest)>, Vec<Departed>),
        ready_forks: BTreeMap<String, u64>,
        choice: &Choice,
    ) -> Self {
        let mut states: BTreeMap<&'static str, u64> = BTreeMap::new();
        let mut rows = Vec::with_capacity(newest.len());
        for view in views {
            let summary = &view.detail.summary;
            *states.entry(summary.status.as_str()).or_default() += 1;
            if !choice.takes(&summary.name, &summary.labels) {
                continue;
            }
            let Ok(place) = newest.binary_search_by_key(&summary.id, |(id, _)| *id) else { continue };
            rows.push(Row { whose: Whose::Present(view), newest: newest[place].1.clone() });
        }
        let departed =
            departed.into_iter().filter(|one| choice.takes(&one.newest.measured.subject.name, &one.last_words.labels));
        rows.extend(
            departed.map(|Departed { newest, last_words, .. }| Row { whose: Whose::Departed(last_words), newest }),
        );
        let head = MetricsSnapshot {
            host_id: identity.host_id.clone(),
            host_name: identity.host_name.clone(),
            instance_id: identity.instance_id.clone(),
            taken_at,
            states: states.into_iter().map(|(state, count)| (state.to_owned(), count)).collect(),
            ready_forks,
            sandboxes: Vec::new(),
        };
        Self { head, rows }
    }

    /// The form of the API, with rows by name.
    #[must_use]
    pub fn into_snapshot(self) -> MetricsSnapshot {
        let mut sandboxes: Vec<_> = self.rows.into_iter().map(Row::into_metrics).collect();
        sandboxes.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        MetricsSnapshot { sandboxes, ..self.head }
    }

    /// The compact form ([`msb_protocol::fleet`]).
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = FleetWriter::new(&self.head, self.rows.len() * ROW_LEN);
        for row in &self.rows {
            match &row.whose {
                Whose::Present(view) => writer.row(&view.metrics_who, &row.figures()),
                Whose::Departed(last_words) => writer.row(&last_words_of(row, last_words).encode(), &row.figures()),
            }
        }
        writer.finish()
    }
}

fn last_words_of<'a>(row: &'a Row, last_words: &'a LastWords) -> fleet::Who<'a> {
    let subject = &row.newest.measured.subject;
    fleet::Who {
        name: &subject.name,
        id: subject.id,
        status: SandboxState::Stopped,
        labels: &last_words.labels,
        restarts: last_words.restarts,
        created_at: last_words.created_at,
        boot_phases: &[],
    }
}

impl Row {
    fn figures(&self) -> Figures<'_> {
        let Newest { measured, cpu_utilization } = &self.newest;
        let boot_id = measured.subject.boot_id;
        let live = match &self.whose {
            Whose::Present(view) => Some(&view.detail).filter(|detail| detail.boot_id == Some(boot_id)),
            Whose::Departed(_) => None,
        };
        Figures {
            boot_id,
            vmm_pid: live.and_then(|detail| detail.vmm_pid).unwrap_or(0),
            started_at: started_at(&measured.sample),
            last: live.is_none(),
            cpu_utilization: *cpu_utilization,
            guest: measured.guest,
            sample: &measured.sample,
        }
    }

    fn into_metrics(self) -> SandboxMetrics {
        let Figures { boot_id, vmm_pid, started_at, last, cpu_utilization, guest, .. } = self.figures();
        let who = match &self.whose {
            Whose::Present(view) => view::who(&view.detail),
            Whose::Departed(last_words) => last_words_of(&self, last_words),
        };
        SandboxMetrics {
            name: who.name.clone(),
            id: who.id,
            boot_id,
            vmm_pid,
            status: who.status,
            labels: who.labels.clone(),
            restarts: who.restarts,
            created_at: who.created_at,
            started_at,
            last,
            boot_phases: who.boot_phases.to_vec(),
            cpu_utilization,
            guest,
            sample: self.newest.measured.sample.clone(),
        }
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
    use super::*;
    use crate::metrics::meter::Subject;

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
            let (id, boot_id) = (SandboxId(uuid::Uuid::from_u128(1)), BootId(uuid::Uuid::from_u128(2)));
            let measured = Measured {
                subject: Subject::new(id, SandboxName::parse("web").unwrap(), boot_id),
                at_ms: 1,
                sample: Sample::default(),
                guest,
            };
            history(&[(boot_id, entry(&measured))], 10)[0].guest
        };
        assert_eq!(guest(None), None);
        let said = GuestMetrics { memory_used_bytes: 5, root_free_bytes: 7, ..GuestMetrics::default() };
        assert_eq!(guest(Some(said)), Some(said));
        assert_eq!(guest(Some(GuestMetrics { processes: 3, ..said })).unwrap().processes, 3);
    }
}
