//! `cargo xtask bench --exact`: the figures of engine kvm in the lab that counts instructions, beside what the peers took in that same lab.
//!
//! A script inside measures whole commands with the shell's own clock and prints lines `FIGURE <key> <microseconds>`; this module reads
//! them and prints the table. Because the lab's clock counts instructions, waiting is free and exits look cheap: so VM exits, page
//! faults and system calls of the whole host are counted beside the times.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::by_hand;
use crate::lab::{self, Machine, System};
use crate::{binaries, debian, images};

/// One line of the table.
struct Figure {
    key: &'static str,
    what: &'static str,
    unit: &'static str,
    /// What the peer took in the same lab.
    peer: &'static str,
    reach: f64,
    better: f64,
}

/// Key of what each word of the kernel's line is worth: lines `OPTION <words> <hello> <kernel>`, and a figure of no meaning when all are there.
const OPTIONS: &str = "options";

const fn figure(
    key: &'static str,
    what: &'static str,
    unit: &'static str,
    peer: &'static str,
    reach: f64,
    better: f64,
) -> Figure {
    Figure { key, what, unit, peer, reach, better }
}

/// The promises, each with the peer's figure (microsandbox 0.7.11, Firecracker 1.17) from the same lab.
const FIGURES: &[Figure] = &[
    figure("bare", "bare kernel and shell: process start to reset", "ms", "Firecracker 167", 150.0, 120.0),
    figure("hello", "msb-vmm with our kernel and agent: start to agent hello", "ms", "–", 90.0, 65.0),
    figure("run", "msb run busybox -- true", "ms", "microsandbox 973", 240.0, 160.0),
    figure("exec", "msb exec box -- true", "ms", "microsandbox 53", 12.0, 7.0),
    figure("ls", "msb ls", "ms", "microsandbox 36", 7.0, 4.0),
    figure("stop_first", "msb stop box, the first one of a service", "ms", "microsandbox 153", 50.0, 25.0),
    figure("stop", "msb stop box", "ms", "microsandbox 153", 50.0, 25.0),
    figure("load", "msb image load of the 2 MB archive", "ms", "microsandbox 2371", 250.0, 80.0),
    figure("block_read", "guest reads 64 MiB from a file on its root disk", "ms", "Firecracker 120", 110.0, 100.0),
    figure("block_write", "guest writes 64 MiB in 64 KiB to its root disk, past its cache", "ms", "–", 150.0, 120.0),
    figure("random_read", "guest reads 4,000 blocks of 4 KiB anywhere, past its cache", "ms", "–", 400.0, 300.0),
    figure("random_write", "guest writes 4,000 blocks of 4 KiB anywhere, past its cache", "ms", "–", 400.0, 300.0),
    figure(
        "vsock_out_1",
        "64 MiB from the guest over bare vsock in 64 KiB writes",
        "ms",
        "Firecracker 100",
        80.0,
        70.0,
    ),
    figure("vsock_out_8", "the same over 8 streams at once", "ms", "–", 100.0, 80.0),
    figure("vsock_in_1", "64 MiB into the guest over bare vsock in 64 KiB writes", "ms", "–", 100.0, 80.0),
    figure("vsock_in_8", "the same over 8 streams at once", "ms", "–", 120.0, 100.0),
    figure("exec_out", "64 MiB from the guest through `msb exec`", "ms", "1.2 of bare vsock", 80.0, 70.0),
    figure("exec_in", "64 MiB into the guest through `msb exec -i`", "ms", "–", 100.0, 80.0),
    figure("net_out", "64 MiB from the guest over TCP", "ms", "–", 200.0, 150.0),
    figure("net_out_byte", "instructions of msb-vmm for each byte of it", "", "–", 3.0, 1.5),
    figure("net_in", "64 MiB into the guest over TCP, published port", "ms", "–", 200.0, 150.0),
    figure("net_in_byte", "instructions of msb-vmm for each byte of it", "", "–", 3.0, 1.5),
    figure("sample", "sampling one VM each second: instructions a second, in thousands", "k", "–", 20.0, 10.0),
    figure("restore", "msb create --snapshot (with memory), msb exec -- true", "ms", "0.15 of run", 41.0, 27.0),
    figure("ready", "the same of a template with a ready fork", "ms", "0.15 of run", 41.0, 27.0),
    figure("fork", "msb fork box, msb exec -- true", "ms", "–", 60.0, 41.0),
    figure("stood", "standing still for a snapshot of 128 MiB", "ms", "–", 100.0, 50.0),
    figure("wake", "msb exec of a sandbox that sleeps with its memory", "ms", "0.15 of run", 41.0, 27.0),
    figure(
        "python_cold",
        "msb run of a python that loads its modules: to its first output",
        "ms",
        "–",
        10_000.0,
        1_000.0,
    ),
    figure("python_fork", "the same from a snapshot with that python in memory, 512 MiB", "ms", "–", 100.0, 50.0),
    figure("python_ratio", "that against the cold one", "%", "10", 10.0, 5.0),
    figure("fork_memory", "resident memory of an idle fork that it does not share", "MiB", "–", 8.0, 4.0),
    figure("memory", "private memory of msb-vmm outside the guest", "MiB", "Firecracker < 5", 5.0, 3.0),
];

