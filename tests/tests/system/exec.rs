//! What `exec` promises about ends, users, folders, limits and processes. The cases share one sandbox: a boot costs more than they do.

use std::time::Duration;

use msb_tests::Home;

#[test]
fn exec_tells_ends_truly() {
    let home = Home::with_busybox("exec_ends");
    home.succeeds(&["create", "--name", "box", "busybox"]);
    let exec = |words: &[&str]| home.msb(["exec", "box", "--"].iter().chain(words)).run();

    // The command's own code, whatever it is.
    for code in [0, 1, 7, 124, 125, 126, 127, 255] {
        let _ = exec(&["sh", "-c", &format!("exit {code}")]).exits(code);
    }
    // Killed by a signal: 128 + its number.
    let _ = exec(&["sh", "-c", "kill -TERM $$"]).exits(143);
    let _ = exec(&["sh", "-c", "kill -KILL $$"]).exits(137);
    // Not found, not executable: codes of their own, and the reason in words.
    home.fails(&["exec", "box", "--", "/no/such/program"], 127, "exec_not_found");
    home.fails(&["exec", "box", "--", "no-such-program"], 127, "exec_not_found");
    home.fails(&["exec", "box", "--", "/etc/passwd"], 126, "exec_not_executable");
    home.fails(&["exec", "box", "--", "/etc"], 126, "exec_not_executable");
    // Too slow: killed in the guest, process group and all.
    let slow = home.msb(["exec", "--timeout", "1s", "box", "--", "sh", "-c", "sleep 600 & sleep 600"]).run().exits(124);
    assert!(slow.took < Duration::from_secs(20), "{}", slow.account());
    exec(&["sh", "-c", "pgrep sleep || echo none"]).succeeds().prints("none\n");
    // It ends when the process ends, not when a grandchild closes the pipe.
    let quick = exec(&["sh", "-c", "sleep 60 & echo started"]).succeeds();
    assert!(quick.took < Duration::from_secs(15), "{}", quick.account());
    let _ = quick.prints("started\n");
    home.finish();
}

#[test]
fn exec_runs_as_whom_and_where_it_is_told() {
    let home = Home::with_busybox("exec_identity");
    home.succeeds(&["create", "--name", "box", "-e", "FROM=sandbox", "-w", "/opt", "busybox"]);
    let exec = |flags: &[&str], line: &str| {
        let words = ["exec"].iter().chain(flags).chain(&["box", "--", "sh", "-c", line]).copied().collect::<Vec<_>>();
        home.msb(words).run()
    };
    exec(&[], "id -u; pwd; echo $HOME $FROM").succeeds().prints("0\n/opt\n/root sandbox\n");
    exec(&["-u", "app"], "id -u; id -g; id -G; echo $HOME").succeeds().prints("1000\n1000\n1000 50\n/home/app\n");
    exec(&["-u", "app:staff"], "id -u; id -g").succeeds().prints("1000\n50\n");
    exec(&["-u", "4242:4243"], "id -u; id -g; echo [$HOME]").succeeds().prints("4242\n4243\n[]\n");
    exec(&["-w", "/tmp", "-e", "FROM=exec"], "pwd; echo $FROM").succeeds().prints("/tmp\nexec\n");
    exec(&["-e", "HOME=/elsewhere"], "echo $HOME").succeeds().prints("/elsewhere\n");
    exec(&["--rlimit", "nofile=123:456"], "ulimit -n; ulimit -Hn").succeeds().prints("123\n456\n");
    home.fails(&["exec", "-u", "nobody-here", "box", "--", "true"], 125, "user_not_found");
    home.fails(&["exec", "-w", "/not/there", "box", "--", "true"], 125, "path_not_found");
    // The image's entrypoint never comes before an exec's command; an ordinary user cannot switch the machine off.
    exec(&["-u", "app"], "touch /etc/x 2>/dev/null || echo refused").succeeds().prints("refused\n");
    home.finish();
}

#[test]
fn ctrl_c_on_the_client_reaches_the_command() {
    let home = Home::with_busybox("exec_signal");
    home.succeeds(&["create", "--name", "box", "busybox"]);
    let mut running = home
        .msb([
            "exec",
            "box",
            "--",
            "sh",
            "-c",
            "trap 'echo caught; exit 3' INT TERM; echo ready; while :; do sleep 0.1; done",
        ])
        .start();
    running.wait_for("ready");
    running.signal(rustix::process::Signal::TERM);
    running.finish().exits(3).shows("caught");
    home.finish();
}

#[test]
fn eight_execs_at_once_do_not_mix() {
    let home = Home::with_busybox("exec_parallel");
    home.succeeds(&["create", "--name", "box", "-c", "2", "busybox"]);
    let started: Vec<_> = (0..8)
        .map(|index| {
            home.msb(["exec", "-i", "box", "--", "sh", "-c", "cat; exit $1", "sh", &index.to_string()])
                .input(vec![b'a' + index; 300_000])
                .start()
        })
        .collect();
    for (index, running) in (0u8..).zip(started) {
        let finished = running.finish().exits(i32::from(index));
        assert!(finished.stdout == vec![b'a' + index; 300_000], "stream {index} holds {} bytes", finished.stdout.len());
    }
    home.finish();
}
