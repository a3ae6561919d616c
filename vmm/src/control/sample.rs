//! Counters for `Sample`: the devices' own and what the kernel says about the processes of the machine.
//!
//! Reads /proc of this process and of QEMU; a value that cannot be read is 0, a sample never fails.

use std::os::unix::fs::MetadataExt;

use msb_network::stack::{Counters, Way};
use msb_protocol::vmm::{NetworkCount, Sample};

use crate::launch::machine::Meters;
use crate::run::{Run, realtime_ns};

/// Clock ticks per second of /proc/PID/stat: USER_HZ, which is 100 on every Linux of this architecture.
const TICKS_PER_SECOND: u64 = 100;

/// Takes a sample. `machine_pids` are processes other than this one that belong to the machine.
pub(super) fn take(run: &Run, meters: &Meters, machine_pids: &[u32]) -> Sample {
    let disks = |count: fn(&crate::devices::virtio::block::BlockCounters) -> u64| -> u64 {
        meters.disks.iter().map(|disk| count(disk)).sum()
    };
    let own = [std::process::id()];
    let (network, inbound_open) = meters.network.as_ref().map(|(network, _)| network.counters()).unwrap_or_default();
    let pids = if machine_pids.is_empty() { &own[..] } else { machine_pids };
    Sample {
        at_ns: realtime_ns(),
        uptime_ms: u64::try_from(run.started().elapsed().as_millis()).unwrap_or(u64::MAX),
        cpu_time_us: pids.iter().map(|pid| cpu_time_us(*pid)).sum(),
        memory_limit_bytes: meters.memory_limit_bytes,
        memory_resident_bytes: pids.iter().map(|pid| resident_bytes(*pid)).sum::<u64>().min(meters.memory_limit_bytes),
        disk_read_bytes: disks(|disk| disk.read_bytes.get()),
        disk_written_bytes: disks(|disk| disk.written_bytes.get()),
        disk_read_operations: disks(|disk| disk.read_operations.get()),
        disk_write_operations: disks(|disk| disk.write_operations.get()),
        root_allocated_bytes: meters.upper.metadata().map_or(0, |metadata| metadata.blocks() * 512),
        network_received_bytes: network.bytes_received,
        network_sent_bytes: network.bytes_sent,
        network_received_packets: network.frames_received,
        network_sent_packets: network.frames_sent,
        network_inbound_opened: network
            .opened
            .iter()
            .filter(|((way, _), _)| *way == Way::Inbound)
            .map(|(_, count)| count)
            .sum(),
        network_inbound_open: inbound_open,
        network: if meters.network.is_some() { counts(&network) } else { Vec::new() },
    }
}

/// The network's counters under the names of their metrics.
fn counts(counters: &Counters) -> Vec<NetworkCount> {
    let mut counts = Vec::new();
    counters.each(|metric, attributes, value| {
        let attributes = attributes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        counts.push(NetworkCount { metric: metric.name().into(), attributes, value });
    });
    counts
}

fn read_proc(pid: u32, file: &str) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default()
}

fn cpu_time_us(pid: u32) -> u64 {
    cpu_ticks(&read_proc(pid, "stat")) * (1_000_000 / TICKS_PER_SECOND)
}

/// utime + stime of /proc/PID/stat (proc(5)); the name in parentheses may hold anything.
fn cpu_ticks(stat: &str) -> u64 {
    let Some((_, fields)) = stat.rsplit_once(')') else { return 0 };
    fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
}

fn resident_bytes(pid: u32) -> u64 {
    guest_resident_kib(&read_proc(pid, "status")) * 1024
}

/// Anonymous and shared memory held: guest memory is one of them on each engine. Mapped files are not the guest's.
fn guest_resident_kib(status: &str) -> u64 {
    status
        .lines()
        .filter(|line| line.starts_with("RssAnon:") || line.starts_with("RssShmem:"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_read_whatever_the_name_of_the_process() {
        let stat = "42 (evil) S 1 2) S 1 42 42 0 -1 4194304 100 0 0 0 7 5 0 0 20 0 1 0 100 1 1";
        assert_eq!(cpu_ticks(stat), 12);
        assert_eq!(cpu_ticks(""), 0);
        let status = "Name:\tx\nVmRSS:\t9999 kB\nRssAnon:\t 100 kB\nRssFile:\t 50 kB\nRssShmem:\t 23 kB\n";
        assert_eq!(guest_resident_kib(status), 123);
        assert!(resident_bytes(std::process::id()) > 0);
    }
}