/// Machines that are started for one table at most.
const TRIES_MAX: usize = 3;

/// What is counted beside the times: two more turns of the row, in which nothing is timed.
struct Count {
    key: String,
    /// Ways out of guests.
    exits: u64,
    /// System calls of everything on the lab's host.
    calls: u64,
    /// Page faults of everything on the lab's host.
    faults: u64,
}

impl Count {
    /// Of a line `COUNT <key> <exits> <calls> <faults>`.
    fn of(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["COUNT", key, exits, calls, faults] = words.as_slice() else { return None };
        let (exits, calls, faults) = (exits.parse().ok()?, calls.parse().ok()?, faults.parse().ok()?);
        Some(Self { key: (*key).to_owned(), exits, calls, faults })
    }
}

/// What the script has said so far.
#[derive(Default)]
struct Told {
    /// By key.
    figures: BTreeMap<String, f64>,
    /// Names and milliseconds.
    phases: Vec<(String, f64)>,
    counts: Vec<Count>,
    /// Words, milliseconds to the hello and in the kernel; the first are no words.
    options: Vec<(String, f64, f64)>,
}

impl Told {
    fn hear(&mut self, line: &str) {
        // As they come: a machine that ends early has still said something.
        println!("{line}");
        // Behind what the progress of a command has left on the console's line.
        let begins = ["FIGURE ", "COUNT ", "PHASE ", "OPTION "].iter().find_map(|word| line.find(word));
        let line = &line[begins.unwrap_or(0)..];
        self.counts.extend(Count::of(line));
        let words: Vec<&str> = line.split_whitespace().collect();
        let milliseconds = |value: &str| value.parse::<f64>().map(|value| value / 1000.0);
        match words.as_slice() {
            ["FIGURE", key, value] => {
                if let Ok(value) = value.parse::<f64>() {
                    self.figures.insert((*key).to_owned(), value);
                }
            }
            ["PHASE", name, value] => {
                if let Ok(value) = milliseconds(value) {
                    self.phases.push(((*name).to_owned(), value));
                }
            }
            ["OPTION", words, hello, kernel] => {
                if let (Ok(hello), Ok(kernel)) = (milliseconds(hello), milliseconds(kernel)) {
                    if *words == "none" {
                        self.options.clear();
                    }
                    self.options.push(((*words).replace('+', " "), hello, kernel));
                }
            }
            _ => {}
        }
    }
}

