# A hundred copies of one machine at once: all of them come up, each has what the source had, no two draw the same random numbers, and what a
# copy costs is told. Run by `cargo xtask soak --only forks` inside the lab, as root; MSB comes from the payload.
set -euo pipefail
export MSB_HOME=/root/home XDG_RUNTIME_DIR=/run/msb PATH=/payload/msb/bin:$PATH
mkdir -p -m 700 $XDG_RUNTIME_DIR $MSB_HOME
count=100
# Standard error is a terminal here, on which a command shows that it goes on.
quietly() { "$@" 2> /root/errors || { cat /root/errors >&2; return 1; }; }
# The lab takes a machine that says nothing for five minutes for one that hangs.
while sleep 60; do echo "after $SECONDS s of this machine: $(pidof msb-vmm | wc -w) machines in it"; done &
trap "kill $!" EXIT
# A hundred guests share one emulated processor here.
export MSB_BOOT_TIMEOUT=15m
msb image load -q -i /payload/images/busybox.tar > /dev/null
quietly msb create --engine kvm -m 128M --name box busybox > /dev/null
msb exec box -- sh -c 'echo kept > /dev/shm/file'
available() { awk '/^MemAvailable/ {print int($2 / 1024)}' /proc/meminfo; }
before=$(available)
began=$SECONDS
[ "$(quietly msb fork box --count $count --name twin | wc -l)" = $count ]
echo "$count forks at once: up after $((SECONDS - began)) s of this machine"
[ "$(msb ls -q | wc -l)" = $((count + 1)) ]
[ "$(pidof msb-vmm | wc -w)" = $((count + 1)) ]
sleep 5
echo "memory of the host that they take: $(((before - $(available)) / count)) MiB each"
awk '/^RssAnon/ {print "of it in the process, not shared: " int($2 / 1024) " MiB"}' /proc/$(pidof msb-vmm | tr ' ' '\n' | sort -n | tail -1)/status
# On this processor an agent may need longer to answer than a client waits for it: asked again then.
ask() { msb exec twin-$1 -- sh -c 'cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id /dev/shm/file; hostname' > /root/one; }
asked=0
for number in $(seq $count); do
  until quietly ask $number; do
    asked=$((asked + 1))
    [ $asked -lt $count ]
  done
  cat /root/one
done > /root/said
echo "asked again $asked times"
[ "$(grep -c '^kept$' /root/said)" = $count ]
[ "$(grep -v '^kept$' /root/said | sort -u | wc -l)" = $((3 * count)) ]
echo "no two have a random number, a boot id or a name in common"
msb exec box -- cat /dev/shm/file > /dev/null
msb rm -f $(seq -f 'twin-%g' $count) box > /dev/null
[ -z "$(pidof msb-vmm)" ]
echo "and nothing of them is left"
