# Runs inside the lab for `exact.rs`, which puts the wanted keys between commas into ROWS, none for all. Times are microseconds of the lab's
# clock, the median of the rounds. It prints lines FIGURE, COUNT, PHASE and OPTION, and never anything that decides whether a promise holds.
set -u
export MSB_HOME=/root/home XDG_RUNTIME_DIR=/run/msb PATH=/payload/msb/bin:$PATH
mkdir -p -m 700 $XDG_RUNTIME_DIR $MSB_HOME
# In memory, behind a file system of the disk's kind: how long QEMU's own threads take for a block is not this lab's time, and nothing repeats with it.
modprobe loop && truncate -s 1500M /dev/shm/home.img && mkfs.ext4 -q /dev/shm/home.img && mount -o loop /dev/shm/home.img $MSB_HOME && chmod 700 $MSB_HOME || exit 1
tracing=/sys/kernel/tracing; mountpoint -q $tracing || mount -t tracefs tracing $tracing
want() { local key; [ "$ROWS" = , ] && return 0; for key in "$@"; do [[ $ROWS == *,$key,* ]] && return 0; done; return 1; }
median() { sort -n | awk '{v[NR]=$1} END {if (NR) print v[int((NR+1)/2)]}'; }
figure() { [ -n "${2:-}" ] && echo "FIGURE $1 $2"; }
# took COMMAND...: microseconds, nothing if it failed.
took() { local a=$EPOCHREALTIME b; if "$@" >/tmp/out 2>/tmp/err; then b=$EPOCHREALTIME; echo $(( ${b/./} - ${a/./} )); else echo "failed: $*" >&2; cat /tmp/err >&2; fi; }
timed() { local rounds=$1 i; shift; for ((i = 0; i < rounds; i++)); do took "$@"; done | median; }
# answered COMMAND...: microseconds until the command has printed `up`, nothing if it has not; its end is waited for and not counted.
answered() { local a b word=
  [ -p /tmp/said ] || mkfifo /tmp/said
  a=$EPOCHREALTIME; "$@" > /tmp/said 2>/tmp/err &
  { read -r word; b=$EPOCHREALTIME; cat > /dev/null; } < /tmp/said; wait $!
  if [ "$word" = up ]; then echo $(( ${b/./} - ${a/./} )); else echo "failed: $*" >&2; cat /tmp/err >&2; fi; }
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
  figure restore $(for turn in 1 2 3; do answered msb run --engine kvm --snapshot mem -- echo up; done | median)
  forked() { msb fork box --name twin >/dev/null && msb exec twin -- true; }
  figure fork $(for turn in 1 2; do took forked; msb rm -f twin >/dev/null; done | median)
  figure stood $(sed -n 's/.*stood_us=\([0-9]*\).*/\1/p' $MSB_HOME/sandboxes/box/logs/vmm.log | median)
  msb fork box --name twin >/dev/null; sleep 5
  awk '/^RssAnon/ {print "FIGURE fork_memory " $2 * 1000 / 1024}' /proc/$(pidof msb-vmm | tr ' ' '\n' | sort -n | tail -1)/status
  sed -n 's/.*phases reached=/PHASES /p' $MSB_HOME/sandboxes/twin/logs/vmm.log
  msb rm -f twin box >/dev/null; msb snapshot rm mem >/dev/null
fi
if want ready; then
  msb template create warm --from busybox --engine kvm -m 128M --warm 'echo warm' --pool 2 >/dev/null
  stands() { until msb template ls | grep -q ' 2/2 '; do sleep 0.2; done; sleep 1; }
  figure ready $(for turn in 1 2 3; do stands; answered msb run --engine kvm warm -- echo up; done | median)
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
