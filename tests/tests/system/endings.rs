//! Ends that nobody typed: idleness, the maximum duration, the creator's death. Each takes the road with the flush.

use msb_tests::Home;
use rustix::process::Signal;

/// Counts in a file and in the log until it is told to end; a second run leaves the file alone.
const COUNTS: &str = "[ -e /root/count ] && exec sleep 600; trap 'exit 0' TERM; i=0; \
    while :; do i=$((i+1)); echo $i > /root/count; echo $i; sleep 0.1; done";

#[test]
fn what_was_written_just_before_an_end_that_nobody_typed_is_there_afterwards() {
    let home = Home::with_busybox("endings");
    let counting = |options: &[&'static str]| {
        let words = [&["run"][..], options, &["busybox", "--", "sh", "-c", COUNTS]].concat();
        home.msb(words)
    };
    let mut creator = counting(&["--name", "creator"]).start();
    let _ = counting(&["-d", "--name", "duration", "--max-duration", "5s"]).run().succeeds();
    let _ = counting(&["-d", "--name", "idle", "--idle-timeout", "4s"]).run().succeeds();
    creator.wait_for("\n3\n");
    creator.signal(Signal::KILL);
    drop(creator.finish());
    for (name, status, cause) in
        [("creator", "stopped", "creator_gone"), ("duration", "stopped", "max_duration"), ("idle", "asleep", "idle")]
    {
        home.wait_until(name, status);
        let end = home.inspect(name)["last_end"].clone();
        assert_eq!(end["cause"], cause, "{end}");
        let log = home.succeeds(&["logs", name]);
        let logged: u32 = log.lines().last().and_then(|line| line.parse().ok()).unwrap_or_else(|| panic!("{log}"));
        // The one that sleeps wakes by being asked.
        if status == "stopped" {
            home.succeeds(&["start", name]);
        }
        let text = home.succeeds(&["exec", name, "--", "cat", "/root/count"]);
        let written: u32 = text.trim().parse().unwrap_or_else(|_| panic!("{name} has {text:?} after {logged}"));
        assert!(written >= logged, "{name}: {written} is on the disk, {logged} was said");
        home.succeeds(&["rm", "-f", name]);
    }
    home.finish();
}
