//! Counters for samples: the devices' own and what the kernel says about the machine's threads and memory. Called by the control
//! thread, and once more by `process` when the machine has ended.
//!
//! Reads /proc of this process and of QEMU; a value that cannot be read keeps what it was, a sample never fails. It is taken each
//! second in every VM: nothing is opened for it, and nothing is read that costs the kernel much.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use msb_metrics::{Kind, Metric};
use msb_network::stack::{Counters, Way};
use msb_protocol::vmm::{NetworkCounts, NetworkName, NetworkNames, Sample};
use nix::time::{ClockId, clock_gettime};

use crate::devices::virtio::block::BlockCounters;
use crate::launch::machine::Meters;
use crate::run::{Run, realtime_ns};

/// Clock ticks per second of /proc/PID/stat: USER_HZ, which is 100 on every Linux of this architecture.
const TICKS_PER_SECOND: u64 = 100;
/// Size of a page in /proc/PID/statm, in bytes.
const PAGE_BYTES: u64 = 4096;
/// Threads looked at when the vCPUs are searched for: QEMU has a dozen beside them.
const THREADS_MAX: usize = 1024;
/// Bytes of /proc/PID/status, of which the figures of memory are in the first half.
const MEMORY_LEN_MAX: usize = 4096;
/// What the kernel says of memory and disk is asked for again once the vCPUs have run for so long, in microseconds, ...
const LOOK_AFTER_RUN_US: u64 = 5_000;
/// ... and otherwise with each of so many samples: in between a machine that sleeps touches next to nothing.
const LOOK_EVERY: u32 = 5;
/// How the vCPU threads are called: ours, and QEMU's with debug-threads.
const VCPU_NAMES: [&str; 2] = ["vcpu-", "CPU "];

/// Takes samples of one machine.
pub(super) struct Sampler {
    run: Run,
    meters: Meters,
    started_at_ns: u64,
    /// A process other than this one that is the machine: QEMU.
    machine_pid: Option<u32>,
    vcpus: Vec<VcpuClock>,
    /// What the kernel says of the machine's memory.
    memory: Option<File>,
    resident_bytes: u64,
    root_allocated_bytes: u64,
    looks: Looks,
    network: NetworkKeys,
}

impl Sampler {
    /// For the machine with these counters.
    pub(super) fn new(run: Run, meters: Meters) -> Self {
        let elapsed_ns = u64::try_from(run.started().elapsed().as_nanos()).unwrap_or_default();
        let started_at_ns = realtime_ns().saturating_sub(elapsed_ns);
        Self {
            run,
            meters,
            started_at_ns,
            machine_pid: None,
            vcpus: Vec::new(),
            memory: None,
            resident_bytes: 0,
            root_allocated_bytes: 0,
            looks: Looks::default(),
            network: NetworkKeys::default(),
        }
    }

    /// Tells which other processes belong to the machine.
    pub(super) fn set_machine_pids(&mut self, pids: &[u32]) {
        self.machine_pid = pids.first().copied();
        self.vcpus.clear();
        (self.memory, self.looks) = (None, Looks::default());
    }

    /// As [`Self::take`], whatever was asked a moment ago: the last one of a machine.
    pub(super) fn take_last(&mut self) -> Sample {
        self.looks = Looks::default();
        self.take()
    }

    /// The counters now. What the machine's threads said last stays true after they have ended.
    pub(super) fn take(&mut self) -> Sample {
        if self.vcpus.is_empty() {
            self.vcpus = find_vcpus(self.machine_pid);
        }
        self.vcpus.iter_mut().for_each(VcpuClock::read);
        let cpu_time_us = self.vcpus.iter().map(|vcpu| vcpu.ran_us).sum();
        if self.looks.is_due(cpu_time_us) {
            self.look();
        }
        let meters = &self.meters;
        let (network, inbound_open) =
            meters.network.as_ref().map(|(network, _)| network.counters()).unwrap_or_default();
        let disks = |count: fn(&BlockCounters) -> u64| -> u64 { meters.disks.iter().map(|disk| count(disk)).sum() };
        Sample {
            at_ns: realtime_ns(),
            started_at_ns: self.started_at_ns,
            uptime_ms: u64::try_from(self.run.started().elapsed().as_millis()).unwrap_or(u64::MAX),
            cpu_time_us,
            memory_limit_bytes: meters.memory_limit_bytes,
            memory_resident_bytes: self.resident_bytes,
            disk_read_bytes: disks(|disk| disk.read_bytes.get()),
            disk_written_bytes: disks(|disk| disk.written_bytes.get()),
            disk_read_operations: disks(|disk| disk.read_operations.get()),
            disk_write_operations: disks(|disk| disk.write_operations.get()),
            root_allocated_bytes: self.root_allocated_bytes,
            network_received_bytes: network.bytes_received,
            network_sent_bytes: network.bytes_sent,
            network_received_packets: network.frames_received,
            network_sent_packets: network.frames_sent,
            network_inbound_opened: inbound_opened(&network),
            network_inbound_open: inbound_open,
            network: if meters.network.is_some() { self.network.counts(&network) } else { NetworkCounts::default() },
        }
    }

