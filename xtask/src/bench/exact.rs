//! `cargo xtask bench --exact`: the figures of engine kvm in the lab that counts instructions, beside what the peers took in that same lab.
//!
//! A script inside measures whole commands with the shell's own clock and prints lines `FIGURE <key> <microseconds>`; this module reads
//! them and prints the table. Because the lab's clock counts instructions, waiting is free and exits look cheap: so VM exits, page
//! faults and system calls are counted beside the times.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use crate::lab::{self, Machine, System};
use crate::{binaries, debian};

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
    figure("stop", "msb stop box", "ms", "microsandbox 153", 50.0, 25.0),
    figure("load", "msb image load of the 2 MB archive", "ms", "microsandbox 2371", 250.0, 80.0),
    figure("block_read", "guest reads 64 MiB from a file on its root disk", "ms", "Firecracker 120", 110.0, 100.0),
    figure("block_write", "guest writes 64 MiB to its root disk, with fsync", "ms", "–", 150.0, 120.0),
    figure(
        "exec_out",
        "64 MiB from the guest through `msb exec` (raw vsock there)",
        "ms",
        "Firecracker 100",
        80.0,
        70.0,
    ),
    figure("exec_in", "64 MiB into the guest through `msb exec -i`", "ms", "–", 100.0, 80.0),
    figure("sample", "sampling one VM each second: instructions a second, in thousands", "k", "–", 20.0, 10.0),
    figure("restore", "msb create --snapshot (with memory), msb exec -- true", "ms", "0.15 of run", 41.0, 27.0),
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

/// What is counted beside the times.
const COUNTS: &[(&str, &str)] = &[
    ("run_exits", "VM exits of one `msb run busybox -- true`"),
    ("exec_exits", "VM exits of one `msb exec box -- true`"),
    ("exec_calls", "system calls of the client of one `msb exec`"),
    ("ls_calls", "system calls of one `msb ls`"),
    ("exec_out_exits", "VM exits of 64 MiB through `msb exec`"),
    ("idle_exits", "VM exits of an idle sandbox in one second"),
];

/// Measures and prints; fails only when something cannot be measured at all.
pub(super) fn run(build: binaries::Arguments) -> Result<()> {
    debian::ensure(lab::PACKAGES)?;
    let machine = Machine { exact: true, cpus: 1, memory_mib: 4096, timeout_s: 1800, system: System::Bare };
    let mut figures: BTreeMap<String, f64> = BTreeMap::new();
    let mut phases: Vec<(String, f64)> = Vec::new();
    let code = lab::measure(&machine, build, SCRIPT, &mut |line| {
        // As they come: a machine that ends early has still said something.
        println!("{line}");
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["FIGURE", key, value] => {
                if let Ok(value) = value.parse::<f64>() {
                    figures.insert((*key).to_owned(), value);
                }
            }
            ["PHASE", name, value] => {
                if let Ok(value) = value.parse::<f64>() {
                    phases.push(((*name).to_owned(), value / 1000.0));
                }
            }
            _ => {}
        }
    })?;
    println!(
        "\n{:<58} {:>10}  {:<18} {:>8} {:>8}",
        "engine kvm, lab that counts instructions", "measured", "peer", "reach", "better"
    );
    for figure in FIGURES {
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
    println!();
    for (key, what) in COUNTS {
        let shown = figures.get(*key).map_or_else(|| "not counted here".to_owned(), |value| format!("{value:.0}"));
        println!("{what:<58} {shown:>10}");
    }
    println!("\nwhere a boot's time goes (msb inspect)");
    for (name, value) in &phases {
        println!("  {name:<24} {value:>8.1} ms");
    }
    if code != 0 {
        bail!("the measuring script ended with status {code}");
    }
    Ok(())
}

/// Runs inside. Times are microseconds of the lab's clock, the median of the rounds.
const SCRIPT: &str = r#"set -u
export MSB_HOME=/root/home XDG_RUNTIME_DIR=/run/msb PATH=/payload/msb/bin:$PATH
mkdir -p -m 700 $XDG_RUNTIME_DIR $MSB_HOME; mount -t debugfs debug /sys/kernel/debug
median() { sort -n | awk '{v[NR]=$1} END {print v[int((NR+1)/2)]}'; }
timed() { local rounds=$1 i; shift
  for ((i = 0; i < rounds; i++)); do
    local a=$EPOCHREALTIME; "$@" >/tmp/out 2>/tmp/err || { echo "failed: $*" >&2; cat /tmp/err >&2; }; local b=$EPOCHREALTIME
    echo $(( ${b/./} - ${a/./} ))
  done | median; }
