//! The suite: reads the cases, drives one SDK through them, compares. Called by the parent module, once for each SDK.
//!
//! A case runs at a place: `service` (the shared one), `fresh` (a home where none runs yet), `offline` (a socket nobody listens on),
//! `uninstalled` (no msb to be found), `older` and `newer` (a peer that only says another version), `hostile:LIE` (the shared one, but a
//! copy out of a sandbox gets a stream that no sandbox may send). `${sdk}` stands for the SDK's name,
//! `${work}` for a folder with a tree to copy, `${registry}` for a registry of one image. A step is a call with what is expected of it, or
//! one of `kill_the_client`, `kill_the_client_during` (the call), `same_trees` and `absent`, which are done here.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::hostile::{self, Lie};
use super::{Sdk, trees};
use crate::cache;
use crate::home::Home;

/// Time for what a killed client left to be gone.
const GONE_TIMEOUT: Duration = Duration::from_secs(60);

/// Time after which a creation is in the middle: the service boots a machine, which takes seconds.
const UNDER_WAY: Duration = Duration::from_millis(700);

/// Connections that a client's pool may have gained since it was last looked at.
pub(super) const POOL_SLACK: usize = 4;

/// Where the suite runs.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) home: &'a Home,
    /// The installed programs.
    pub(super) tree: &'a Path,
    /// The test images, which every driver's current directory holds.
    pub(super) archives: &'a Path,
    /// A folder for what is copied and saved.
    pub(super) work: &'a Path,
    /// Host of the registry.
    pub(super) registry: &'a str,
}

/// Runs every case; gives back those that failed.
pub(super) fn run(sdk: &Sdk, place: &Place<'_>) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(cache::repository().join("sdk/conformance/suite.json"))?;
    let text = text.replace("${sdk}", sdk.name).replace("${registry}", place.registry);
    let text = text.replace("${work}", &place.work.to_string_lossy());
    let cases: Vec<Value> = serde_json::from_str(&text).context("suite.json")?;
    let Place { home, tree, archives, .. } = *place;
    let began = Instant::now();
    let mut failed = Vec::new();
    let mut shared: Option<Driver> = None;
    for case in &cases {
        let name = case["case"].as_str().context("a case has a name")?;
        let result = match case["place"].as_str() {
            None => {
                let driver = match &mut shared {
                    Some(driver) => driver,
                    None => shared.insert(Driver::start(service(sdk, home, tree, archives))?),
                };
                carry_out(sdk, case, driver, home)
            }
            Some(other) => elsewhere(sdk, case, other, place),
        };
        // A case may have ended its driver.
        shared = shared.filter(Driver::lives);
        match result {
            Ok(()) => println!("  {:<10} passed  {name}", sdk.name),
            Err(error) => {
                println!("  {:<10} FAILED  {name}: {error:#}", sdk.name);
                failed.push(format!("{}: {name}: {error:#}", sdk.name));
                // The driver's answers may be out of step now.
                shared = None;
            }
        }
    }
    println!("  {:<10} {} cases, {:.0} s", sdk.name, cases.len(), began.elapsed().as_secs_f64());
    Ok(failed)
}

pub(super) fn service(sdk: &Sdk, home: &Home, tree: &Path, archives: &Path) -> Command {
    let mut command = home.command(&sdk.driver[0]);
    command.args(&sdk.driver[1..]).current_dir(archives).env("MSB_PATH", tree.join("bin"));
    command
}

