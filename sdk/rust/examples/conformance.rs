//! The Rust side of the conformance suite: reads calls as JSON lines, carries each out with the library, answers with JSON lines.
//!
//! Started by `cargo xtask test --only sdk`. It judges nothing: what is expected is written in `sdk/conformance/suite.json`.
#![expect(clippy::print_stdout, reason = "answers are lines on standard output")]

use std::collections::BTreeMap;
use std::io::BufRead;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use msb_sdk::protocol::control::{
    EventQuery, HistoryQuery, ImageSummary, ListQuery, LogQuery, SandboxDetail, StartRequest, StopRequest, TerminalSize,
};
use msb_sdk::protocol::error::{ApiError, ErrorCode};
use msb_sdk::protocol::file_api::WatchRecord;
use msb_sdk::protocol::files::{FileAttributes, FileChangeKind};
use msb_sdk::protocol::id::SandboxName;
use msb_sdk::protocol::images::{PruneRequest, PullEvent, PullPolicy, PullRequest, SaveRequest};
use msb_sdk::protocol::mount::{Mount, MountOptions, MountSource};
use msb_sdk::protocol::network::{NetworkProfile, PortError, Rule};
use msb_sdk::protocol::security::SecurityProfile;
use msb_sdk::protocol::spec::{OnIdle, RestartPolicy};
use msb_sdk::protocol::volume::VolumeDetail;
use msb_sdk::volume::{Volume, VolumeKind};
use msb_sdk::{
    Client, CopyOptions, Error, Exec, ExecOutput, Fs, Image, Sandbox, SandboxBuilder, Session, SessionEvent,
};
use serde::Deserialize;
use serde_json::{Value, json};

/// The arguments of every call; each takes what it knows.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Arguments {
    name: Option<String>,
    image: String,
    root_directory: Option<String>,
    cpus: Option<u32>,
    memory_mib: Option<u32>,
    env: BTreeMap<String, String>,
    labels: Value,
    workdir: Option<String>,
    user: Option<String>,
    command: Option<Vec<String>>,
    detached: bool,
    ephemeral: bool,
    restart: Option<String>,
    timeout_ms: Option<u64>,
    output_len_max: Option<usize>,
    stdin: Value,
    terminal: Option<(u16, u16)>,
    actions: Vec<Action>,
    script: String,
    count: usize,
    grace_ms: Option<u64>,
    force: bool,
    path: String,
    reference: String,
    selector: Option<String>,
    limit: Option<usize>,
    tail: Option<u64>,
    grep: Option<String>,
    mounts: Vec<MountArguments>,
    ports: Vec<String>,
    network: Option<NetworkArguments>,
    security: SecurityProfile,
    rlimits: BTreeMap<String, u64>,
    pull: PullPolicy,
    idle_timeout_ms: Option<u64>,
    alias: Option<String>,
    interval_ms: u64,
    target: String,
    content: String,
    mode: Option<u32>,
    parents: bool,
    recursive: bool,
    follow: Option<bool>,
    offset: u64,
    length: Option<u64>,
    touch: String,
    kind: VolumeKind,
    size_mib: Option<u32>,
    tag: String,
    dry_run: bool,
}

#[derive(Deserialize)]
struct MountArguments {
    kind: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    path: String,
    target: String,
    size_mib: Option<u32>,
    #[serde(default)]
    read_only: bool,
}

#[derive(Deserialize)]
struct NetworkArguments {
    profile: NetworkProfile,
    #[serde(default)]
    rules: Vec<Rule>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Action {
    after: String,
    write: Option<String>,
    signal: Option<String>,
    resize: Option<(u16, u16)>,
    close_stdin: bool,
}

#[derive(Deserialize)]
struct Request {
    call: String,
    #[serde(default)]
    args: Arguments,
}

struct Driver {
    client: Option<Client>,
    held: Vec<Session>,
}

fn detail_value(detail: &SandboxDetail) -> Value {
    let summary = &detail.summary;
    json!({
        "name": summary.name, "status": summary.status, "image": summary.image, "labels": summary.labels,
        "cause": summary.last_end.as_ref().map(|end| end.cause), "detached": detail.spec.detached,
        "security": detail.spec.security, "network": detail.spec.network.profile,
        "rules": detail.spec.network.rules.len(), "ports": summary.ports.len(),
        "mounts": detail.spec.mounts.iter().map(|mount| mount.target.as_str()).collect::<Vec<_>>(),
    })
}

fn output_value(output: &ExecOutput) -> Value {
    json!({
        "exit_code": output.end.code, "signal": output.end.signal, "timed_out": output.end.timed_out,
        "stdout": output.stdout_text(), "stderr": output.stderr_text(),
    })
}

fn reference(image: &ImageSummary) -> String {
    image.references.first().cloned().unwrap_or_else(|| image.digest.clone())
}

impl Arguments {
    fn text_name(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }

    fn name(&self) -> Result<SandboxName, Error> {
        SandboxName::parse(self.name.as_deref().unwrap_or_default()).map_err(Error::InvalidConfig)
    }

    fn exec(&mut self) -> Exec {
        let mut exec = Exec::new(self.command.take().unwrap_or_default());
        for (name, value) in &self.env {
            exec = exec.env(name, value);
        }
        if let Some(path) = &self.workdir {
            exec = exec.workdir(path);
        }
        if let Some(user) = &self.user {
            exec = exec.user(user);
        }
        if let Some(timeout_ms) = self.timeout_ms {
            exec = exec.timeout(Duration::from_millis(timeout_ms));
        }
        if let Some(bytes) = self.output_len_max {
            exec = exec.output_len_max(bytes);
        }
        if let Some((rows, columns)) = self.terminal {
            exec = exec.terminal(rows, columns);
        }
        match &self.stdin {
            Value::String(text) => exec.stdin(text.as_bytes()),
            Value::Bool(true) => exec.stdin_open(),
            _ => exec,
        }
    }
}

impl Driver {
    async fn client(&mut self) -> Result<Client, Error> {
        if self.client.is_none() {
            self.client = Some(Client::connect().await?);
        }
        self.client.clone().ok_or_else(|| Error::Client(ApiError::internal("no client")))
    }

