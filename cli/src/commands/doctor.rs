//! `msb doctor`: what this host can do, which engine will be used and why, and what to install. It looks at what it can see
//! without a service first, so that it has something to say even where none can be started.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::Args;
use msb_protocol::control::{HostInfo, SandboxDetail};
use msb_protocol::paths::HomeLayout;
use msb_protocol::quantity::show_bytes;
use msb_sdk::Client;
use serde::Serialize;

use crate::context::Context;
use crate::failure::{self, ExitStatus, Failure};
use crate::printer::plain;

/// Free space of the home below which doctor warns, in bytes.
const FREE_BYTES_LOW: u64 = 2 << 30;
/// Bytes of the daemon's log that a report takes along.
const LOG_TAIL_LEN: usize = 256 << 10;
/// What stands in a report where something of the user's was.
const REDACTED: &str = "[redacted]";

/// Options of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Check the image store: every blob is read
    #[arg(long)]
    pub store: bool,
    /// Write a report for the makers of msb to this file (a tar); variables, labels and arguments are left out
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "msb-report.tar")]
    pub bundle: Option<PathBuf>,
}

/// How a finding is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    Warning,
    Problem,
}

/// One finding.
#[derive(Clone, Debug, Serialize)]
struct Check {
    section: &'static str,
    name: &'static str,
    verdict: Verdict,
    finding: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Check {
    fn ok(section: &'static str, name: &'static str, finding: impl Into<String>) -> Self {
        Self { section, name, verdict: Verdict::Ok, finding: finding.into(), fix: None }
    }

    fn not_ok(
        section: &'static str,
        name: &'static str,
        verdict: Verdict,
        finding: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            section,
            name,
            verdict,
            finding: finding.into(),
            fix: Some(fix.into()).filter(|fix: &String| !fix.is_empty()),
        }
    }
}

/// Carries it out. The code is 1 if something keeps sandboxes from running, or the store is damaged.
///
/// # Errors
/// Those of writing, and of the service for `--store`.
pub async fn run(args: DoctorArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let mut checks = Vec::new();
    programs(context, &mut checks);
    directories(context, &mut checks);
    linger(context.locator.surroundings.uid, Path::new("/"), &mut checks);
    let mut host = None;
    let client = match context.locator.connect().await {
        Ok(client) => {
            let info = client.version();
            checks.push(Check::ok(
                "Service",
                "msbd",
                format!("{} answers on {} (process {})", info.version, client.socket().display(), info.pid),
            ));
            match client.host().await {
                Ok(info) => {
                    engines(&info, &mut checks);
                    host = Some(info);
                }
                Err(error) => {
                    checks.push(Check::not_ok("Service", "host", Verdict::Problem, error.to_string(), error.hint()))
                }
            }
            Some(client)
        }
        Err(error) => {
            let mut finding = error.to_string();
            for detail in &error.api().details {
                finding.push_str(&format!("\n{detail}"));
            }
            checks.push(Check::not_ok("Service", "msbd", Verdict::Problem, finding, error.hint()));
            None
        }
    };
    if args.store {
        match &client {
            Some(client) => {
                let progress = context.printer.spinner("reading the image store");
                let report = client.check_store().await;
                drop(progress);
                checks.push(match report {
                    Ok(report) => {
                        let read = format!(
                            "{} images, {} blobs, {} read",
                            report.images,
                            report.blobs,
                            show_bytes(report.bytes)
                        );
                        if report.problems.is_empty() {
                            Check::ok("Store", "images", read)
                        } else {
                            let found = format!("{read}\n{}", report.problems.join("\n"));
                            Check::not_ok("Store", "images", Verdict::Problem, found, "load the named images again")
                        }
                    }
                    // As on a full disk: nothing is known of the images, and the other checks are still worth reading.
                    Err(error) => {
                        let found = format!("not checked: {error}");
                        Check::not_ok("Store", "images", Verdict::Problem, found, error.hint())
                    }
                });
            }
            None => checks.push(Check::not_ok("Store", "images", Verdict::Problem, "not checked: no service", "")),
        }
    }
    if context.printer.is_json() {
        context.printer.json(&checks)?
    } else {
        context.printer.text(&render(&checks))?
    }
    if let Some(path) = &args.bundle {
        bundle(path, &checks, host.as_ref(), client.as_ref(), context).await?;
        context.printer.note(&format!("the report is in {}; look through it before you send it", path.display()));
    }
    let bad = checks.iter().any(|check| check.verdict == Verdict::Problem);
    Ok(if bad { ExitStatus::FAILURE } else { ExitStatus::SUCCESS })
}