    /// Asks the kernel what memory and disk the machine holds.
    fn look(&mut self) {
        if self.memory.is_none() {
            self.memory = memory_figures(self.machine_pid);
        }
        if let Some(bytes) = self.memory.as_ref().and_then(|figures| resident_bytes(figures, self.machine_pid)) {
            self.resident_bytes = bytes.min(self.meters.memory_limit_bytes);
        }
        if let Ok(metadata) = self.meters.upper.metadata() {
            self.root_allocated_bytes = metadata.blocks() * 512;
        }
    }
}

/// When the kernel is asked what memory and disk the machine holds: if that may have changed.
#[derive(Default)]
struct Looks {
    /// Processor time at the last one, in microseconds, and samples since.
    last: Option<(u64, u32)>,
}

impl Looks {
    fn is_due(&mut self, cpu_time_us: u64) -> bool {
        if let Some((at_us, samples)) = &mut self.last {
            *samples += 1;
            // Without a clock of the vCPUs nothing is known of what they did.
            if cpu_time_us > 0 && cpu_time_us < *at_us + LOOK_AFTER_RUN_US && *samples < LOOK_EVERY {
                return false;
            }
        }
        self.last = Some((cpu_time_us, 0));
        true
    }
}

fn inbound_opened(counters: &Counters) -> u64 {
    counters.opened.iter().filter(|((way, _), _)| *way == Way::Inbound).map(|(_, count)| count).sum()
}

/// Which of the network's counters there are. Their names are made anew only when that changes.
#[derive(Default)]
struct NetworkKeys {
    keys: Vec<(Metric, Vec<(&'static str, &'static str)>)>,
    names: Arc<NetworkNames>,
}

impl NetworkKeys {
    /// The network's other counters under the names of their metrics. Sums that are still zero are left out.
    fn counts(&mut self, counters: &Counters) -> NetworkCounts {
        let (mut values, mut is_known) = (Vec::with_capacity(self.keys.len()), true);
        counters.each(|metric, attributes, value| {
            // These have fields of their own.
            if matches!(metric, Metric::NetworkIo | Metric::NetworkPackets)
                || (value == 0 && metric.definition().kind == Kind::Counter)
            {
                return;
            }
            let place = values.len();
            values.push(value);
            if self.keys.get(place).is_none_or(|known| known.0 != metric || known.1 != attributes) {
                // There is a new one before those that were known from here on.
                self.keys.truncate(place);
                self.keys.push((metric, attributes.to_vec()));
                is_known = false;
            }
        });
        if !is_known || self.keys.len() > values.len() {
            self.keys.truncate(values.len());
            let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            let name = |(metric, attributes): &(Metric, Vec<_>)| NetworkName {
                metric: metric.name().into(),
                attributes: attributes.iter().map(owned).collect(),
            };
            self.names = Arc::new(NetworkNames::new(self.keys.iter().map(name)));
        }
        NetworkCounts::new(Arc::clone(&self.names), &values).unwrap_or_default()
    }
}

/// The processor time of one vCPU thread.
struct VcpuClock {
    source: ClockSource,
    ran_us: u64,
}

enum ClockSource {
    /// A thread of this process has a clock, which is read without a file.
    Thread(ClockId),
    /// Nanoseconds (schedstat) or clock ticks (stat, on kernels without the other).
    File(File, fn(&str) -> Option<u64>),
}

impl VcpuClock {
    fn open(task: &Path, is_own: bool) -> Option<Self> {
        let own = || {
            let thread: i32 = task.file_name()?.to_str()?.parse().ok()?;
            Some(thread_clock(thread)).filter(|clock| clock_gettime(*clock).is_ok())
        };
        let source = match is_own.then(own).flatten() {
            Some(clock) => ClockSource::Thread(clock),
            None => match File::open(task.join("schedstat")) {
                Ok(figures) => ClockSource::File(figures, schedstat_us),
                Err(_) => ClockSource::File(File::open(task.join("stat")).ok()?, stat_us),
            },
        };
        Some(Self { source, ran_us: 0 })
    }