    async fn call(&mut self, call: &str, mut args: Arguments) -> Result<Value, Error> {
        // Without a client, so that a refusal comes before any connection.
        if call == "create" {
            return create(args).await;
        }
        let client = self.client().await?;
        match call {
            "connect" => Ok(json!({ "api_version": client.version().api_version })),
            "shutdown" => client.shutdown().await.map(|()| Value::Null),
            "list" => {
                let terms: Vec<String> = serde_json::from_value(args.labels).unwrap_or_default();
                let selectors: Vec<String> = args.selector.into_iter().collect();
                let found = client.select(&terms, &selectors).await?.sandboxes;
                Ok(found.iter().map(|sandbox| json!(sandbox.name)).collect())
            }
            "pages" => {
                let labels: Vec<String> = serde_json::from_value(args.labels).unwrap_or_default();
                let mut query = ListQuery { labels, limit: args.limit, ..ListQuery::default() };
                let mut pages = Vec::new();
                loop {
                    let page = client.list_page(&query).await?;
                    let names: Vec<_> = page.sandboxes.iter().map(|sandbox| sandbox.name.to_string()).collect();
                    pages.push(names);
                    match page.next {
                        Some(next) => query.after = Some(next),
                        None => return Ok(json!(pages)),
                    }
                }
            }
            "volume_create" => Ok(volume_value(&Volume::create(args.text_name(), args.kind, args.size_mib).await?)),
            "volume_get" => Ok(volume_value(&Volume::get(args.text_name()).await?)),
            "volume_list" => Ok(Volume::list().await?.iter().map(|volume| json!(volume.name)).collect()),
            "volume_remove" => Volume::remove(args.text_name()).await.map(|()| Value::Null),
            "image_tag" => {
                let image = Image::get(&args.reference).await?.tag(&args.tag).await?;
                Ok(json!(image.summary().references))
            }
            "image_save" => {
                let request = SaveRequest { references: vec![args.reference], ..SaveRequest::default() };
                Image::save_all(&client, &request, &args.path).await.map(|()| Value::Null)
            }
            "image_prune" => {
                let report = Image::prune(&PruneRequest { dry_run: args.dry_run, ..PruneRequest::default() }).await?;
                Ok(serde_json::to_value(report).unwrap_or_default())
            }
            "image_pull" => {
                let request = PullRequest { reference: args.reference, insecure: true, ..PullRequest::default() };
                let mut pull = Image::start_pull(&client, &request).await?;
                let (mut steps, mut references) = (Vec::new(), Vec::new());
                while let Some(event) = pull.next().await? {
                    match &event {
                        PullEvent::Done { image, .. } => references = image.references.clone(),
                        PullEvent::Error { error } => return Err(Error::Api(error.clone())),
                        _ => {}
                    }
                    steps.push(serde_json::to_value(&event).unwrap_or_default()["type"].clone());
                }
                Ok(json!({ "references": references, "steps": steps }))
            }
            "settle" => Ok(Value::Null),
            "first_byte" => {
                let began = Instant::now();
                let sandbox = Sandbox::builder_unnamed().image(args.image).ephemeral(true).create_on(&client).await?;
                let mut session = sandbox.exec_stream(["echo", "x"]).await?;
                while !matches!(session.next().await?, Some(SessionEvent::Stdout(_)) | None) {}
                let took = began.elapsed();
                client.remove(sandbox.name(), true).await?;
                Ok(json!(took.as_secs_f64() * 1000.0))
            }
            "start" => Ok(detail_value(&client.start(&args.name()?, &StartRequest::default()).await?)),
            "remove" => client.remove(&args.name()?, args.force).await.map(|()| Value::Null),
            "image_load" => {
                let loaded = Image::load(&args.path).await?;
                Ok(loaded.iter().map(|image| json!(image.summary().references)).collect())
            }
            "image_list" => Ok(client.images().await?.images.iter().map(|image| json!(reference(image))).collect()),
            "image_inspect" => {
                let image = client.image(&args.reference).await?;
                Ok(json!({
                    "references": image.summary.references, "layers": image.summary.layers,
                    "layer_details": image.layer_details.len(), "user": image.config.user,
                    "working_dir": image.config.working_dir, "used_by": image.used_by,
                }))
            }
            "image_remove" => client.remove_image(&args.reference, args.force).await.map(|_| Value::Null),
            "touch" => Ok(detail_value(&client.touch(&args.name()?).await?)),
            "detach" => Ok(detail_value(&client.detach(&args.name()?).await?)),
            "wait" => Ok(detail_value(&client.wait(&args.name()?).await?)),
            "stop" | "kill" => {
                let request = StopRequest { grace_ms: args.grace_ms, force: call == "kill" };
                Ok(detail_value(&client.stop(&args.name()?, &request).await?))
            }
            "restart" => Ok(detail_value(&client.restart(&args.name()?, &StopRequest::default()).await?)),
            _ => {
                let sandbox = Sandbox::get_from(&client, args.name()?).await?;
                self.on_sandbox(call, &sandbox, &mut args).await
            }
        }
    }

    async fn on_files(&mut self, call: &str, files: &Fs, args: &Arguments) -> Result<Value, Error> {
        let (path, sized) = (args.path.as_str(), |attributes: FileAttributes| json!({ "size": attributes.size }));
        match call {
            "fs_mkdir" if args.parents => files.make_directories(path).await.map(|()| Value::Null),
            "fs_mkdir" => files.make_directory(path).await.map(|()| Value::Null),
            "fs_write" => {
                let content = futures_util::stream::iter([Ok(args.content.clone().into_bytes().into())]);
                files.write_stream(path, args.mode, content).await.map(sized)
            }
            "fs_append" => files.append(path, args.content.clone()).await.map(sized),
            "fs_read" => {
                let mut content = files.read_range(path, args.offset, args.length).await?;
                let mut bytes = Vec::new();
                while let Some(piece) = content.next().await {
                    bytes.extend_from_slice(&piece?);
                }
                Ok(json!(String::from_utf8_lossy(&bytes)))
            }
            "fs_stat" => {
                let follows = args.follow != Some(false);
                let found = if follows { files.stat(path).await? } else { files.stat_link(path).await? };
                let kinds =
                    [(found.is_symlink(), "symlink"), (found.is_file(), "file"), (found.is_directory(), "directory")];
                let kind = kinds.iter().find(|(is, _)| *is).map_or("other", |(_, kind)| *kind);
                Ok(json!({ "kind": kind, "size": found.size, "mode": found.mode & 0o7777 }))
            }
            "fs_chmod" => files.chmod(path, args.mode.unwrap_or_default()).await.map(|()| Value::Null),
            "fs_symlink" => files.symlink(&args.target, path).await.map(|()| Value::Null),
            "fs_read_link" => files.read_link(path).await.map(Value::from),
            "fs_real_path" => files.real_path(path).await.map(Value::from),
            "fs_list" => Ok(files.list(path).await?.iter().map(|entry| json!(entry.name)).collect()),
            "fs_rename" => files.rename(path, &args.target).await.map(|()| Value::Null),
            "fs_exists" => files.exists(path).await.map(Value::from),
            "fs_remove" if args.recursive => files.remove_all(path).await.map(|()| Value::Null),
            "fs_remove" => files.remove(path).await.map(|()| Value::Null),
            _ => {
                let mut records = files.watch(path, false).await?;
                while let Some(record) = records.next().await? {
                    match record {
                        WatchRecord::Watching => drop(files.append(&args.touch, "seen").await?),
                        WatchRecord::Change { kind: FileChangeKind::Created, path, .. } => return Ok(path.into()),
                        WatchRecord::Change { .. } => {}
                    }
                }
                Err(Error::Client(ApiError::new(ErrorCode::ExecLost, "a watch without an end")))
            }
        }
    }

