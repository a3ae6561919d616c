//! The writable disk after `kill -9` of its VM process under load: the file system recovers, and every byte that the guest was told is
//! synced is there. `MSB_TEST_KILLS` says how often; the soak does it fifty times.

use std::time::Duration;

use msb_tests::Home;
use rustix::process::Signal;

/// Each run appends numbers to a file of its own and says each once it is synced, while something else keeps the disk busy.
const WORKLOAD: &str = "mkdir -p /data; r=$(ls /data | wc -l); f=/data/log.$r
while :; do dd if=/dev/urandom of=/busy bs=64k count=64 2>/dev/null; rm /busy; done &
i=0; while :; do i=$((i+1)); echo $i >> $f; sync $f || exit 3; echo $r $i; done";

#[test]
fn what_was_synced_is_there_after_each_kill() {
    let kills = std::env::var("MSB_TEST_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(2_usize);
    let home = Home::with_busybox("durability");
    home.succeeds(&["run", "-d", "--restart", "no", "--name", "box", "busybox", "--", "sh", "-c", WORKLOAD]);
    for round in 0..kills {
        let mut follow = home.msb(["logs", "-f", "--tail", "0", "box"]).start();
        follow.wait_for(&format!("{round} "));
        // Another moment of its life each time.
        std::thread::sleep(Duration::from_millis(100 + (round as u64 * 373) % 1_500));
        for machine in home.running("msb-vmm") {
            machine.signal(Signal::KILL);
        }
        home.wait_until("box", "crashed");
        let _ = follow.finish();
        let logs = home.succeeds(&["logs", "--source", "stdout", "box"]);
        let synced = logs.lines().filter_map(|line| line.strip_prefix(&format!("{round} "))?.parse::<u64>().ok()).max();
        let synced = synced.expect("something was synced");
        home.succeeds(&["start", "box"]);
        // Each of them, in order; what came after the last sync may be there or not.
        let check = format!("head -n {synced} /data/log.{round} | awk 'NR != $1 {{ exit 1 }} END {{ print NR }}'");
        home.msb(["exec", "box", "--", "sh", "-c", &check]).run().succeeds().prints(&format!("{synced}\n"));
    }
    let mounts = home.succeeds(&["exec", "box", "--", "grep", " / ", "/proc/mounts"]);
    assert!(mounts.contains(" rw,"), "{mounts}");
    home.succeeds(&["rm", "-f", "box"]);
    home.finish();
}
