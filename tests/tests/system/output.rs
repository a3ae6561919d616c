//! What commands print: for people, for programs, and how they group themselves.

use msb_tests::Home;
use serde_json::Value;

#[test]
fn lists_and_details_are_json_with_times_that_carry_an_offset() {
    let home = Home::with_busybox("json");
    home.succeeds(&["create", "--name", "box", "--label", "team=ml", "busybox"]);
    for words in
        [["ls"].as_slice(), &["ps", "-a"], &["inspect", "box"], &["image", "ls"], &["image", "inspect", "busybox"]]
    {
        let value = home.json(words);
        let mut times = Vec::new();
        collect_times(&value, &mut times);
        assert!(!times.is_empty(), "no time in {words:?}: {value}");
        for time in times {
            let parsed: Result<jiff::Timestamp, _> = time.parse();
            assert!(parsed.is_ok(), "{time:?} of {words:?} is not RFC 3339 with an offset");
        }
    }
    home.finish();
}

/// Every text under a key that ends in `_at`.
fn collect_times(value: &Value, times: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::String(text) if name.ends_with("_at") => times.push(text.clone()),
                    other => collect_times(other, times),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| collect_times(value, times)),
        _ => {}
    }
}

#[test]
fn tables_filters_aliases_and_quiet_output() {
    let home = Home::with_busybox("tables");
    home.succeeds(&["create", "--name", "one", "--label", "team=ml", "busybox"]);
    home.succeeds(&["create", "--name", "two", "--label", "team=web", "busybox"]);
    home.succeeds(&["stop", "two"]);
    let table = home.succeeds(&["ps", "-a"]);
    for text in ["NAME", "STATUS", "one", "two", "busybox", "running", "stopped"] {
        assert!(table.to_lowercase().contains(&text.to_lowercase()), "no {text} in\n{table}");
    }
    let running = home.succeeds(&["ps"]);
    assert!(running.contains("one") && !running.contains("two"), "{running}");
    assert_eq!(home.succeeds(&["ls", "-q", "--label", "team=web"]).trim(), "two");
    assert_eq!(home.succeeds(&["list"]), home.succeeds(&["ls"]));
    assert_eq!(home.succeeds(&["status", "-a"]), home.succeeds(&["ps", "-a"]));
    assert!(home.succeeds(&["images"]).contains("busybox"));
    // In a pipe there is no colour and no progress.
    assert!(!table.contains('\u{1b}'), "{table:?}");
    home.succeeds(&["remove", "--force", "one", "two"]);
    assert!(home.sandboxes().is_empty());
    home.finish();
}

#[test]
fn help_groups_every_command() {
    let home = Home::new("help");
    let help = home.succeeds(&["--help"]);
    let mut at = 0;
    for group in ["Sandboxes", "Images", "Storage", "Observability", "Installation", "Other"] {
        at += help[at..].find(group).unwrap_or_else(|| panic!("no {group} after byte {at} of\n{help}"));
    }
    for command in [
        "run", "create", "exec", "ls", "ps", "inspect", "logs", "stop", "start", "restart", "rm", "image", "doctor",
        "config",
    ] {
        assert!(
            help.lines().any(|line| line
                .split_whitespace()
                .next()
                .is_some_and(|word| word.trim_end_matches(',') == command)
                || line.contains(&format!(" {command}"))),
            "no {command} in\n{help}"
        );
    }
    assert_eq!(help, home.succeeds(&["-h"]));
    let _ = home.msb(["no-such-command"]).run().exits(2);
    let _ = home.msb(["create"]).run().exits(2);
    // Where the codes below 125 belong to a workload, wrong usage is msb's own error.
    let _ = home.msb(["run"]).run().exits(125);
    // Help needs no service.
    assert!(home.running("msbd").is_empty());
    home.finish();
}

#[test]
fn what_is_not_built_says_so_and_no_flag_is_ignored() {
    let home = Home::with_busybox("not_built");
    home.fails(&["run", "--tls-intercept", "busybox", "true"], 125, "not_implemented");
    assert!(home.sandboxes().is_empty());
    home.succeeds(&["create", "--name", "box", "busybox"]);
    let network = &home.inspect("box")["network"];
    assert_eq!(network["addresses"]["guest_ipv4"], "172.16.0.2", "inspect says what the network is: {network}");
    home.finish();
}

#[test]
fn settings_come_from_flag_variable_and_file_in_that_order() {
    let home = Home::with_busybox("settings");
    std::fs::write(home.path().join("config.toml"), "[sandbox]\nmemory = \"200M\"\ncpus = 1\n").expect("config.toml");
    let shown = home.succeeds(&["config", "show", "--origin"]);
    assert!(shown.contains("sandbox.memory") && shown.contains("config.toml:2"), "{shown}");
    let from_variable = home.msb(["config", "show", "--origin"]).env("MSB_MEMORY", "210M").run().succeeds().text();
    assert!(from_variable.contains("MSB_MEMORY"), "{from_variable}");
    home.succeeds(&["create", "--name", "file", "busybox"]);
    let _ = home.msb(["create", "--name", "variable", "busybox"]).env("MSB_MEMORY", "210M").run().succeeds();
    let _ = home.msb(["create", "--name", "flag", "-m", "220M", "busybox"]).env("MSB_MEMORY", "210M").run().succeeds();
    for (name, memory) in [("file", 200), ("variable", 210), ("flag", 220)] {
        assert_eq!(home.inspect(name)["spec"]["memory_mib"], memory, "{name}");
    }
    std::fs::write(home.path().join("config.toml"), "[sandbox]\n\nmemmory = \"200M\"\n").expect("config.toml");
    let complaint = home.fails(&["config", "show"], 1, "config_file");
    assert!(complaint.contains("config.toml:3") && complaint.contains("memmory"), "{complaint}");
    std::fs::remove_file(home.path().join("config.toml")).expect("config.toml");
    home.finish();
}