    async fn on_sandbox(&mut self, call: &str, sandbox: &Sandbox, args: &mut Arguments) -> Result<Value, Error> {
        match call {
            files if files.starts_with("fs_") => self.on_files(call, &sandbox.fs(), args).await,
            "copy_into" => {
                let options = CopyOptions::default();
                Ok(json!(sandbox.copy_into(args.path.as_ref(), &args.target, &options).await?.warnings))
            }
            "copy_out" => {
                let options = CopyOptions::default();
                Ok(json!(sandbox.copy_out(&args.path, args.target.as_ref(), &options).await?.warnings))
            }
            "ping" => Ok(json!(sandbox.ping().await?.round_trip_us > 0)),
            "ssh_config" => {
                let found = sandbox.ssh_config(args.alias.as_deref()).await?;
                Ok(json!({ "alias": found.alias, "config": found.config }))
            }
            "metrics_stream" => {
                let mut samples = sandbox.metrics_stream(Duration::from_millis(args.interval_ms)).await?;
                let mut names = Vec::new();
                while names.len() < args.count {
                    let Some(sample) = samples.next().await? else { break };
                    names.push(sample.name.to_string());
                }
                Ok(json!(names))
            }
            "metrics_history" => {
                let history = sandbox.metrics_history(&HistoryQuery::default()).await?;
                Ok(json!({ "name": history.name, "has_points": !history.points.is_empty() }))
            }
            "get" => Ok(detail_value(sandbox.detail())),
            "exec" => Ok(output_value(&sandbox.exec(args.exec()).await?)),
            "exec_check" => sandbox.exec(args.exec()).await?.check().map(|_| Value::Null),
            "shell" => Ok(output_value(&sandbox.shell(&args.script).await?)),
            "exec_many" => {
                let mut good = 0;
                for _ in 0..args.count {
                    good += usize::from(sandbox.exec(["true"]).await?.success());
                }
                Ok(json!(good))
            }
            "exec_stream" => stream(sandbox.exec_stream(args.exec()).await?, &args.actions).await,
            "exec_hold" => {
                let mut session = sandbox.exec_stream(args.exec()).await?;
                session.next().await?;
                self.held.push(session);
                Ok(Value::Null)
            }
            "logs" => {
                let query = LogQuery { tail: args.tail, grep: args.grep.clone(), ..LogQuery::default() };
                let mut lines = sandbox.logs(&query).await?;
                let mut text = String::new();
                while let Some(record) = lines.next().await? {
                    text.push_str(&record.data);
                }
                Ok(json!(text))
            }
            "events" => {
                let mut events = sandbox.events(&EventQuery::default()).await?;
                let mut states = Vec::new();
                while let Some(event) = events.next().await? {
                    if event.event == "state" {
                        states.push(json!(event.state));
                    }
                }
                Ok(states.into())
            }
            "metrics" => {
                let sample = sandbox.metrics().await?;
                Ok(json!(sample.map(|sample| json!({ "name": sample.name, "status": sample.status }))))
            }
            other => Err(Error::Client(ApiError::internal(format!("no call {other}")))),
        }
    }
}

fn volume_value(found: &VolumeDetail) -> Value {
    let users: Vec<_> = found.users.iter().map(|user| user.sandbox.to_string()).collect();
    json!({ "name": found.name, "kind": found.kind, "size_bytes": found.size_bytes, "users": users })
}

impl MountArguments {
    fn mount(self) -> Result<Mount, Error> {
        let source = match self.kind.as_str() {
            "bind" => MountSource::Directory { path: self.path },
            "named" => {
                let name = SandboxName::parse(&self.name).map_err(Error::InvalidConfig)?;
                MountSource::Named { name, volume: None, size_mib: None, quota_mib: None }
            }
            _ => MountSource::Tmpfs { size_mib: self.size_mib },
        };
        let options = MountOptions { read_only: self.read_only, ..MountOptions::default() };
        Ok(Mount { target: self.target, source, options })
    }
}

async fn create(args: Arguments) -> Result<Value, Error> {
    let mut builder = match args.name {
        Some(name) => Sandbox::builder(name),
        None => Sandbox::builder_unnamed(),
    };
    builder = match args.root_directory {
        Some(path) => builder.root_directory(path),
        None => builder.image(args.image),
    };
    builder = builder.envs(args.env).detached(args.detached).ephemeral(args.ephemeral);
    builder = builder.labels(serde_json::from_value(args.labels).unwrap_or_default());
    if let Some(cpus) = args.cpus {
        builder = builder.cpus(cpus);
    }
    if let Some(memory_mib) = args.memory_mib {
        builder = builder.memory_mib(memory_mib);
    }
    if let Some(command) = args.command {
        builder = builder.command(command);
    }
    for mount in args.mounts {
        builder = builder.mount(mount.mount()?);
    }
    for port in &args.ports {
        let wrong = |error: PortError| Error::InvalidConfig(ApiError::new(ErrorCode::InvalidConfig, error.to_string()));
        builder = builder.port(port.parse().map_err(wrong)?);
    }
    if let Some(network) = args.network {
        builder = builder.network_profile(network.profile);
        builder = network.rules.into_iter().fold(builder, SandboxBuilder::network_rule);
    }
    for (name, limit) in args.rlimits {
        builder = builder.rlimit(name, limit, limit);
    }
    if let Some(idle_timeout_ms) = args.idle_timeout_ms {
        builder = builder.idle_timeout(Duration::from_millis(idle_timeout_ms), OnIdle::Stop);
    }
    builder = builder.security(args.security).pull(args.pull);
    if args.restart.as_deref() == Some("no") {
        builder = builder.restart_policy(RestartPolicy::No);
    }
    Ok(detail_value(builder.create().await?.detail()))
}

async fn stream(mut session: Session, actions: &[Action]) -> Result<Value, Error> {
    let control = session.control();
    let mut stdin = session.take_stdin();
    let mut actions = actions.iter().peekable();
    let mut output = ExecOutput::default();
    while let Some(event) = session.next().await? {
        match event {
            SessionEvent::Stdout(data) => output.stdout.extend_from_slice(&data),
            SessionEvent::Stderr(data) => output.stderr.extend_from_slice(&data),
            SessionEvent::Exited(end) => {
                output.end = end;
                return Ok(output_value(&output));
            }
            SessionEvent::Started { .. } | SessionEvent::OutputLost { .. } => {}
        }
        while let Some(action) = actions.next_if(|action| output.stdout_text().contains(&action.after)) {
            if let Some((rows, columns)) = action.resize {
                control.resize(TerminalSize { rows, columns }).await?;
            }
            if let (Some(text), Some(stdin)) = (&action.write, &mut stdin) {
                stdin.write_all(text.as_bytes()).await?;
            }
            if let Some(name) = &action.signal {
                control.signal(if name == "SIGTERM" { 15 } else { 2 }).await?;
            }
            if action.close_stdin
                && let Some(stdin) = stdin.take()
            {
                stdin.finish().await?;
            }
        }
    }
    Err(Error::Client(ApiError::new(ErrorCode::ExecLost, "a stream without an end")))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut driver = Driver { client: None, held: Vec::new() };
    for line in std::io::stdin().lock().lines() {
        let request: Request = serde_json::from_str(&line?)?;
        let answer = match driver.call(&request.call, request.args).await {
            Ok(value) => json!({ "ok": value }),
            Err(error) => {
                let error = error.api();
                json!({ "error": error.code, "message": error.message, "hint": error.hint, "details": error.details, "errno": error.errno })
            }
        };
        println!("{answer}");
    }
    Ok(())
}