fn programs(context: &Context, checks: &mut Vec<Check>) {
    checks.push(Check::ok("Programs", "msb", env!("CARGO_PKG_VERSION")));
    checks.push(match context.locator.daemon_program() {
        Ok(path) => Check::ok("Programs", "msbd", path.display().to_string()),
        Err(error) => Check::not_ok("Programs", "msbd", Verdict::Warning, error.to_string(), error.hint()),
    });
    match context.config() {
        Ok(config) => {
            let changed =
                config.iter().filter(|(_, _, origin)| **origin != msb_protocol::config::Origin::Default).count();
            checks.push(Check::ok("Programs", "settings", format!("{changed} differ from their defaults")));
        }
        Err(Failure::Api(error)) => {
            checks.push(Check::not_ok("Programs", "settings", Verdict::Problem, error.message, error.hint))
        }
        Err(_) => {}
    }
}

fn directories(context: &Context, checks: &mut Vec<Check>) {
    let surroundings = &context.locator.surroundings;
    checks.push(directory(
        "home",
        &surroundings.home_dir(),
        surroundings.uid,
        "set MSB_HOME to a directory that is yours and writable",
    ));
    checks.push(directory(
        "sockets",
        &surroundings.runtime_dir(),
        surroundings.uid,
        "remove it, or set XDG_RUNTIME_DIR to a directory that is yours",
    ));
}

/// Under systemd a user's processes end with their last session unless they linger: detached sandboxes among them.
fn linger(uid: u32, root: &Path, checks: &mut Vec<Check>) {
    // The mark of a running systemd (sd_booted(3)).
    if uid == 0 || !root.join("run/systemd/system").is_dir() {
        return;
    }
    let users = std::fs::read_to_string(root.join("etc/passwd")).unwrap_or_default();
    let name = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    });
    // Users of a directory service are not in the file; systemd knows them by name only.
    let Some(name) = name.or_else(|| std::env::var("USER").ok().filter(|name| !name.contains('/'))) else { return };
    checks.push(if root.join("var/lib/systemd/linger").join(&name).exists() {
        Check::ok("Service", "linger", format!("{name} lingers: sandboxes outlive the last logout"))
    } else {
        Check::not_ok(
            "Service",
            "linger",
            Verdict::Warning,
            format!("{name} does not linger: systemd ends every sandbox at the last logout"),
            format!("loginctl enable-linger {name}"),
        )
    });
}

fn directory(name: &'static str, path: &Path, uid: u32, fix: &str) -> Check {
    let shown = path.display();
    let problem = |why: String| Check::not_ok("Directories", name, Verdict::Problem, why, fix);
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Check::ok("Directories", name, format!("{shown} (made when needed)"))
        }
        Err(error) => problem(format!("{shown}: {error}")),
        // The default home may be a link to a bigger disk; what it points to counts.
        Ok(_) => match std::fs::metadata(path) {
            Err(error) => problem(format!("{shown}: {error}")),
            Ok(data) if !data.is_dir() => problem(format!("{shown} is no directory")),
            Ok(data) if data.uid() != uid => {
                problem(format!("{shown} belongs to the user {}, not to {uid}", data.uid()))
            }
            Ok(data) if data.mode() & 0o077 != 0 => Check::not_ok(
                "Directories",
                name,
                Verdict::Warning,
                format!("{shown} is open to others (mode {:o})", data.mode() & 0o777),
                format!("chmod 700 {shown}"),
            ),
            Ok(_) => Check::ok("Directories", name, shown.to_string()),
        },
    }
}