/// Measures and prints; fails only when something cannot be measured at all.
///
/// `rows` are the keys of those that are wanted, none for all.
pub(super) fn run(build: binaries::Arguments, rows: &[String]) -> Result<()> {
    let known: Vec<&str> = FIGURES.iter().map(|figure| figure.key).chain([OPTIONS]).collect();
    if let Some(unknown) = rows.iter().find(|row| !known.contains(&row.as_str())) {
        bail!("there is no row {unknown}; there are: {}", known.join(", "));
    }
    debian::ensure(lab::PACKAGES)?;
    let machine = Machine { exact: true, cpus: 1, memory_mib: 4096, timeout_s: 1800, system: System::Bare };
    let mut more = vec![(by_hand::load_program()?, "load")];
    if rows.is_empty() || rows.iter().any(|row| row.starts_with("python")) {
        more.push((images::python()?, "python"));
    }
    let mut told = Told::default();
    let mut left: Vec<&str> = rows.iter().map(String::as_str).collect();
    let mut tries = 0;
    let code = loop {
        tries += 1;
        let wanted: String = left.iter().map(|row| format!(",{row}")).collect();
        let script = format!("ROWS={wanted},\n{SCRIPT}");
        match lab::measure(&machine, build, &script, &more, &mut |line| told.hear(line)) {
            Ok(code) => break code,
            // This machine hangs now and then (docs/performance.md): the rows that are left get another.
            Err(error) if error.is::<lab::Hung>() && tries < TRIES_MAX => {
                println!("again, for the rows that are left: {error:#}");
                left = if left.is_empty() { known.clone() } else { left };
                left.retain(|key| !told.figures.contains_key(*key));
                if left.is_empty() {
                    break 0;
                }
            }
            Err(error) => return Err(error),
        }
    };
    let Told { figures, phases, counts, options } = told;
    println!(
        "\n{:<58} {:>10}  {:<18} {:>8} {:>8}",
        "engine kvm, lab that counts instructions", "measured", "peer", "reach", "better"
    );
    for figure in FIGURES.iter().filter(|figure| rows.is_empty() || figures.contains_key(figure.key)) {
        let measured = figures.get(figure.key).map(|value| value / 1000.0);
        let shown = measured.map_or_else(|| "–".to_owned(), |value| format!("{value:.1} {}", figure.unit));
        let verdict = match measured {
            Some(value) if value <= figure.better => "better",
            Some(value) if value <= figure.reach => "reached",
            Some(_) => "MISSED",
            None => "not measured",
        };
        println!(
            "{:<58} {shown:>10}  {:<18} {:>8} {:>8}  {verdict}",
            figure.what, figure.peer, figure.reach, figure.better
        );
    }
    println!("\n{:<58} {:>10} {:>10} {:>10}", "counted, a turn each", "VM exits", "calls", "faults");
    for Count { key, exits, calls, faults } in &counts {
        let what = FIGURES.iter().find(|figure| figure.key == key).map_or(key.as_str(), |figure| figure.what);
        println!("{what:<58} {exits:>10} {calls:>10} {faults:>10}");
    }
    println!("\nwhere a boot's time goes (msb inspect)");
    for (name, value) in &phases {
        println!("  {name:<24} {value:>8.1} ms");
    }
    if let Some((_, hello, kernel)) = options.first().cloned() {
        println!(
            "\nwhat words of the kernel's line change, in ms to the hello and in the kernel ({hello:.1} and {kernel:.1} without)"
        );
        for (words, own, own_kernel) in &options[1..] {
            println!("  {words:<48} {:>+8.1} {:>+8.1}", own - hello, own_kernel - kernel);
        }
    }
    if code != 0 {
        bail!("the measuring script ended with status {code}");
    }
    Ok(())
}

/// Runs inside. Times are microseconds of the lab's clock, the median of the rounds. `ROWS` has the wanted keys between commas, none for all.
const SCRIPT: &str = r#"set -u
export MSB_HOME=/root/home XDG_RUNTIME_DIR=/run/msb PATH=/payload/msb/bin:$PATH
mkdir -p -m 700 $XDG_RUNTIME_DIR $MSB_HOME
tracing=/sys/kernel/tracing; mountpoint -q $tracing || mount -t tracefs tracing $tracing
want() { local key; [ "$ROWS" = , ] && return 0; for key in "$@"; do [[ $ROWS == *,$key,* ]] && return 0; done; return 1; }
median() { sort -n | awk '{v[NR]=$1} END {if (NR) print v[int((NR+1)/2)]}'; }
figure() { [ -n "${2:-}" ] && echo "FIGURE $1 $2"; }
# took COMMAND...: microseconds, nothing if it failed.
took() { local a=$EPOCHREALTIME b; if "$@" >/tmp/out 2>/tmp/err; then b=$EPOCHREALTIME; echo $(( ${b/./} - ${a/./} )); else echo "failed: $*" >&2; cat /tmp/err >&2; fi; }
timed() { local rounds=$1 i; shift; for ((i = 0; i < rounds; i++)); do took "$@"; done | median; }
# traced EVENT COMMAND...: how often something happens on the whole host meanwhile, also in a machine that ends with the command.
traced() { local event=$tracing/events/$1/enable; shift
  echo > $tracing/trace; echo 1 > $event; "$@" >/dev/null 2>&1; echo 0 > $event
  awk '/^(entries|overrun):/ {sum += $2} END {print sum}' $tracing/per_cpu/cpu0/stats; }