fn elsewhere(sdk: &Sdk, case: &Value, place: &str, here: &Place<'_>) -> Result<()> {
    let Place { home, tree, archives, work, .. } = *here;
    let folder = tempfile::Builder::new().prefix("msb-s-").tempdir_in("/tmp")?;
    let socket = folder.path().join("s");
    let own_home = home.path().join(format!("{}-{place}", sdk.name));
    let mut command = service(sdk, home, tree, archives);
    match place {
        "offline" => drop(command.env("MSB_HOST", &socket)),
        "fresh" => drop(command.env("MSB_HOME", &own_home)),
        "uninstalled" => drop(
            command
                .env("MSB_HOME", &own_home)
                .env("PATH", folder.path())
                .env_remove("MSB_PATH")
                .env_remove("MSB_DAEMON"),
        ),
        "older" | "newer" => {
            let listener = UnixListener::bind(&socket)?;
            let version = if place == "older" { 0 } else { 2 };
            std::thread::spawn(move || speak(&listener, version));
            command.env("MSB_HOST", &socket);
        }
        other => {
            let Some(lie) = other.strip_prefix("hostile:") else { bail!("there is no place {other}") };
            let lie = Lie::of(lie, &format!("{}-lie", sdk.name), work)?;
            hostile::stand_between(UnixListener::bind(&socket)?, home.socket()?, lie);
            command.env("MSB_HOST", &socket);
        }
    }
    carry_out(sdk, case, &mut Driver::start(command)?, home)
}

/// A service that only says its version, whatever it is asked.
fn speak(listener: &UnixListener, version: u32) {
    for connection in listener.incoming() {
        let Ok(mut connection) = connection else { return };
        let mut asked = Vec::new();
        let mut piece = [0; 1024];
        while !asked.windows(4).any(|end| end == b"\r\n\r\n") {
            match connection.read(&mut piece) {
                Ok(count) if count > 0 => asked.extend_from_slice(&piece[..count]),
                _ => break,
            }
        }
        let body = json!({ "version": "9.9.9", "api_version": version, "guest_generation": 1, "pid": 1, "started_at": "2026-01-01T00:00:00Z" }).to_string();
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length";
        let _ = write!(connection, "{head}: {}\r\n\r\n{body}", body.len());
    }
}

fn carry_out(sdk: &Sdk, case: &Value, driver: &mut Driver, home: &Home) -> Result<()> {
    for (index, step) in case["steps"].as_array().context("a case has steps")?.iter().enumerate() {
        let what = || format!("step {} ({})", index + 1, step["call"].as_str().unwrap_or("here"));
        if let Some(sandbox) = step["kill_the_client"].as_str() {
            driver.child.kill()?;
            driver.child.wait()?;
            gone(home, sandbox).with_context(what)?;
            continue;
        }
        if let Some(sandbox) = step["kill_the_client_during"].as_str() {
            let args = step.get("args").unwrap_or(&Value::Null);
            writeln!(driver.requests, "{}", json!({ "call": step["call"], "args": args }))?;
            // Long enough for the request to be under way, short enough for it not to be over.
            std::thread::sleep(UNDER_WAY);
            driver.child.kill()?;
            driver.child.wait()?;
            gone(home, sandbox).with_context(what)?;
            continue;
        }
        if let Some([one, other]) = step["same_trees"].as_array().map(Vec::as_slice) {
            let path = |value: &Value| Path::new(value.as_str().unwrap_or_default()).to_owned();
            trees::compare(&path(one), &path(other)).with_context(what)?;
            continue;
        }
        if let Some(paths) = step["absent"].as_array() {
            if let Some(path) =
                paths.iter().filter_map(Value::as_str).find(|path| Path::new(path).symlink_metadata().is_ok())
            {
                bail!("{}: {path} is there", what());
            }
            continue;
        }
        let before = driver.descriptors()?;
        let answer = driver
            .call(&json!({ "call": step["call"], "args": step.get("args").unwrap_or(&json!({})) }))
            .with_context(what)?;
        judge(sdk, step, &answer).with_context(what)?;
        if step["keeps_descriptors"] == true {
            let after = driver.descriptors()?;
            // A pool may keep a connection more or less; what leaks does so at each of the calls.
            if after > before + POOL_SLACK {
                bail!("{}: {before} descriptors before, {after} after", what());
            }
        }
    }
    Ok(())
}