    fn read(&mut self) {
        let ran_us = match &self.source {
            ClockSource::Thread(clock) => clock_gettime(*clock).ok().map(|ran| {
                let of = |number: i64| u64::try_from(number).unwrap_or_default();
                of(ran.tv_sec()) * 1_000_000 + of(ran.tv_nsec()) / 1_000
            }),
            ClockSource::File(figures, parse) => {
                let mut text = [0u8; 512];
                let text = figures.read_at(&mut text, 0).ok().map(|length| &text[..length]);
                text.and_then(|text| std::str::from_utf8(text).ok()).and_then(parse)
            }
        };
        self.ran_us = self.ran_us.max(ran_us.unwrap_or_default());
    }
}

/// The clock of the time that a thread of this process was on a processor, as pthread_getcpuclockid(3) makes it: the
/// complement of its number, then CPUCLOCK_PERTHREAD_MASK and CPUCLOCK_SCHED (the kernel's
/// include/linux/posix-timers_types.h). Once the thread has ended, reading it fails.
fn thread_clock(thread: i32) -> ClockId {
    ClockId::from_raw(!thread << 3 | 4 | 2)
}

fn process_directory(pid: Option<u32>) -> PathBuf {
    pid.map_or_else(|| PathBuf::from("/proc/self"), |pid| PathBuf::from(format!("/proc/{pid}")))
}

fn find_vcpus(pid: Option<u32>) -> Vec<VcpuClock> {
    let Ok(tasks) = std::fs::read_dir(process_directory(pid).join("task")) else { return Vec::new() };
    tasks
        .flatten()
        .take(THREADS_MAX)
        .filter(|task| {
            let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            VCPU_NAMES.iter().any(|prefix| name.starts_with(prefix))
        })
        .filter_map(|task| VcpuClock::open(&task.path(), pid.is_none()))
        .collect()
}

/// Time on a processor, the first figure of /proc/PID/task/TID/schedstat, in nanoseconds there.
fn schedstat_us(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse::<u64>().ok().map(|ns| ns / 1_000)
}

/// utime + stime of a stat file (proc(5)); the name in parentheses may hold anything.
fn stat_us(text: &str) -> Option<u64> {
    let (_, fields) = text.rsplit_once(')')?;
    let ticks: u64 = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Some(ticks * (1_000_000 / TICKS_PER_SECOND))
}

/// Guest memory that the host holds. In this process it is anonymous memory, which statm tells cheaply; in QEMU it is a memfd, which
/// only status tells apart from mapped files.
fn memory_figures(pid: Option<u32>) -> Option<File> {
    let name = if pid.is_some() { "status" } else { "statm" };
    File::open(process_directory(pid).join(name)).ok()
}

fn resident_bytes(figures: &File, pid: Option<u32>) -> Option<u64> {
    let mut text = [0u8; MEMORY_LEN_MAX];
    let length = figures.read_at(&mut text, 0).ok()?;
    let text = std::str::from_utf8(&text[..length]).ok()?;
    match pid {
        None => anonymous_bytes(text),
        Some(_) => Some(guest_resident_kib(text)? * 1024),
    }
}

/// resident - shared of /proc/PID/statm.
fn anonymous_bytes(statm: &str) -> Option<u64> {
    let mut pages = statm.split_whitespace().skip(1).map(str::parse::<u64>);
    let (resident, shared) = (pages.next()?.ok()?, pages.next()?.ok()?);
    Some(resident.saturating_sub(shared) * PAGE_BYTES)
}

