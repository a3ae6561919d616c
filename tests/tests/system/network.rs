//! The network of a real guest: addresses at once, the policy's word, names, published ports, and what hosts do to whoever talks to them.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::Duration;

use msb_tests::world::{self, HOST, HOST_V6, NAME_SERVER, OTHER_HOST};
use msb_tests::{Home, World};

/// What the name server of the worlds below knows.
const NAMES: &[(&str, &[IpAddr])] = &[
    ("api.example.com", &[IpAddr::V4(HOST), IpAddr::V6(HOST_V6)]),
    ("other.example.com", &[IpAddr::V4(OTHER_HOST)]),
    ("inside.example.com", &[IpAddr::V4(std::net::Ipv4Addr::new(10, 99, 0, 2))]),
];

/// Reads a stream to its end and answers with it in capitals.
fn shout(mut stream: TcpStream) {
    let mut request = Vec::new();
    let _ = stream.read_to_end(&mut request);
    let _ = stream.write_all(&request.to_ascii_uppercase());
}

/// A server on the host's loopback that answers every connection with its request, in capitals; gives its port.
fn shouting_host() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let port = listener.local_addr().expect("its address").port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            std::thread::spawn(move || shout(stream));
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

/// A world with the hosts of [`NAMES`], and a home whose service is in it; none, with a note, where this user may not make one.
fn home_in_a_world(name: &str) -> Option<(World, Home)> {
    let Some(world) = World::make() else {
        println!("skipped: namespaces want root");
        return None;
    };
    world.know(NAMES);
    for address in [IpAddr::V4(HOST), IpAddr::V6(HOST_V6), IpAddr::V4(OTHER_HOST)] {
        world.serve(address, 80, move |stream| world::serve_http(stream, &format!("from {address}\n")));
        world.serve(address, 7, shout);
    }
    let home = world.here(|| Home::with_busybox(name));
    Some((world, home))
}

#[test]
fn a_name_rule_opens_what_the_name_leads_to_and_nothing_else() {
    let Some((_world, home)) = home_in_a_world("network_names") else { return };
    let server = NAME_SERVER.to_string();
    let rule = "allow@api.example.com:tcp:80";
    let words =
        ["create", "--name", "box", "--net", "none", "--net-rule", rule, "--dns-nameserver", &server, "busybox"];
    home.succeeds(&words);
    let shell = |line: &str| home.msb(["exec", "box", "--", "sh", "-c", line]).run();

    // Before the name was looked up its address is one like any other.
    let early = shell(&format!("nc -w 30 {HOST} 80 </dev/null")).exits(1);
    assert!(early.complaint().contains("refused"), "{}", early.account());
    shell("wget -q -O - http://api.example.com/").succeeds().prints(&format!("from {HOST}\n"));
    shell(&format!("wget -q -O - http://{HOST}/")).succeeds().prints(&format!("from {HOST}\n"));
    shell(&format!("wget -q -O - 'http://[{HOST_V6}]/'")).succeeds().prints(&format!("from {HOST_V6}\n"));

    // Another port of it, another host, another name.
    for place in [format!("{HOST} 7"), format!("{OTHER_HOST} 80")] {
        let refused = shell(&format!("nc -w 30 {place} </dev/null")).exits(1);
        assert!(refused.complaint().contains("refused"), "{}", refused.account());
    }
    for name in ["other.example.com", "nobody.example.com"] {
        let unknown = shell(&format!("nslookup {name}")).exits(1);
        assert!(unknown.text().contains("NXDOMAIN"), "{}", unknown.account());
    }
    let log = home.msb(["net", "log", "box", "--format", "json"]).run().succeeds().text();
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let denied = |key: &str, value: &str| lines.iter().any(|line| line[key] == value && line["verdict"] == "deny");
    assert!(denied("address", &OTHER_HOST.to_string()) && denied("name", "other.example.com"), "{log}");
    let explained = home.json(&["net", "explain", "box", "http://api.example.com"]);
    assert_eq!(explained["action"], "allow", "{explained}");
    home.finish();
}

