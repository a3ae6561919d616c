//! A service of one's own: carl is not in group msb.

use crate::Next;
use crate::machine::{CARL, drop_in, group, lives, processes, session, succeeds, wait_until};

/// A line in carl's manager, without a session.
fn systemctl(words: &str) -> String {
    let uid = succeeds("id", &["-u", CARL]);
    let line = format!("XDG_RUNTIME_DIR=/run/user/{} systemctl --user {words}", uid.trim());
    succeeds("runuser", &["-u", CARL, "--", "sh", "-c", &line])
}

/// carl's machines.
fn machines() -> Vec<u32> {
    processes("msb-vmm", Some(CARL))
}

pub(crate) fn a_service_of_ones_own_is_started_by_its_socket(_: u32) -> Next {
    succeeds("loginctl", &["enable-linger", CARL]);
    wait_until("his manager runs", || {
        let uid = succeeds("id", &["-u", CARL]);
        std::path::Path::new(&format!("/run/user/{}/systemd/private", uid.trim())).exists()
    });
    systemctl("enable --now msbd.socket");
    assert_eq!(systemctl("is-active msbd.socket").trim(), "active");
    assert!(processes("msbd", Some(CARL)).is_empty(), "nobody has asked yet");
    session(CARL, "msb image load -i /payload/images/busybox.tar && msb run -d --name box busybox sleep 86400");
    assert_eq!(systemctl("is-active msbd.service").trim(), "active");
    let found = machines();
    assert_eq!(found.len(), 1, "{found:?}");
    let machine = found[0];
    let place = group(machine);
    assert!(place.contains("/msb.slice/msb-") && place.ends_with(".scope") && place.contains("/user@"), "{place}");

    systemctl("restart msbd.service");
    assert_eq!(session(CARL, "msb exec box -- echo on"), "on\n");
    let pid = systemctl("show --value --property MainPID msbd.service");
    succeeds("kill", &["-KILL", pid.trim()]);
    assert_eq!(session(CARL, "msb exec box -- echo on"), "on\n");
    assert!(lives(machine));

    drop_in("msbd.service", "user", "[Service]\nWatchdogSec=5s\n");
    systemctl("daemon-reload");
    systemctl("restart msbd.service");
    let pid = systemctl("show --value --property MainPID msbd.service");
    succeeds("kill", &["-STOP", pid.trim()]);
    let took = wait_until("his manager replaces his service", || {
        let now = systemctl("show --value --property MainPID msbd.service");
        now != pid
            && now.trim() != "0"
            && systemctl("show --value --property ActiveState msbd.service").trim() == "active"
    });
    println!("a service that hangs is replaced after {:.1} s", took.as_secs_f64());
    assert_eq!(session(CARL, "msb exec box -- echo on"), "on\n");
    assert_eq!(machines(), [machine]);

    session(CARL, "msb exec box -- sh -c 'echo written just before > /root/note'");
    systemctl("stop msb.slice");
    assert!(machines().is_empty(), "the machine goes on");
    assert_eq!(session(CARL, "msb start box >/dev/null && msb exec box -- cat /root/note"), "written just before\n");
    Next::Go
}

/// One stands by in the service's own group, where it ends with the service, and goes to a scope like any other when it becomes somebody's.
pub(crate) fn a_ready_fork_has_a_scope_once_it_is_taken(_: u32) -> Next {
    let before = machines();
    session(
        CARL,
        "msb create --engine kvm -m 128M --name source busybox && msb snapshot create warm --from source --memory --pool 1",
    );
    session(CARL, "msb rm -f source");
    wait_until("one stands by", || session(CARL, "msb snapshot inspect warm").contains("1 of 1"));
    let standing: Vec<u32> = machines().into_iter().filter(|pid| !before.contains(pid)).collect();
    let [machine] = standing[..] else { panic!("{standing:?} stand by") };
    let place = group(machine);
    assert!(place.ends_with("/msbd.service"), "{place}");
    assert_eq!(
        session(CARL, "msb create --engine kvm --name taken --snapshot warm >/dev/null && msb exec taken -- echo on"),
        "on\n"
    );
    assert!(lives(machine), "another was made in its place");
    let place = group(machine);
    assert!(place.contains("/msb.slice/msb-") && place.ends_with(".scope"), "{place}");
    session(CARL, "msb rm -f taken && msb snapshot rm warm");
    wait_until("none is left", || machines() == before);
    Next::Go
}

pub(crate) fn logging_out_ends_what_does_not_linger(_: u32) -> Next {
    // With linger nothing ends: each line above was a session of its own, and so is this one.
    let machine = machines();
    assert_eq!(machine.len(), 1, "{machine:?}");
    session(CARL, "msb exec box -- sh -c 'echo written before the logout > /root/note'");
    wait_until("he is logged out", || !succeeds("loginctl", &["list-sessions", "--no-legend"]).contains(CARL));
    assert_eq!(machines(), machine);
    let said = session(CARL, "msb doctor --format json");
    assert!(said.contains("carl lingers"), "{said}");

    // Without it his manager ends with his last session, and takes the machines along, flushed.
    session(CARL, "msb run -d --name back --restart always busybox sleep 86400");
    succeeds("loginctl", &["disable-linger", CARL]);
    let said = session(CARL, "msb doctor --format json");
    assert!(said.contains("loginctl enable-linger carl"), "{said}");
    let took = wait_until("his machines end with his last session", || machines().is_empty());
    println!("logged out: his machines have ended after {:.1} s", took.as_secs_f64());
    wait_until("his manager has ended", || processes("systemd", Some(CARL)).is_empty());
    // The next login brings back what was to be there always; the rest is as he left it.
    let line = "for i in $(seq 120); do msb ps -q | grep -qx back && break; sleep 1; done; msb ps -q; \
                msb start box >/dev/null; msb exec box -- cat /root/note";
    assert_eq!(session(CARL, line), "back\nwritten before the logout\n");
    wait_until("his machines end again", || machines().is_empty() && processes("systemd", Some(CARL)).is_empty());

    // A service that msb has started by itself belongs to no unit but the session it was started in, and Debian's logind lets that be for as
    // long as something runs in it.
    succeeds("rm", &["-rf", "/home/carl/.config/systemd"]);
    session(CARL, "msb start box >/dev/null");
    // The other one comes back by itself with any service of his.
    wait_until("both run", || machines().len() == 2);
    let both = machines();
    // Longer than logind waits before it stops the manager of a user who has left.
    std::thread::sleep(std::time::Duration::from_secs(20));
    assert_eq!(session(CARL, "msb exec box -- echo on"), "on\n");
    assert_eq!(machines(), both);
    session(CARL, "msb rm -f box back; msb self stop");
    Next::Go
}
