//! The network of a real guest: addresses at once, the policy's word, names, published ports.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use msb_tests::Home;

/// A server on the host's loopback that answers every connection with its request, in capitals; gives its port.
fn shouting_host() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let port = listener.local_addr().expect("its address").port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut request = Vec::new();
                let _ = stream.read_to_end(&mut request);
                let _ = stream.write_all(&request.to_ascii_uppercase());
            });
        }
    });
    port
}

#[test]
fn a_guest_reaches_what_its_policy_allows_and_is_told_at_once_what_not() {
    let home = Home::with_busybox("network_policy");
    let port = shouting_host();
    home.succeeds(&["create", "--name", "box", "--net", "host", "busybox"]);
    let shell = |line: &str| home.msb(["exec", "box", "--", "sh", "-c", line]).run();
    let addresses = shell("ip addr show eth0; ip route; ip -6 route").succeeds().text();
    for needed in ["172.16.0.2/30", "fd42:6d73:62::2/64", "default via 172.16.0.1"] {
        assert!(addresses.contains(needed), "{needed} is not in {addresses}");
    }
    assert!(!addresses.contains("tentative"), "an address waits: {addresses}");

    // The host's loopback, by address and by name, over both families; the guest's end of the stream reaches the server.
    for place in ["172.16.0.1", "host.msb.internal"] {
        shell(&format!("echo hello | nc {place} {port}")).succeeds().prints("HELLO\n");
    }
    // Every query is answered here; what has no answer says so.
    let lookup = shell("nslookup host.msb.internal").succeeds().text();
    assert!(lookup.contains("172.16.0.1"), "{lookup}");

    // Metadata and private addresses are refused at once, and the log says why.
    for denied in ["169.254.169.254 80", "10.1.2.3 443"] {
        let refused = shell(&format!("nc -w 30 {denied} </dev/null")).exits(1);
        assert!(refused.complaint().contains("refused"), "{}", refused.account());
    }
    let log = home.msb(["net", "log", "box", "--format", "json"]).run().succeeds().text();
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    for (address, class) in [("169.254.169.254", "meta"), ("10.1.2.3", "private")] {
        let line = lines.iter().find(|line| line["address"] == address).unwrap_or_else(|| panic!("{address}: {log}"));
        assert_eq!((line["verdict"].as_str(), line["class"].as_str()), (Some("deny"), Some(class)), "{line}");
    }
    let explained = home.json(&["net", "explain", "box", "https://169.254.169.254"]);
    assert_eq!(explained["action"], "deny", "{explained}");
    let explained = home.json(&["net", "explain", "box", &format!("host.msb.internal:{port}")]);
    assert_eq!(explained["action"], "allow", "{explained}");

    let detail = home.inspect("box");
    assert_eq!(detail["network"]["addresses"]["guest_ipv4"], "172.16.0.2", "{detail}");

    // Without a network there is loopback, and nothing else.
    home.msb(["run", "--no-net", "busybox", "--", "sh", "-c", "ls /sys/class/net; nc -w 5 172.16.0.1 80"])
        .run()
        .exits(1)
        .prints("lo\n");
    home.finish();
}

#[test]
fn a_published_port_is_bound_before_the_boot_and_released_by_the_stop() {
    let home = Home::with_busybox("network_ports");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let taken = format!("{}:80", taken.local_addr().expect("its address").port());
    let complaint = home.fails(&["create", "--name", "never", "-p", &taken, "busybox"], 1, "port_in_use");
    assert!(complaint.contains(taken.trim_end_matches(":80")), "{complaint}");
    assert_eq!(home.sandboxes(), [""; 0], "a sandbox that was never there stayed");

    let serve = "while :; do nc -l -p 80 -e cat; done";
    home.succeeds(&["create", "--name", "web", "-p", "0:80", "busybox", "--", "sh", "-c", serve]);
    let port = home.inspect("web")["ports"][0].as_str().expect("a port").to_owned();
    assert!(port.starts_with("127.0.0.1:") && port.ends_with(":80"), "{port}");
    let address = port.trim_end_matches(":80").to_owned();
    echo(&address, "one");
    // A new daemon finds the port open.
    home.daemon().signal(rustix::process::Signal::KILL);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(home.status("web"), "running");
    echo(&address, "two");
    home.succeeds(&["stop", "web"]);
    assert!(TcpStream::connect(&address).is_err(), "the port is still open");
    home.finish();
}

/// Sends a line through a published port and reads it back. The guest's server may have to start first.
fn echo(address: &str, line: &str) {
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    loop {
        let mut answer = String::new();
        let outcome = TcpStream::connect(address).and_then(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            stream.write_all(line.as_bytes())?;
            stream.shutdown(std::net::Shutdown::Write)?;
            stream.read_to_string(&mut answer)
        });
        if answer == line {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "no echo from {address}: {outcome:?} {answer:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