#[test]
fn what_a_host_does_is_what_the_guest_sees() {
    let Some((world, home)) = home_in_a_world("network_world") else { return };
    let server = NAME_SERVER.to_string();
    home.succeeds(&["create", "--name", "box", "--dns-nameserver", &server, "busybox"]);
    let shell = |line: &str| home.msb(["exec", "box", "--", "sh", "-c", line]).run();

    // A name that leads inwards leads nowhere.
    let inwards = shell("nslookup inside.example.com").exits(1);
    assert!(inwards.text().contains("NXDOMAIN"), "{}", inwards.account());
    shell("wget -q -O - http://other.example.com/").succeeds().prints(&format!("from {OTHER_HOST}\n"));

    // The guest's end of a stream reaches the host, and the host's answer after it reaches the guest; so do echoes, in both families.
    for address in [HOST.to_string(), HOST_V6.to_string()] {
        shell(&format!("echo hello | nc {address} 7")).succeeds().prints("HELLO\n");
        let _ = shell(&format!("ping -c 1 -W 20 {address}")).succeeds();
    }
    // Nobody listens, and somebody hangs up.
    let refused = shell(&format!("nc -w 30 {HOST} 9 </dev/null")).exits(1);
    assert!(refused.complaint().contains("refused"), "{}", refused.account());
    world.serve(HOST, 13, |mut stream| {
        let _ = stream.read(&mut [0]);
        let _ = rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
    });
    // The guest's kernel counts it (RFC 4022, tcpEstabResets); this nc tells no reason.
    let resets = || shell("awk '/^Tcp: [0-9]/ {print $9}' /proc/net/snmp").succeeds().text();
    assert_eq!(resets(), "0\n");
    let _ = shell(&format!("(echo x; sleep 2) | nc {HOST} 13"));
    assert_eq!(resets(), "1\n");

    // Datagrams there and back: a file of one block (RFC 1350).
    world.answer(HOST, 69, |request| request.starts_with(&[0, 1]).then(|| b"\x00\x03\x00\x01one block\n".to_vec()));
    shell(&format!("cd /tmp && tftp -g -r file {HOST} && cat file")).succeeds().prints("one block\n");

    // Many at once, each with its own.
    let many = format!("for n in $(seq 1 64); do (echo n$n | nc {HOST} 7) & done; wait");
    let answers = shell(&many).succeeds().text();
    let wanted: BTreeSet<String> = (1..=64).map(|number| format!("N{number}")).collect();
    assert_eq!(answers.lines().map(str::to_owned).collect::<BTreeSet<_>>(), wanted);
    home.finish();
}

#[test]
fn the_first_visitor_wakes_a_sandbox_that_sleeps() {
    let home = Home::with_busybox("network_wake");
    let serve = "while :; do nc -l -p 80 -e cat; done";
    let words = ["create", "--name", "web", "-p", "0:80", "--idle-timeout", "4s", "busybox", "--", "sh", "-c", serve];
    home.succeeds(&words);
    let detail = home.inspect("web");
    let address = detail["ports"][0].as_str().expect("a port").trim_end_matches(":80").to_owned();
    home.wait_until("web", "asleep");
    // It waits for the machine and its server; what it sent meanwhile is not lost.
    let mut answer = String::new();
    let mut stream = TcpStream::connect(&address).expect("the port of a sandbox that sleeps");
    stream.set_read_timeout(Some(Duration::from_secs(120))).expect("a limit");
    stream.write_all(b"good morning").expect("the request");
    stream.shutdown(std::net::Shutdown::Write).expect("its end");
    stream.read_to_string(&mut answer).expect("the answer");
    assert_eq!(answer, "good morning");
    assert_ne!(home.inspect("web")["boot_id"], detail["boot_id"], "it is the same run");
    home.wait_until("web", "asleep");
    home.succeeds(&["stop", "web"]);
    assert!(TcpStream::connect(&address).is_err(), "the port of a stopped sandbox is open");
    home.finish();
}