faults() { awk '$1 == "pgfault" {print $2}' /proc/vmstat; }
# counted KEY COMMAND...: two turns more for what is counted; counting takes time, so nothing is timed in them.
counted() { local key=$1 exits calls faults; shift
  exits=$(traced kvm/kvm_exit "$@"); faults=$(faults); calls=$(traced raw_syscalls/sys_enter "$@")
  echo COUNT $key $exits $calls $(( $(faults) - faults )); }
# What each program of the host has run meanwhile, in microseconds: before a measurement without words, after it with its key.
shares() { local pid thread name sum
  for pid in /proc/[0-9]*; do
    name=$(cat $pid/comm 2>/dev/null); case $name in msbd | msb-vmm) ;; *) continue ;; esac
    for thread in $pid/task/*; do [ -r $thread/schedstat ] && echo "$name/$(cat $thread/comm) $(cut -d' ' -f1 $thread/schedstat)"; done
  done | awk '{sum[$1] += $2} END {for (name in sum) print name, sum[name]}' | sort > /tmp/shares.new
  [ $# = 1 ] && join /tmp/shares.old /tmp/shares.new | awk -v key=$1 '$3 - $2 > 500000 {printf "SHARE %s %s %d us\n", key, $1, ($3 - $2) / 1000}'
  mv /tmp/shares.new /tmp/shares.old; }
# phases NAME: where the time of its boot went, a name and microseconds a line.
phases() { msb inspect $1 --format json | tr ',{' '\n\n' | awk -F'"' '/"name":/{name=$4} /"duration_us":/{split($0, part, ":"); gsub(/[^0-9]/, "", part[2]); print name, part[2]}'; }
box() { [ -e /tmp/box ] && return; touch /tmp/box
  msb create --engine kvm -m 128M --name box busybox >/dev/null
  timed 2 msb exec box -- true >/dev/null; }
unbox() { [ -e /tmp/box ] || return; rm /tmp/box; msb rm -f box >/dev/null; }

# Whatever comes from the machine's disk for the first time takes as long as that disk does, which is not what is measured.
cat /payload/msb/bin/* /payload/msb/share/msb/* /payload/images/* /payload/vmlinux > /dev/null
want bare && figure bare $(timed 3 /payload/bare /payload/vmlinux /payload/initramfs.cpio)
msb ls >/dev/null || { cat $MSB_HOME/*.log; exit 1; }
load=$(timed 1 msb image load -q -i /payload/images/busybox.tar); figure load $load
msb run --engine kvm -m 128M busybox -- true >/dev/null 2>&1
if want run; then
  figure run $(timed 3 msb run --engine kvm -m 128M busybox -- true)
  counted run msb run --engine kvm -m 128M busybox -- true
fi
if want exec; then
  box; shares
  figure exec $(timed 5 msb exec box -- true)
  shares exec; counted exec msb exec box -- true
fi
if want ls; then
  box; figure ls $(timed 5 msb ls); counted ls msb ls
fi
if want sample; then
  box; counted one_idle_second sleep 1
  # The lab's clock is one nanosecond for each instruction; samples are taken and sent by the thread of the control socket.
  control=$(for thread in /proc/$(pidof msb-vmm)/task/*; do [ "$(cat $thread/comm)" = control ] && echo $thread; done)
  before=$(cut -d' ' -f1 $control/schedstat); sleep 20; after=$(cut -d' ' -f1 $control/schedstat); echo FIGURE sample $(( (after - before) / 20 ))
fi
want memory && { box; awk '/^[0-9a-f]+-[0-9a-f]+ /{big=0} /^Size:/{big=($2 >= 120000)} /^Private_/{if (!big) sum += $2} END {print "FIGURE memory " sum * 1000 / 1024}' /proc/$(pidof msb-vmm)/smaps; }
if want hello; then
  box; phases box | awk '{print "PHASE", $1, $2; if ($1 != "setup") sum += $2} END {print "FIGURE hello " sum}'
fi
if want block_write block_read random_write random_read; then
  box
  # By the guest's own clock, which is the lab's, and the peer's way: through the guest's page cache, which is empty, from the host's.
  msb cp -q /payload/load box:/load
  inside() { echo $(( $(msb exec box -- /load "$@") / 1000 )); }
  empty() { msb exec box -- sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches'; }
  msb exec box -- dd if=/dev/zero of=/root/file bs=1M count=64
  figure block_read $(for turn in 1 2 3; do empty; inside time dd if=/root/file of=/dev/null bs=1M; done | median)
  # Emptying is counted with it: both turns need it.
  read_cold() { empty; msb exec box -- dd if=/root/file of=/dev/null bs=1M; }
  counted block_read read_cold
  # Past the guest's page cache, into the host's: what waits for the lab's disk says nothing.
  figure block_write $(inside disk /root/file 64 write sequential 65536 1024)
  figure random_read $(inside disk /root/file 64 read random 4096 4000)
  figure random_write $(inside disk /root/file 64 write random 4096 4000)
  msb exec box -- rm /root/file
fi
if want vsock_out_1 vsock_in_1 vsock_out_8 vsock_in_8; then
  box; msb cp -q /payload/vsock box:/vsock
  socket=$(find $XDG_RUNTIME_DIR $MSB_HOME -name vsock.sock | head -1)
  # bare DIRECTION STREAMS: microseconds for 64 MiB over so many at once.
  bare() { msb exec box -- /vsock serve $1 5005 $2 64 & /payload/vsock connect $1 $socket 5005 $2 64; wait $!; }
  for way in out in; do for streams in 1 8; do shares
    figure vsock_${way}_$streams $(for turn in 1 2 3; do bare $way $streams; done | median); shares vsock_${way}_$streams
  done; done
  counted vsock_out_1 bare out 1
fi
if want net_out net_in; then
  unbox
  msb create --engine kvm -m 128M --name net --net host -p 127.0.0.1:5301:5300 busybox >/dev/null
  msb cp -q /payload/load net:/load
  # Of everything in msb-vmm but the guest's own processor: the lab's nanosecond is an instruction.
  served() { for thread in /proc/$(pidof msb-vmm | cut -d' ' -f1)/task/*; do case $(cat $thread/comm) in vcpu*) ;; *) cut -d' ' -f1 $thread/schedstat ;; esac; done | awk '{sum += $1} END {print sum}'; }
  net_out() { /payload/load take 127.0.0.1:5302 64 >/dev/null & msb exec net -- /load give 172.16.0.1:5302 64; wait $!; }
  net_in() { msb exec net -- /load take 0.0.0.0:5300 64 >/dev/null & sleep 1; /payload/load give 127.0.0.1:5301 64; wait $!; }
  for way in out in; do shares; rm -f /tmp/bytes
    figure net_$way $(for turn in 1 2 3; do
      before=$(served); took=$(net_$way); after=$(served)
      echo $(( (after - before) / 67109 )) >> /tmp/bytes; echo $(( took / 1000 ))
    done | median)
    figure net_${way}_byte $(median < /tmp/bytes); shares net_$way
    counted net_$way net_$way
  done
  msb rm -f net >/dev/null
fi
if want exec_out; then
  box; shares
  # Taken and thrown away, as the bytes over bare vsock are.
  out() { msb exec box -- dd if=/dev/zero bs=64K count=1024 2>/dev/null >/dev/null; }
  figure exec_out $(timed 3 out); shares exec_out; counted exec_out out
fi
if want exec_in; then
  box; head -c 64M /dev/zero > /tmp/zeros
  into() { msb exec -i box -- sh -c 'cat > /dev/null' < /tmp/zeros; }
  shares; figure exec_in $(timed 3 into); shares exec_in; counted exec_in into
fi
if want stop; then
  box; figure stop_first $(took msb stop box)
  msb start box >/dev/null; msb exec box -- true; figure stop $(took msb stop box)
fi
unbox
if want restore fork stood fork_memory; then
  msb create --engine kvm -m 128M --name box busybox >/dev/null
  msb exec box -- sh -c 'head -c 20971520 /dev/zero | tr "\\0" x > /dev/shm/file'
  msb snapshot create mem --from box --memory >/dev/null
  restored() { msb create --engine kvm --snapshot mem --name copy >/dev/null && msb exec copy -- true; }
  figure restore $(for turn in 1 2 3; do took restored; msb rm -f copy >/dev/null; done | median)
  forked() { msb fork box --name twin >/dev/null && msb exec twin -- true; }
  figure fork $(for turn in 1 2; do took forked; msb rm -f twin >/dev/null; done | median)
  figure stood $(sed -n 's/.*stood_us=\([0-9]*\).*/\1/p' $MSB_HOME/sandboxes/box/logs/vmm.log | median)
  msb fork box --name twin >/dev/null; sleep 5
  awk '/^RssAnon/ {print "FIGURE fork_memory " $2 * 1000 / 1024}' /proc/$(pidof msb-vmm | tr ' ' '\n' | sort -n | tail -1)/status
  sed -n 's/.*phases reached=/PHASES /p' $MSB_HOME/sandboxes/twin/logs/vmm.log
  msb rm -f twin box >/dev/null; msb snapshot rm mem >/dev/null