exits() { cat /sys/kernel/debug/kvm/exits 2>/dev/null || echo 0; }
calls() { strace -f -c -o /tmp/calls "$@" >/dev/null 2>&1; awk '$NF == "total" {print $(NF-1) ~ /^[0-9]+$/ && NF > 5 ? $(NF-2) : $(NF-1)}' /tmp/calls; }

# Whatever comes from the machine's disk for the first time takes as long as that disk does, which is not what is measured.
cat /payload/msb/bin/* /payload/msb/share/msb/* /payload/images/* /payload/vmlinux > /dev/null
for turn in 1 2 3; do a=$EPOCHREALTIME; /payload/bare /payload/vmlinux /payload/initramfs.cpio >/tmp/out 2>&1; b=$EPOCHREALTIME; echo $(( ${b/./} - ${a/./} )); done | median | sed 's/^/FIGURE bare /'
msb ls >/dev/null || { cat $MSB_HOME/*.log; exit 1; }
echo FIGURE load $(timed 1 msb image load -q -i /payload/images/busybox.tar)
timed 1 msb run --engine kvm -m 128M busybox -- true >/dev/null
before=$(exits)
echo FIGURE run $(timed 3 msb run --engine kvm -m 128M busybox -- true)
after=$(exits); echo FIGURE run_exits $(( (after - before) / 3 ))
msb create --engine kvm -m 128M --name box busybox >/dev/null
timed 2 msb exec box -- true >/dev/null
before=$(exits)
echo FIGURE exec $(timed 5 msb exec box -- true)
after=$(exits); echo FIGURE exec_exits $(( (after - before) / 5 ))
echo FIGURE ls $(timed 5 msb ls)
echo FIGURE exec_calls $(calls msb exec box -- true); echo FIGURE ls_calls $(calls msb ls)
before=$(exits); sleep 5; after=$(exits); echo FIGURE idle_exits $(( (after - before) / 5 ))
pid=$(pidof msb-vmm)
# The lab's clock is one nanosecond for each instruction; samples are taken and sent by the thread of the control socket.
control=$(for thread in /proc/$pid/task/*; do [ "$(cat $thread/comm)" = control ] && echo $thread; done)
before=$(cut -d' ' -f1 $control/schedstat); sleep 20; after=$(cut -d' ' -f1 $control/schedstat); echo FIGURE sample $(( (after - before) / 20 ))
awk '/^[0-9a-f]+-[0-9a-f]+ /{big=0} /^Size:/{big=($2 >= 120000)} /^Private_/{if (!big) sum += $2} END {print "FIGURE memory " sum * 1000 / 1024}' /proc/$pid/smaps
msb inspect box --format json > /tmp/box.json
# The guest's own clock, which is the lab's: dd's last words.
seconds() { msb exec box -- sh -c "$1" 2>&1 | awk '/copied/ {for (i = 1; i <= NF; i++) if ($i ~ /^seconds/) print int($(i-1) * 1000000)}'; }
echo FIGURE block_write $(seconds 'dd if=/dev/zero of=/root/file bs=1M count=64 conv=fsync')
echo FIGURE block_read $(seconds 'sync; echo 3 > /proc/sys/vm/drop_caches; dd if=/root/file of=/dev/null bs=1M')
msb exec box -- rm /root/file
before=$(exits)
echo FIGURE exec_out $(timed 3 msb exec box -- dd if=/dev/zero bs=64K count=1024)
after=$(exits); echo FIGURE exec_out_exits $(( (after - before) / 3 ))
head -c 64M /dev/zero > /tmp/zeros
into() { msb exec -i box -- sh -c 'cat > /dev/null' < /tmp/zeros; }
echo FIGURE exec_in $(timed 3 into)
awk -F'"' '/"name":/{name=$4} /"duration_us":/{split($0, part, ":"); gsub(/[^0-9]/, "", part[2]); if (name != "setup") sum += part[2]} END {print "FIGURE hello " sum}' < <(tr ',{' '\n\n' < /tmp/box.json)
cat /tmp/box.json | tr ',{' '\n\n' | awk -F'"' '/"name":/{name=$4} /"duration_us":/{split($0, part, ":"); gsub(/[^0-9]/, "", part[2]); print "PHASE " name " " part[2]}'
echo FIGURE stop $(timed 1 msb stop box)
msb rm box >/dev/null
msb create --engine kvm -m 128M --name box busybox >/dev/null
msb exec box -- sh -c 'head -c 20971520 /dev/zero | tr "\\0" x > /dev/shm/file'
msb snapshot create mem --from box --memory >/dev/null
restored() { msb create --engine kvm --snapshot mem --name copy >/dev/null; msb exec copy -- true; }
for turn in 1 2 3; do a=$EPOCHREALTIME; restored; b=$EPOCHREALTIME; msb rm -f copy >/dev/null; echo $(( ${b/./} - ${a/./} )); done | median | sed 's/^/FIGURE restore /'
forked() { msb fork box --name twin >/dev/null; msb exec twin -- true; }
for turn in 1 2; do a=$EPOCHREALTIME; forked; b=$EPOCHREALTIME; msb rm -f twin >/dev/null; echo $(( ${b/./} - ${a/./} )); done | median | sed 's/^/FIGURE fork /'
sed -n 's/.*stood_us=\([0-9]*\).*/\1/p' $MSB_HOME/sandboxes/box/logs/vmm.log | median | sed 's/^/FIGURE stood /'
msb fork box --name twin >/dev/null; sleep 5
awk '/^RssAnon/ {print "FIGURE fork_memory " $2 * 1000 / 1024}' /proc/$(pidof msb-vmm | tr ' ' '\n' | sort -n | tail -1)/status
sed -n 's/.*phases reached=/PHASES /p' $MSB_HOME/sandboxes/twin/logs/vmm.log; msb stop twin >/dev/null; tail -3 $MSB_HOME/sandboxes/twin/logs/vmm.log
msb rm -f twin box >/dev/null
# Asleep with its memory, then needed.
msb create --engine kvm -m 128M --name nap --idle-timeout 1s --on-idle suspend busybox >/dev/null
msb exec nap -- sh -c 'head -c 20971520 /dev/zero | tr "\\0" x > /dev/shm/file'
for turn in 1 2 3; do
  until [ "$(msb ls -a | awk '$1 == "nap"' | grep -c asleep)" = 1 ]; do sleep 1; done
  a=$EPOCHREALTIME; msb exec nap -- true; b=$EPOCHREALTIME; echo $(( ${b/./} - ${a/./} ))