#[test]
fn whole_programs_talk_over_the_network() {
    let Some(archive) = msb_tests::tools_image() else {
        println!("skipped: the image with whole programs is made for `cargo xtask soak --only network`");
        return;
    };
    let Some((world, home)) = home_in_a_world("network_programs") else { return };
    let archive = archive.to_str().expect("a UTF-8 path").to_owned();
    let _ = home.msb(["image", "load", "-q", "-i", &archive]).patience(Duration::from_secs(600)).run().succeeds();
    let server = NAME_SERVER.to_string();
    let rules = ["--net-rule", "deny@other.example.com", "--dns-nameserver", &server];
    let ports = ["-p", "0:5201", "-p", "0:8000"];
    let size = ["create", "--name", "box", "-c", "2", "-m", "1G"];
    home.succeeds(&[&size[..], &rules[..], &ports[..], &["tools", "--", "iperf3", "-s"][..]].concat());
    let shell = |line: &str| {
        let finished = home.msb(["exec", "box", "--", "sh", "-c", line]).patience(Duration::from_secs(300)).run();
        println!("$ {line}\n{}", finished.account());
        finished
    };

    // curl: both families, a name that is denied.
    shell("curl -s http://api.example.com/").succeeds().prints(&format!("from {HOST}\n"));
    shell("curl -s -6 http://api.example.com/").succeeds().prints(&format!("from {HOST_V6}\n"));
    let _ = shell("curl -sS http://other.example.com/").exits(6);
    // dig: whichever server it asks, over UDP and TCP; a denied name has its reason (RFC 8914).
    for line in ["dig +short api.example.com", "dig +tcp +short api.example.com", "dig +short @8.8.8.8 api.example.com"]
    {
        shell(line).succeeds().prints(&format!("{HOST}\n"));
    }
    shell("dig +short AAAA api.example.com").succeeds().prints(&format!("{HOST_V6}\n"));
    let denied = shell("dig other.example.com").succeeds().text();
    for part in ["status: NXDOMAIN", "EDE: 15", "SOA"] {
        assert!(denied.contains(part), "no {part} in {denied}");
    }
    // iperf3: out and back, several streams, datagrams, both families.
    for host in [IpAddr::V4(HOST), IpAddr::V6(HOST_V6)] {
        let host = host.to_string();
        let mut command = std::process::Command::new("iperf3");
        command.args(["-s", "-B", &host]).stdout(std::process::Stdio::null());
        let mut listening = world.there(|| command.spawn().expect("iperf3"));
        for how in ["", "-R", "-P 8", "-P 8 -R", "-u -b 20M", "-u -b 20M -R"] {
            let said = shell(&format!("iperf3 -c {host} -t 3 {how}")).succeeds().text();
            assert!(said.contains("receiver"), "{said}");
        }
        let _ = listening.kill();
        let _ = listening.wait();
    }
    // And inwards, through published ports: iperf3's server, and one of HTTP.
    let ports = home.inspect("box")["ports"].clone();
    let address = |index: usize| {
        let port = ports[index].as_str().expect("a port");
        port.rsplit_once(':').expect("a published port").0.to_owned()
    };
    let (host, port) =
        address(0).split_once(':').map(|(host, port)| (host.to_owned(), port.to_owned())).expect("a port");
    for how in ["-P1", "-R", "-P8"] {
        let words = ["-c", &host, "-p", &port, "-t", "3", how];
        let began = std::time::Instant::now();
        let (output, said) = loop {
            let output = world.here(|| std::process::Command::new("iperf3").args(words).output().expect("iperf3"));
            let said = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
            let said = String::from_utf8_lossy(&said).into_owned();
            println!("$ iperf3 {}\n{said}", words.join(" "));
            // Its server does one test after the other and listens anew for each: in between it is busy, or nobody takes the connection.
            let is_between =
                ["server is busy", "Connection reset", "Connection refused"].iter().any(|why| said.contains(why));
            if !is_between || began.elapsed() > Duration::from_secs(20) {
                break (output, said);
            }
            std::thread::sleep(Duration::from_millis(200));
        };
        assert!(output.status.success() && said.contains("receiver"), "{said}");
    }
    let serve = "import socket\nlistener = socket.create_server(('', 8000))\nwhile True:\n    stream = listener.accept()[0]\n    \
                 stream.recv(4096)\n    stream.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\nfrom the guest\\n')\n    stream.close()";
    let _ = home.msb(["exec", "box", "--", "sh", "-c", "python3 -c \"$0\" >/dev/null 2>&1 &", serve]).run().succeeds();
    let url = format!("http://{}/", address(1));
    let words = ["-s", "--retry", "20", "--retry-all-errors", "--retry-delay", "1", &url];
    let output = world.here(|| std::process::Command::new("curl").args(words).output().expect("curl"));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "from the guest\n");
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
