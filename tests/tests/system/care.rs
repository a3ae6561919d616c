//! What a sandbox is asked and told beside its workload: health checks, the hook before a stop, labels and selections. One boot and a half.

use std::time::Duration;

use msb_tests::Home;

fn wait_for_health(home: &Home, wanted: &str) {
    for _ in 0..300 {
        if home.inspect("web")["health"] == wanted {
            return;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    panic!("never {wanted}: {}", home.inspect("web"));
}

#[test]
fn a_sandbox_is_asked_how_it_is_labelled_live_and_saves_before_it_stops() {
    let home = Home::with_busybox("care");
    home.succeeds(&[
        "run",
        "-d",
        "--name",
        "web",
        "--label",
        "team=ml",
        "--health-cmd",
        "test -e /well",
        "--health-interval",
        "500ms",
        "--health-retries",
        "2",
        "--pre-stop",
        "test -e /running && echo bye > /saved",
        "busybox",
        "--",
        "sh",
        "-c",
        "touch /well /running; trap 'rm /running; exit 0' TERM; while :; do sleep 1; done",
    ]);
    wait_for_health(&home, "healthy");
    assert!(home.succeeds(&["ps"]).contains("running (healthy)"));

    home.succeeds(&["label", "web", "gpu=", "team=web"]);
    assert_eq!(home.succeeds(&["ls", "-q", "--selector", "team in (web,db),!debug,gpu"]), "web\n");
    assert_eq!(home.succeeds(&["ls", "-q", "--selector", "team=ml"]), "");
    home.msb(["exec", "--label", "gpu", "--", "echo", "everywhere"]).run().succeeds().prints("everywhere\n");
    home.fails(&["stop", "--selector", ""], 1, "invalid_selector");
    home.fails(&["stop", "--selector", "team in"], 1, "invalid_selector");
    home.fails(&["stop", "--label", "gpu", "--expect", "2"], 1, "selection_unexpected");
    assert_eq!(home.succeeds(&["stop", "--label", "gpu", "--dry-run"]), "web\n");
    assert_eq!(home.status("web"), "running");

    home.succeeds(&["exec", "web", "--", "rm", "/well"]);
    wait_for_health(&home, "unhealthy");
    assert_eq!(home.status("web"), "running", "without a restart policy it is only shown");
    let events = home.succeeds(&["events", "--name", "web", "--since", "10m"]);
    assert!(events.contains("health running by=supervisor unhealthy: exit code 1"), "{events}");

    home.succeeds(&["stop", "--selector", "team=web", "--expect", "1"]);
    home.succeeds(&["start", "web"]);
    // The hook ran while the workload did, and what it wrote was flushed.
    home.msb(["exec", "web", "--", "cat", "/saved"]).run().succeeds().prints("bye\n");
    home.succeeds(&["rm", "-f", "web"]);
    home.finish();
}
