//! `msb logs`: every filter, on a sandbox that runs and on one that stopped, across two runs.

use msb_tests::Home;
use serde_json::Value;

const SCRIPT: &str = "echo out one; echo err one >&2; echo needle one; sleep 3; echo out two; echo err two >&2; printf half; exec sleep 600";

fn records(home: &Home, words: &[&str]) -> Vec<Value> {
    let all: Vec<&str> = ["logs", "--json"].iter().chain(words).chain(&["web"]).copied().collect();
    home.succeeds(&all).lines().map(|line| serde_json::from_str(line).expect("a record of JSON")).collect()
}

fn data(records: &[Value]) -> Vec<&str> {
    records.iter().map(|record| record["data"].as_str().expect("text")).collect()
}

#[test]
fn filters_tell_apart_what_was_written_when_and_where() {
    let home = Home::with_busybox("log_filters");
    home.succeeds(&["run", "-d", "--name", "web", "busybox", "--", "sh", "-c", SCRIPT]);
    let mut follow = home.msb(["logs", "-f", "--grep", "two", "web"]).start();
    let mut half = home.msb(["logs", "-f", "web"]).start();
    follow.wait_for("out two");
    half.wait_for("half");

    // Sources, and the two streams of msb itself.
    home.msb(["logs", "--source", "stdout", "web"]).run().succeeds().prints("out one\nneedle one\nout two\nhalf");
    let errors = home.msb(["logs", "--source", "stderr", "web"]).run().succeeds();
    assert_eq!((errors.text().as_str(), errors.complaint().as_str()), ("", "err one\nerr two\n"));
    let both = home.msb(["logs", "--source", "output", "web"]).run().succeeds();
    assert_eq!(both.text(), "out one\nneedle one\nout two\nhalf");
    assert_eq!(both.complaint(), "err one\nerr two\n");
    assert!(data(&records(&home, &["--source", "system"])).iter().all(|line| !line.contains("one")));
    let all = records(&home, &["--source", "all"]);
    assert!(all.len() >= records(&home, &["--source", "stdout,stderr"]).len());
    home.fails(&["logs", "--source", "nowhere", "web"], 1, "invalid_config");

    // Tail and grep work together: the last of those that fit. The two streams are two pipes: what was written to both within
    // a moment may be read in either order, but each keeps its own.
    let matching = records(&home, &["--grep", "one"]);
    let mut one = data(&matching);
    assert_eq!(one.iter().filter(|line| !line.starts_with("err")).collect::<Vec<_>>(), [&"out one\n", &"needle one\n"]);
    one.sort_unstable();
    assert_eq!(one, ["err one\n", "needle one\n", "out one\n"]);
    assert_eq!(data(&records(&home, &["--grep", "one", "--source", "stdout", "--tail", "1"])), ["needle one\n"]);
    assert_eq!(data(&records(&home, &["-n", "0"])), Vec::<&str>::new());
    // Times: from one record on, before it, and in the words of a person.
    let second = &records(&home, &["--grep", "out two"])[0]["time"];
    let second = second.as_str().expect("a time");
    let since = records(&home, &["--since", second]);
    assert_eq!(data(&since)[0], "out two\n");
    assert!(!data(&records(&home, &["--until", second])).iter().any(|line| line.contains("two")));
    assert_eq!(data(&records(&home, &["--since", "1h"])).len(), records(&home, &[]).len());
    assert_eq!(data(&records(&home, &["--until", "1h"])), Vec::<&str>::new());
    home.fails(&["logs", "--since", "soon", "web"], 1, "invalid_config");
    let stamped = home.msb(["logs", "-t", "--source", "stdout", "web"]).run().succeeds().text();
    for line in stamped.lines() {
        assert!(line.starts_with("20") && line.as_bytes()[10] == b'T', "{stamped}");
    }

    // The follower ends with the sandbox and has shown only what was asked for.
    home.succeeds(&["stop", "-t", "1", "web"]);
    let followed = follow.finish().succeeds();
    assert_eq!((followed.text().as_str(), followed.complaint().as_str()), ("out two\n", "err two\n"));
    assert!(half.finish().succeeds().text().ends_with("half"));

    // A second run: its lines follow, and on a terminal each run has its colour.
    home.succeeds(&["start", "web"]);
    let mut again = home.msb(["logs", "-f", "--tail", "1", "--source", "stdout", "web"]).start();
    again.wait_for("out two");
    let runs: std::collections::BTreeSet<String> =
        records(&home, &[]).iter().map(|record| record["boot_id"].to_string()).collect();
    assert_eq!(runs.len(), 2);
    let coloured =
        home.shell("script -qec 'msb logs --color-sessions --grep out web' /dev/null").run().succeeds().text();
    let lines: Vec<&str> = coloured.lines().filter(|line| line.contains("out")).collect();
    assert_eq!(lines.len(), 4, "{coloured:?}");
    let colours: Vec<&str> = lines.iter().map(|line| line.split("out").next().expect("a colour")).collect();
    assert!(
        colours[0].contains('\u{1b}')
            && colours[0] == colours[1]
            && colours[2] == colours[3]
            && colours[1] != colours[2],
        "{coloured:?}"
    );
    // Where programs read, there are none.
    assert!(!home.succeeds(&["logs", "--color-sessions", "web"]).contains('\u{1b}'));
    home.succeeds(&["stop", "-t", "1", "web"]);
    let _ = again.finish().succeeds();
    home.finish();
}