fn engines(info: &HostInfo, checks: &mut Vec<Check>) {
    for (name, path) in [("kernel", &info.kernel), ("files", &info.share_dir)] {
        // Client and service share the host, and the kernel is read by everybody.
        checks.push(match std::fs::metadata(path) {
            Ok(_) => Check::ok("Service", name, path.clone()),
            Err(error) => Check::not_ok(
                "Service",
                name,
                Verdict::Problem,
                format!("{path}: {error}"),
                "install msb anew, or set MSB_SHARE_DIR or MSB_KERNEL",
            ),
        });
    }
    let free = format!("{} free in {}", show_bytes(info.home_free_bytes), info.home);
    checks.push(if info.home_free_bytes < FREE_BYTES_LOW {
        Check::not_ok("Directories", "space", Verdict::Warning, free, "free some, or set MSB_HOME to a larger disk")
    } else {
        Check::ok("Directories", "space", free)
    });
    // What to do about KVM depends on what is wrong with it, which the probe says in its own words.
    for (name, outcome, fix) in
        [("kvm", &info.probe.kvm, ""), ("qemu", &info.probe.qemu, "install it: apt-get install qemu-system-x86")]
    {
        checks.push(if outcome.usable {
            Check::ok("Engines", name, outcome.detail.clone())
        } else {
            Check::not_ok("Engines", name, Verdict::Warning, outcome.detail.clone(), fix)
        });
    }
    checks.push(match info.probe.engine {
        Some(engine) => Check::ok("Engines", "in use", format!("{}: {}", engine.as_str(), info.probe.reason)),
        None => Check::not_ok(
            "Engines",
            "in use",
            Verdict::Problem,
            format!("none: {}", info.probe.reason),
            "mend one of the two above",
        ),
    });
}

fn render(checks: &[Check]) -> String {
    let mut text = String::new();
    let mut sections: Vec<&str> = Vec::new();
    for check in checks {
        if !sections.contains(&check.section) {
            sections.push(check.section);
        }
    }
    for (index, section) in sections.iter().enumerate() {
        if index > 0 {
            text.push('\n');
        }
        text.push_str(&format!("{section}\n"));
        for check in checks.iter().filter(|check| check.section == *section) {
            let mark = match check.verdict {
                Verdict::Ok => "ok",
                Verdict::Warning => "warning",
                Verdict::Problem => "PROBLEM",
            };
            let mut lines = check.finding.lines();
            text.push_str(&format!("  {mark:8}{:10}{}\n", check.name, plain(lines.next().unwrap_or_default())));
            for line in lines {
                text.push_str(&format!("  {:18}{}\n", "", plain(line)));
            }
            if let Some(fix) = &check.fix {
                text.push_str(&format!("  {:18}fix: {}\n", "", plain(fix)));
            }
        }
    }
    text
}

/// Writes the report: findings, host, sandboxes without what is the user's, settings, the end of the daemon's log.
async fn bundle(
    path: &Path,
    checks: &[Check],
    host: Option<&HostInfo>,
    client: Option<&Client>,
    context: &Context,
) -> Result<(), Failure> {
    let mut files = vec![("doctor.json", json(checks)?), ("host.json", json(&host)?)];
    let mut sandboxes = Vec::new();
    if let Some(client) = client {
        for summary in client.list(&[]).await?.sandboxes {
            // One that was removed since the list was made has nothing to report.
            if let Ok(detail) = client.inspect(&summary.name).await {
                sandboxes.push(redact(detail));
            }
        }
    }
    files.push(("sandboxes.json", json(&sandboxes)?));
    if let Ok(config) = context.config() {
        let rows: Vec<_> =
            config.iter().map(|(setting, value, origin)| (setting.key, value.to_owned(), origin.to_string())).collect();
        files.push(("settings.json", json(&rows)?));
    }
    let log = HomeLayout::new(context.locator.surroundings.home_dir()).daemon_log();
    let log = std::fs::read(log).unwrap_or_default();
    files.push(("msbd.log", log[log.len().saturating_sub(LOG_TAIL_LEN)..].to_vec()));

    let mut archive = tar::Builder::new(Vec::new());
    let write = |error: std::io::Error| failure::file(path, &error);
    for (name, data) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(data.len() as u64);
        header.set_mode(0o600);
        archive.append_data(&mut header, format!("msb-report/{name}"), data.as_slice()).map_err(write)?;
    }
    let data = archive.into_inner().map_err(write)?;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file =
        std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(path).map_err(write)?;
    std::io::Write::write_all(&mut file, &data).map_err(write)
}

fn json<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, Failure> {
    serde_json::to_vec_pretty(value).map_err(|error| Failure::Api(msb_protocol::error::ApiError::internal(error)))
}

