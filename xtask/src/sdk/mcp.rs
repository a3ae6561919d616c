//! `msb mcp`, asked by the MCP client of the npm registry (`sdk/typescript/conformance/mcp.ts`): every tool once, and what is left when the
//! client is killed in the middle of a call. Called by the parent module.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::suite;
use crate::home::Home;
use crate::program;

/// Runs both; `start` is what starts the client's program, `archives` the folder of the test images.
pub(super) fn run(start: &[String], home: &Home, tree: &Path, archives: &Path) -> Result<Vec<String>> {
    let began = Instant::now();
    let archive = archives.join("busybox.tar");
    program::output(&mut home.msb(&["image", "load", "-q", "-i", &archive.to_string_lossy()]))?;
    let mut failed = Vec::new();
    let proofs = [
        ("a client of the registry lists the tools and uses each", each_tool(start, home, tree)),
        ("a client that is killed in the middle leaves nothing behind", killed(start, home, tree)),
    ];
    let count = proofs.len();
    for (name, outcome) in proofs {
        match outcome {
            Ok(()) => println!("  {:<10} passed  {name}", "mcp"),
            Err(error) => {
                println!("  {:<10} FAILED  {name}: {error:#}", "mcp");
                failed.push(format!("mcp: {name}: {error:#}"));
            }
        }
    }
    println!("  {:<10} {} cases, {:.0} s", "mcp", count, began.elapsed().as_secs_f64());
    Ok(failed)
}

fn command(start: &[String], home: &Home, tree: &Path) -> std::process::Command {
    let mut command = home.command(&start[0]);
    command.args(&start[1..]).arg(tree.join("bin/msb"));
    command
}

fn each_tool(start: &[String], home: &Home, tree: &Path) -> Result<()> {
    program::run(command(start, home, tree).arg("check"))?;
    suite::gone(home, "mcp-box")?;
    // Its client has closed its end, so there is no server any more.
    let left = home.running("msb").len();
    if left > 0 { bail!("{left} processes of msb mcp are left") } else { Ok(()) }
}

fn killed(start: &[String], home: &Home, tree: &Path) -> Result<()> {
    let mut client = command(start, home, tree).args(["hold", "mcp-gone"]).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(client.stdout.take().context("its stdout is a pipe")?).read_line(&mut line)?;
    client.kill()?;
    client.wait()?;
    if line.trim() != "ready" {
        bail!("the client said {line:?}");
    }
    suite::gone(home, "mcp-gone")
}