fi
if want ready; then
  msb template create warm --from busybox --engine kvm -m 128M --pool 2 >/dev/null
  stands() { until msb template ls | grep -q ' 2/2 '; do sleep 0.2; done; sleep 1; }
  prompt() { msb create --engine kvm --name copy warm >/dev/null && msb exec copy -- true; }
  figure ready $(for turn in 1 2 3; do stands; took prompt; sed -n 's/.*phases reached=/PHASES /p' $MSB_HOME/sandboxes/copy/logs/vmm.log >&2; msb rm -f copy >/dev/null; done | median)
  msb template rm warm >/dev/null
fi
if want wake; then
  # Asleep with its memory, then needed.
  msb create --engine kvm -m 128M --name nap --idle-timeout 1s --on-idle suspend busybox >/dev/null
  msb exec nap -- sh -c 'head -c 20971520 /dev/zero | tr "\\0" x > /dev/shm/file'
  asleep() { local i; for ((i = 0; i < 60; i++)); do msb ls | grep -q '^nap .*asleep' && return; sleep 1; done; msb ls >&2; msb events --since 5m nap >&2; return 1; }
  figure wake $(for turn in 1 2 3; do asleep && took msb exec nap -- true; done | median)
  msb rm -f nap >/dev/null
fi
if want python_cold python_fork python_ratio; then
  # A python with modules: from nothing, and from a snapshot with it in memory.
  msb image load -q -i /payload/python/python.tar >/dev/null
  imports='import argparse, ast, base64, configparser, csv, datetime, email, inspect, ipaddress, logging, optparse, pathlib, pickle, random, socket, ssl, subprocess, typing, urllib.parse'
  cold() { msb run --engine kvm -m 512M python -- python3 -c "$imports; print(1)"; }
  cold >/dev/null
  cold=$(timed 2 cold); figure python_cold $cold
  msb create --engine kvm -m 512M --name py python -- python3 -c "$imports, os