/// Anonymous and shared memory held. Mapped files are not the guest's.
fn guest_resident_kib(status: &str) -> Option<u64> {
    let figures: Vec<u64> = status
        .lines()
        .filter(|line| line.starts_with("RssAnon:") || line.starts_with("RssShmem:"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .collect();
    (!figures.is_empty()).then(|| figures.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_disk_are_looked_at_when_something_ran_and_now_and_then() {
        let mut looks = Looks::default();
        let due = |looks: &mut Looks, times: &[u64]| times.iter().map(|time| looks.is_due(*time)).collect::<Vec<_>>();
        assert_eq!(due(&mut looks, &[100, 1_100, 5_099, 5_100]), [true, false, false, true], "5 ms of work");
        assert_eq!(due(&mut looks, &[5_100; 6]), [false, false, false, false, true, false], "each fifth");
        assert_eq!(due(&mut Looks::default(), &[0, 0, 0]), [true; 3], "no clock");
    }

    #[test]
    fn proc_files_are_read_whatever_the_name_of_the_process() {
        let stat = "42 (evil) S 1 2) S 1 42 42 0 -1 4194304 100 0 0 0 7 5 0 0 20 0 1 0 100 1 1";
        assert_eq!(stat_us(stat), Some(120_000));
        assert_eq!(stat_us(""), None);
        assert_eq!(schedstat_us("1234567 99 3\n"), Some(1_234));
        assert_eq!(schedstat_us("x"), None);
        let status = "Name:\tx\nVmRSS:\t9999 kB\nRssAnon:\t 100 kB\nRssFile:\t 50 kB\nRssShmem:\t 23 kB\n";
        assert_eq!(guest_resident_kib(status), Some(123));
        assert_eq!(guest_resident_kib(""), None);
        assert_eq!(anonymous_bytes("900 300 100 1 0 50 0\n"), Some(200 * 4096));
        for pid in [None, Some(std::process::id())] {
            assert!(resident_bytes(&memory_figures(pid).unwrap(), pid).unwrap() > 0);
        }
    }

    #[test]
    fn names_of_counters_are_made_anew_when_there_are_others_and_kept_when_not() {
        use msb_network::stack::frame::DropReason;
        let mut keys = NetworkKeys::default();
        let mut counters = Counters { connections: 1, ..Counters::default() };
        let first = keys.counts(&counters);
        counters.connections = 2;
        let second = keys.counts(&counters);
        assert!(Arc::ptr_eq(first.names(), second.names()));
        assert_eq!(second.values(), [2, 0]);
        // It comes before the one that was counted first.
        counters.records_suppressed = 7;
        keys.counts(&counters);
        counters.dropped.insert(DropReason::GuestSlow, 5);
        let third = keys.counts(&counters);
        let named: Vec<_> = third.iter().map(|(name, value)| (name.metric.as_str(), value)).collect();
        let (connections, dropped) = (Metric::NetworkConnections.name(), Metric::NetworkDropped.name());
        let expected = [(connections, 2), (connections, 0), (dropped, 5), (Metric::DecisionLogSuppressed.name(), 7)];
        assert_eq!(named, expected);
        let reasons: Vec<_> = third.iter().filter_map(|(name, _)| name.attributes.values().next()).collect();
        assert_eq!(reasons, ["tcp", "udp", DropReason::GuestSlow.as_str()]);
    }

    #[test]
    fn vcpu_threads_are_found_by_name_and_their_time_outlives_them() {
        let (ready, wait) = std::sync::mpsc::channel();
        let (end, ending) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("vcpu-0".into()).spawn(move || {
            let mut sum = 0u64;
            let begin = std::time::Instant::now();
            while begin.elapsed() < std::time::Duration::from_millis(50) {
                sum = sum.wrapping_add(std::hint::black_box(1));
            }
            ready.send(sum).unwrap();
            let _ = ending.recv();
        });
        wait.recv().unwrap();
        // Tests of this program run side by side: only one other thread may be called like a vCPU, and it is idle by then.
        let mut vcpus = find_vcpus(None);
        assert!(!vcpus.is_empty());
        assert!(vcpus.iter().all(|vcpu| matches!(vcpu.source, ClockSource::Thread(_))));
        vcpus.iter_mut().for_each(VcpuClock::read);
        let ran_us: u64 = vcpus.iter().map(|vcpu| vcpu.ran_us).sum();
        // The other way, which is QEMU's, says the same.
        let mut by_file = Path::new("/proc/self/task").read_dir().unwrap().flatten().filter_map(|task| {
            let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
            name.starts_with("vcpu-0").then(|| VcpuClock::open(&task.path(), false))?
        });
        let mut by_file = by_file.next().unwrap();
        by_file.read();
        assert!(ran_us > 0 && by_file.ran_us.abs_diff(ran_us) < 10_000, "{ran_us} {}", by_file.ran_us);
        end.send(()).unwrap();
        thread.unwrap().join().unwrap();
        vcpus.iter_mut().for_each(VcpuClock::read);
        assert!(vcpus.iter().map(|vcpu| vcpu.ran_us).sum::<u64>() >= ran_us);
    }
}
