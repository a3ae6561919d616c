//! What each security profile leaves a workload, seen from inside real guests.

use msb_tests::Home;

/// One question of the table: its name, the shell line that answers it, and the answers under default, restricted and strict.
struct Question(&'static str, &'static str, [&'static str; 3]);

const YES: &str = "yes";
const NO: &str = "no";

/// Capability masks are those of `msb_protocol::security`; a unit test there says what they mean.
const TABLE: &[Question] = &[
    Question(
        "bounding",
        "grep CapBnd /proc/self/status | cut -f2",
        ["000001ffffbfffff", "00000000800405fb", "00000000000004fb"],
    ),
    Question(
        "effective",
        "grep CapEff /proc/self/status | cut -f2",
        ["000001ffffbfffff", "00000000800405fb", "00000000000004fb"],
    ),
    Question("ambient", "grep CapAmb /proc/self/status | cut -f2", ["0000000000000000"; 3]),
    Question("no_new_privs", "grep NoNewPrivs /proc/self/status | cut -f2", ["0", "1", "1"]),
    Question("seccomp", "grep Seccomp: /proc/self/status | cut -f2", ["0", "0", "2"]),
    Question("mount", "mkdir -p /tmp/m && mount -t tmpfs none /tmp/m", [YES, NO, NO]),
    Question("remount", "mount -o remount,rw /", [YES, NO, NO]),
    Question("device node", "mknod /tmp/node b 254 0", [YES, NO, NO]),
    Question("disk", "head -c 512 /dev/vda", [YES, NO, NO]),
    Question("chroot", "chroot / true", [YES, YES, NO]),
    Question("set a system control", "echo 0 > /proc/sys/vm/overcommit_memory", [YES, NO, NO]),
    Question("read a system control", "cat /proc/sys/kernel/ostype", [YES, YES, YES]),
    Question("kernel log", "dmesg", [YES, NO, NO]),
    // busybox says that it could not, and exits with 0.
    Question("clock", "test -z \"$(date -s @$(date +%s) 2>&1 >/dev/null)\"", [YES, NO, NO]),
    Question("host name", "hostname elsewhere", [YES, NO, NO]),
    Question("user namespace", "unshare -U true", [YES, YES, NO]),
    Question("write the root", "touch /etc/written", [YES, YES, NO]),
    Question(
        "write memory",
        "mkdir -p /run /var/tmp && touch /tmp/written /run/written /var/tmp/written",
        [YES, YES, YES],
    ),
    Question("change user", "su -s /bin/sh app -c true", [YES, YES, YES]),
    Question("chown", "touch /tmp/x && chown app /tmp/x", [YES, YES, YES]),
    Question("files of the agent", "test -n \"$agent\" && ls /proc/$agent/root/", [YES, NO, NO]),
    Question("memory of the agent", "test -n \"$agent\" && cat /proc/$agent/environ /proc/$agent/maps", [YES, NO, NO]),
    Question("standard devices", "head -c 8 /dev/urandom && echo x > /dev/null && test -c /dev/ptmx", [YES, YES, YES]),
];

#[test]
fn each_profile_leaves_exactly_what_its_table_says() {
    let home = Home::with_busybox("profiles");
    for (column, profile) in ["default", "restricted", "strict"].into_iter().enumerate() {
        home.succeeds(&["create", "--name", profile, "--security", profile, "--tmpfs", "/cache:16M", "busybox"]);
        let agent = "agent=$(grep -l '^/proc/self/exe' /proc/[0-9]*/cmdline 2>/dev/null | head -n 1 | cut -d/ -f3)\n";
        let script: String = TABLE
            .iter()
            .map(|Question(name, line, answers)| {
                if [YES, NO].contains(&answers[0]) {
                    format!("if ({line}) >/dev/null 2>&1; then echo '{name}=yes'; else echo '{name}=no'; fi\n")
                } else {
                    format!("echo \"{name}=$({line})\"\n")
                }
            })
            .collect();
        let script = format!("{agent}{script}");
        let expected: String =
            TABLE.iter().map(|Question(name, _, answers)| format!("{name}={}\n", answers[column])).collect();
        home.msb(["exec", profile, "--", "sh", "-c", &script]).run().succeeds().prints(&expected);
        // Another user starts with nothing, whatever the profile.
        let user = home.msb(["exec", "-u", "app", profile, "--", "grep", "CapEff", "/proc/self/status"]).run();
        user.succeeds().shows("0000000000000000");
        let inspect = home.succeeds(&["inspect", profile]);
        let forced = inspect.contains("tmpfs of 16 MiB on /cache (rw; forced: nosuid,nodev)");
        assert_eq!(forced, column > 0, "{inspect}");
        assert_eq!(inspect.contains("no_new_privs, system calls"), column == 2, "{inspect}");
        let flags = home.msb(["exec", profile, "--", "grep", " /cache ", "/proc/mounts"]).run().succeeds().text();
        assert_eq!(flags.contains("nosuid,nodev"), column > 0, "{flags}");
        home.succeeds(&["rm", "--force", profile]);
    }
    // A terminal works under the narrowest, too; what cannot work is refused before anything boots.
    let refused = home.msb(["create", "--security", "restricted", "busybox", "sudo", "id"]).run().exits(1);
    let _ = refused.complains("no_new_privs");
    home.finish();
}
