//! The Rust side of the conformance suite: reads calls as JSON lines, carries each out with the library, answers with JSON lines.
//!
//! Started by `cargo xtask test --only sdk`. It judges nothing: what is expected is written in `sdk/conformance/suite.json`.
#![expect(clippy::print_stdout, reason = "answers are lines on standard output")]

use std::collections::BTreeMap;
use std::io::BufRead;
use std::time::Duration;

use msb_sdk::protocol::control::{
    EventQuery, ImageSummary, LogQuery, SandboxDetail, StartRequest, StopRequest, TerminalSize,
};
use msb_sdk::protocol::error::{ApiError, ErrorCode};
use msb_sdk::protocol::id::SandboxName;
use msb_sdk::protocol::spec::RestartPolicy;
use msb_sdk::{Client, Error, Exec, ExecOutput, Image, Sandbox, Session, SessionEvent};
use serde::Deserialize;
use serde_json::{Value, json};

/// The arguments of every call; each takes what it knows.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Arguments {
    name: Option<String>,
    image: String,
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
                let found = client.list(&terms).await?.sandboxes;
                Ok(found.iter().map(|sandbox| json!(sandbox.name)).collect())
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

    async fn on_sandbox(&mut self, call: &str, sandbox: &Sandbox, args: &mut Arguments) -> Result<Value, Error> {
        match call {
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
                let mut lines = sandbox.logs(&LogQuery::default()).await?;
                let mut text = String::new();
                while let Some(record) = lines.next().await? {
                    text.push_str(&record.data);
                }
                Ok(json!(text))
            }
            "events" => {
                let mut events = sandbox.client().events(&EventQuery::default()).await?;
                let mut states = Vec::new();
                while let Some(event) = events.next().await? {
                    if event.sandbox_id == sandbox.detail().summary.id && event.event == "state" {
                        states.push(json!(event.state));
                    }
                }
                Ok(states.into())
            }
            "metrics" => {
                let snapshot = sandbox.client().metrics().await?;
                let sample = snapshot.sandboxes.iter().find(|sample| sample.id == sandbox.detail().summary.id);
                Ok(json!(sample.map(|sample| json!({ "name": sample.name, "status": sample.status }))))
            }
            other => Err(Error::Client(ApiError::internal(format!("no call {other}")))),
        }
    }
}

async fn create(args: Arguments) -> Result<Value, Error> {
    let mut builder = match args.name {
        Some(name) => Sandbox::builder(name),
        None => Sandbox::builder_unnamed(),
    };
    builder = builder.image(args.image).envs(args.env).detached(args.detached).ephemeral(args.ephemeral);
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
            if let (Some(text), Some(stdin)) = (&action.write, &mut stdin) {
                stdin.write_all(text.as_bytes()).await?;
            }
            if let Some(name) = &action.signal {
                control.signal(if name == "SIGTERM" { 15 } else { 2 }).await?;
            }
            if let Some((rows, columns)) = action.resize {
                control.resize(TerminalSize { rows, columns }).await?;
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
                json!({ "error": error.code, "message": error.message, "hint": error.hint, "details": error.details })
            }
        };
        println!("{answer}");
    }
    Ok(())
}