/// Takes out what is the user's own: values of variables and labels, arguments of commands. Names stay, because defects show in them.
fn redact(mut detail: SandboxDetail) -> SandboxDetail {
    let values = |map: &mut std::collections::BTreeMap<String, String>| {
        map.values_mut().for_each(|value| REDACTED.clone_into(value))
    };
    values(&mut detail.spec.env);
    values(&mut detail.spec.labels);
    values(&mut detail.summary.labels);
    for words in [Some(&mut detail.summary.command), detail.spec.command.as_mut(), detail.spec.entrypoint.as_mut()]
        .into_iter()
        .flatten()
    {
        words.iter_mut().skip(1).for_each(|word| REDACTED.clone_into(word));
    }
    let care = [
        detail.spec.health.as_mut().map(|check| &mut check.command),
        detail.spec.pre_stop.as_mut().map(|hook| &mut hook.command),
    ];
    for words in care.into_iter().flatten() {
        words.iter_mut().skip(1).for_each(|word| REDACTED.clone_into(word));
    }
    if let Some(report) = &mut detail.health_report {
        REDACTED.clone_into(&mut report.output);
    }
    if let Some(error) = &mut detail.boot_error {
        // The console may show what the workload wrote to it.
        error.console_tail =
            error.console_tail.lines().filter(|line| line.trim_start().starts_with('[')).collect::<Vec<_>>().join("\n");
    }
    detail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_who_does_not_linger_is_warned_where_systemd_runs() {
        let root = tempfile::tempdir().unwrap();
        let findings = |uid| {
            let mut checks = Vec::new();
            linger(uid, root.path(), &mut checks);
            checks
        };
        assert!(findings(1000).is_empty(), "no systemd, no linger");
        for folder in ["run/systemd/system", "etc", "var/lib/systemd/linger"] {
            std::fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        std::fs::write(
            root.path().join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n",
        )
        .unwrap();
        let warned = findings(1000);
        assert_eq!(
            (warned[0].verdict, warned[0].fix.as_deref()),
            (Verdict::Warning, Some("loginctl enable-linger ann"))
        );
        std::fs::write(root.path().join("var/lib/systemd/linger/ann"), "").unwrap();
        assert_eq!(findings(1000)[0].verdict, Verdict::Ok);
        assert!(findings(0).is_empty());
    }

    #[test]
    fn a_report_holds_no_value_of_the_users() {
        let detail: SandboxDetail = serde_json::from_value(serde_json::json!({
            "name": "box", "id": "018cc251-f400-7000-8000-000000000001", "status": "running", "image": "busybox",
            "command": ["sh", "hunter2"], "created_at": "2026-01-02T03:04:05Z", "restarts": 0, "ports": [], "labels": {"k": "hunter2"},
            "spec": {"image": "busybox", "env": {"A": "hunter2"}, "labels": {"k": "hunter2"}, "command": ["sh", "hunter2"], "entrypoint": ["e", "hunter2"],
                     "health": {"command": ["sh", "hunter2"]}, "pre_stop": {"command": ["sh", "hunter2"]}},
            "health_report": {"status": "healthy", "failing_streak": 0, "output": "hunter2"},
            "image_digest": "sha256:0", "boot_phases": [], "jail": {"in_force": [], "missing": []}, "network": {"policy": []},
            "root_allocated_bytes": 0, "directory": "/d", "heartbeat_file": "/h"
        }))
        .unwrap();
        let text = String::from_utf8(json(&redact(detail)).unwrap()).unwrap();
        assert!(!text.contains("hunter2"), "{text}");
        assert!(text.contains("\"A\"") && text.contains("\"sh\""));
    }

    #[test]
    fn somebody_elses_directory_is_a_problem() {
        let dir = tempfile::tempdir().unwrap();
        let uid = rustix::process::getuid().as_raw();
        let mode =
            |mode| std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        mode(0o755);
        assert_eq!(directory("home", dir.path(), uid, "").verdict, Verdict::Warning);
        mode(0o700);
        assert_eq!(directory("home", dir.path(), uid, "").verdict, Verdict::Ok);
        assert_eq!(directory("home", dir.path(), uid + 1, "").verdict, Verdict::Problem);
        assert_eq!(directory("home", &dir.path().join("none"), uid, "").verdict, Verdict::Ok);
    }
}