fn judge(sdk: &Sdk, step: &Value, answer: &Value) -> Result<()> {
    let Some(code) = step["error"].as_str() else {
        let fits = answer.get("ok").is_some_and(|ok| fits(&step["ok"], ok));
        return if fits { Ok(()) } else { bail!("expected {}, got {answer}", step["ok"]) };
    };
    if answer["error"] != code {
        bail!("expected the error {code}, got {answer}");
    }
    if answer["hint"].as_str().is_none_or(str::is_empty) {
        bail!("an error without a hint: {answer}");
    }
    if !step["errno"].is_null() && answer["errno"] != step["errno"] {
        bail!("expected errno {}, got {answer}", step["errno"]);
    }
    if let Some(part) = step["message"].as_str()
        && !answer["message"].as_str().is_some_and(|message| message.contains(part))
    {
        bail!("expected a message with {part:?}, got {answer}");
    }
    if let Some(kind) = answer["kind"].as_str()
        && kind != class(code)
    {
        bail!("{} has the class {kind} for {code}, expected {}", sdk.name, class(code));
    }
    Ok(())
}

/// The class of a code in the languages that have classes.
fn class(code: &str) -> String {
    let capitalised = code.split('_').map(|word| word[..1].to_uppercase() + &word[1..]);
    capitalised.collect::<String>() + "Error"
}

/// Whether a value is what was expected: of an object only the named keys count; `contains` looks for parts.
fn fits(expected: &Value, actual: &Value) -> bool {
    let Some(keys) = expected.as_object() else { return expected == actual };
    if let Some(parts) = keys.get("contains").and_then(Value::as_array) {
        return parts.iter().all(|part| match actual {
            Value::Array(items) => items.contains(part),
            Value::String(text) => part.as_str().is_some_and(|part| text.contains(part)),
            _ => false,
        });
    }
    keys.iter().all(|(key, value)| actual.get(key).is_some_and(|actual| fits(value, actual)))
}

/// Waits until nothing is left of an ephemeral sandbox.
pub(super) fn gone(home: &Home, sandbox: &str) -> Result<()> {
    let deadline = Instant::now() + GONE_TIMEOUT;
    loop {
        let listed = home.msb(&["ls", "--format", "json"]).output()?;
        let left = String::from_utf8_lossy(&listed.stdout).contains(&format!("\"{sandbox}\""));
        let machines = home.running("msb-vmm").len() + home.running("qemu-system-x86_64").len();
        if listed.status.success() && !left && machines == 0 {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!(
                "a minute later {sandbox} is {}, with {machines} processes of virtual machines",
                if left { "listed" } else { "not listed" }
            );
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// A running driver.
pub(super) struct Driver {
    pub(super) child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Driver {
    pub(super) fn start(mut command: Command) -> Result<Self> {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start the driver")?;
        let requests = child.stdin.take().context("its stdin is a pipe")?;
        let answers = BufReader::new(child.stdout.take().context("its stdout is a pipe")?);
        Ok(Self { child, requests, answers })
    }

    pub(super) fn call(&mut self, request: &Value) -> Result<Value> {
        writeln!(self.requests, "{request}")?;
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("the driver ended: {}", self.child.wait()?);
        }
        serde_json::from_str(&line).with_context(|| format!("the driver said {line:?}"))
    }

    fn lives(driver: &Self) -> bool {
        std::fs::read_to_string(format!("/proc/{}/stat", driver.child.id())).is_ok_and(|stat| !stat.contains(") Z "))
    }

    fn descriptors(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).map(Iterator::count).unwrap_or_default())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_an_object_only_the_named_keys_count() {
        for (expected, actual, good) in [
            (json!({ "a": 1 }), json!({ "a": 1, "b": 2 }), true),
            (json!({ "a": null }), json!({ "b": 2 }), false),
            (json!(["x"]), json!(["x", "y"]), false),
            (json!({ "contains": ["x"] }), json!(["y", "x"]), true),
            (json!({ "contains": ["x", "z"] }), json!("xyz"), true),
            (json!({ "contains": ["q"] }), json!("xyz"), false),
            (json!(null), json!(null), true),
        ] {
            assert_eq!(fits(&expected, &actual), good, "{expected} {actual}");
        }
        assert_eq!(class("image_in_use"), "ImageInUseError");
    }
}
