//! The figures of supervision: a real msbd with two hundred sandboxes whose machines are [`xtask-machine`](../../machine/main.rs). What it
//! costs while nothing happens, how soon it has them all again after a `kill -9`, and how soon a crash is answered.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::metrics::{share, tree_with_machines};
use super::{Row, median, memory_mib, succeed, timed};
use crate::home::Home;
use crate::{cache, images};

/// Simulated sandboxes.
const SANDBOXES: usize = 200;
/// The daemon's memory is looked at with so many, too.
const FEW: usize = 20;
/// The first wait of a restart, which is not part of what is measured.
const BACK_OFF: Duration = Duration::from_millis(100);

/// Measures all rows.
pub(super) fn rows(tree: &Path, rounds: usize) -> Result<Vec<Row>> {
    let work = tempfile::Builder::new().prefix("bench-supervision-").tempdir_in(cache::target())?;
    let tree = tree_with_machines(tree, work.path())?;
    let home = Home::new("bench-supervision", &tree)?;
    // A machine here sends no samples at this interval: what metrics cost stands among their own figures.
    std::fs::write(home.path().join("config.toml"), "[metrics]\nsample_interval = \"10s\"\n")?;
    let archive = images::small()?.join("busybox.tar");
    succeed(&mut home.msb(&["image", "load", "-q", "-i", &archive.to_string_lossy()]))?;
    let daemon = || home.running("msbd").first().copied().context("the daemon does not run");
    let (mut with_few, mut creations) = (0.0, Vec::new());
    for number in 0..SANDBOXES {
        if number == FEW {
            with_few = memory_mib(daemon()?, &["Rss:"])?;
        }
        let name = format!("s{number}");
        let mut create = home.msb(&["create", "-q", "-m", "64M", "--name", &name, "busybox"]);
        creations.push(timed(&mut create, Some(0))?);
        print!("\rsimulated sandbox {} of {SANDBOXES}", number + 1);
        std::io::stdout().flush()?;
    }
    println!();
    let grown = memory_mib(daemon()?, &["Rss:"])? - with_few;
    let each_kib = grown * 1024.0 / (SANDBOXES - FEW) as f64;
    let (first, last) = (creations[..FEW].to_vec(), creations[SANDBOXES - FEW..].to_vec());
    println!(
        "memory of msbd for each sandbox: {each_kib:.0} KiB; `msb create`: {} ms with none, {} ms with {SANDBOXES} (medians of {FEW})",
        median(first).as_millis(),
        median(last).as_millis(),
    );
    let idle = share(&[daemon()?])?[0];
    let adoption = (0..rounds).map(|_| adoption(&home)).collect::<Result<Vec<_>>>()?;
    let restart = (0..rounds.max(10)).map(|_| restart(&home)).collect::<Result<Vec<_>>>()?;
    let longest = |times: &[Duration]| times.iter().copied().max().unwrap_or_default();
    let (slowest_adoption, slowest_restart) = (longest(&adoption), longest(&restart));
    Ok(vec![
        Row {
            what: format!("msbd with {SANDBOXES} sandboxes that only beat: processor"),
            measured: format!("{:.2} % of a core", idle * 100.0),
            promise: "under 0.5 % of a core",
            holds: idle < 0.005,
        },
        Row {
            what: format!("from kill -9 of msbd to the first answer, {SANDBOXES} re-adopted"),
            measured: format!("{} ms; at most {} ms", median(adoption).as_millis(), slowest_adoption.as_millis()),
            promise: "under 1 s",
            holds: slowest_adoption < Duration::from_secs(1),
        },
        Row {
            what: "from kill -9 of a machine to its next process, less the back-off".to_owned(),
            measured: format!("{} ms; at most {} ms", median(restart).as_millis(), slowest_restart.as_millis()),
            promise: "under 150 ms",
            holds: slowest_restart < Duration::from_millis(150),
        },
    ])
}

/// Kills the daemon; the next command starts another one, which answers once it knows of every sandbox whether its machine is still there.
fn adoption(home: &Home) -> Result<Duration> {
    let machines = home.running("msb-vmm").len();
    let daemon = home.running("msbd").first().copied().and_then(Pid::from_raw).context("the daemon does not run")?;
    kill_process(daemon, Signal::KILL)?;
    let began = Instant::now();
    let listed = crate::program::output(&mut home.msb(&["ps", "-q"]))?;
    let took = began.elapsed();
    if listed.lines().count() != machines {
        bail!("{} of {machines} sandboxes run after the daemon was killed", listed.lines().count());
    }
    Ok(took)
}

/// Kills one machine that this daemon has found or made, and waits for the next child of the daemon's.
fn restart(home: &Home) -> Result<Duration> {
    let victim = home.running("msb-vmm").first().copied().and_then(Pid::from_raw).context("no machine runs")?;
    let daemon = home.running("msbd").first().copied().context("the daemon does not run")?;
    let before = children(daemon)?;
    let began = Instant::now();
    kill_process(victim, Signal::KILL)?;
    while children(daemon)?.iter().all(|child| before.contains(child)) {
        if began.elapsed() > Duration::from_secs(60) {
            bail!("a killed machine is not started again");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let took = began.elapsed().saturating_sub(BACK_OFF);
    // The next one begins when this one runs again.
    std::thread::sleep(Duration::from_millis(500));
    Ok(took)
}

/// What the threads of a process have started and is still there.
fn children(process: i32) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{process}/task"))?.flatten() {
        // A thread that has ended meanwhile has no children.
        let text = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(text.split_whitespace().filter_map(|word| word.parse::<i32>().ok()));
    }
    Ok(found)
}