os.mkfifo('/dev/shm/in'); os.mkfifo('/dev/shm/out')
while True:
    open('/dev/shm/in').read(); open('/dev/shm/out', 'w').write('1\n')" >/dev/null
  asked() { msb exec $1 -- sh -c 'until [ -p /dev/shm/out ]; do sleep 0.1; done; echo > /dev/shm/in; cat /dev/shm/out'; }
  asked py >/dev/null
  msb snapshot create python-warm --from py --memory >/dev/null
  first_output() { msb create --engine kvm --snapshot python-warm --name pytwin >/dev/null && asked pytwin; }
  fork=$(for turn in 1 2 3; do took first_output; msb rm -f pytwin >/dev/null; done | median)
  figure python_fork $fork; figure python_ratio $(( fork * 100000 / cold ))
  msb rm -f py >/dev/null
fi
if want options; then
  # What each word of the kernel's line changes: a service of its own for each, which hands the words to its guests.
  unbox
  for words in none nokaslr mitigations=off nopti rcupdate.rcu_expedited=0 random.trust_cpu=off+random.trust_bootloader=off loglevel=7 init_on_alloc=1 noreplace-smp; do
    msb self stop >/dev/null 2>&1; while pidof msbd >/dev/null; do sleep 0.1; done
    extra=${words//+/ }; [ $words = none ] && extra=
    for turn in 1 2 3; do
      MSB_CMDLINE_EXTRA=$extra msb create --engine kvm -m 128M --name option busybox >/dev/null
      phases option | awk '$1 == "kernel" {kernel = $2} $1 != "setup" {sum += $2} END {print sum, kernel}'
      msb rm -f option >/dev/null
    done | sort -n | awk -v words=$words '{line[NR] = $0} END {print "OPTION", words, line[2]}'
  done
  figure options 0
fi
exit 0
"#;