done | median | sed 's/^/FIGURE wake /'
msb rm -f nap >/dev/null; msb snapshot rm mem >/dev/null
# A python with modules: from nothing, and from a snapshot with it in memory.
msb image load -q -i /payload/python/python.tar >/dev/null
imports='import argparse, asyncio, email.message, http.server, json, unittest, urllib.request, xml.dom.minidom'
cold() { msb run --engine kvm -m 512M python -- python3 -c "$imports; print(1)"; }
cold >/dev/null
cold=$(timed 2 cold); echo FIGURE python_cold $cold
msb create --engine kvm -m 512M --name py python -- python3 -c "$imports, os
os.mkfifo('/dev/shm/in'); os.mkfifo('/dev/shm/out')
while True:
    open('/dev/shm/in').read(); open('/dev/shm/out', 'w').write('1\n')" >/dev/null
asked() { msb exec $1 -- sh -c 'until [ -p /dev/shm/out ]; do sleep 0.1; done; echo > /dev/shm/in; cat /dev/shm/out'; }
asked py >/dev/null
msb snapshot create python-warm --from py --memory >/dev/null
first_output() { msb create --engine kvm --snapshot python-warm --name pytwin >/dev/null; asked pytwin >/dev/null; }
fork=$(for turn in 1 2 3; do a=$EPOCHREALTIME; first_output; b=$EPOCHREALTIME; msb rm -f pytwin >/dev/null; echo $(( ${b/./} - ${a/./} )); done | median)
echo FIGURE python_fork $fork; echo FIGURE python_ratio $(( fork * 100000 / cold ))
msb rm -f py >/dev/null
"#;
