//! `cargo xtask inside`: whole programs inside a guest, as their users run them: Docker with a container of its own, and sudo under two
//! security profiles. Called by people and by the soak; some minutes under software emulation.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::home::Home;
use crate::{binaries, cache, debian, images, install, program};

/// Time for dockerd to answer, however slow the emulation is.
const DOCKER_START_LIMIT: Duration = Duration::from_secs(300);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Programs that are installed already, in place of building this tree's: a folder with bin/ and share/
    #[arg(long, value_name = "FOLDER")]
    tree: Option<std::path::PathBuf>,
    #[command(flatten)]
    build: binaries::Arguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    debian::ensure(&[debian::BUILD, debian::RUN])?;
    let tree = match &arguments.tree {
        Some(tree) => std::fs::canonicalize(tree)?,
        None => {
            let tree = cache::development_tree();
            install::install(&tree, arguments.build)?;
            tree
        }
    };
    let (tools, small) = (images::tools()?.join("tools.tar"), images::small()?);
    let home = Home::new("inside", &tree)?;
    say(&home, &["image", "load", "-q", "-i", &tools.to_string_lossy()])?;
    sudo(&home)?;
    docker(&home, &small)
}

/// Runs `msb` with these words, shows what it printed, and wants it to succeed.
fn say(home: &Home, words: &[&str]) -> Result<String> {
    println!("$ msb {}", words.join(" "));
    let printed = program::output(&mut home.msb(words))?;
    print!("{printed}");
    if !printed.is_empty() && !printed.ends_with('\n') {
        println!();
    }
    Ok(printed)
}

/// Runs `msb` with these words and wants it to fail; what it said.
fn fail(home: &Home, words: &[&str]) -> Result<String> {
    println!("$ msb {}", words.join(" "));
    let ended = home.msb(words).output()?;
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    print!("{said}");
    if ended.status.success() {
        bail!("it succeeded");
    }
    Ok(said)
}

fn expect(printed: &str, what: &str) -> Result<()> {
    if printed.contains(what) {
        return Ok(());
    }
    bail!("it printed {printed:?} and not {what:?}");
}

fn sudo(home: &Home) -> Result<()> {
    let who = ["-u", "app", "tools", "--", "sudo", "-n", "id", "-u"];
    expect(&say(home, &[&["run", "-m", "512M"][..], &who].concat())?, "0\n")?;
    // Asked for by name it is refused before a machine is made; behind a shell the kernel refuses it.
    let refused = fail(home, &[&["run", "-m", "512M", "--security", "restricted"][..], &who].concat())?;
    expect(&refused, "sudo cannot work with --security restricted")?;
    let hidden = ["-u", "app", "tools", "--", "sh", "-c", "sudo -n id -u; exit $?"];
    let refused = fail(home, &[&["run", "-m", "512M", "--security", "restricted"][..], &hidden].concat())?;
    expect(&refused, "no new privileges")
}

fn docker(home: &Home, archives: &Path) -> Result<()> {
    let mount = format!("{}:/archives:ro", archives.display());
    let machine = ["run", "-d", "--name", "box", "-c", "2", "-m", "2G", "-v", &mount];
    let disk = ["--mount-named", "docker:/var/lib/docker:kind=disk,size=4G"];
    say(home, &[&machine[..], &disk, &["tools", "--", "dockerd"]].concat())?;
    let began = Instant::now();
    while !home.msb(&["exec", "box", "--", "docker", "info"]).output()?.status.success() {
        if began.elapsed() > DOCKER_START_LIMIT {
            let logs = program::output(&mut home.msb(&["logs", "--tail", "40", "box"]))?;
            bail!("dockerd does not answer:\n{logs}");
        }
        std::thread::sleep(Duration::from_secs(2));
    }
    println!("dockerd answered after {} s", began.elapsed().as_secs());
    expect(
        &say(home, &["exec", "box", "--", "docker", "info", "--format", "{{.Driver}} {{.CgroupVersion}}"])?,
        "overlay2 2",
    )?;
    expect(&say(home, &["exec", "box", "--", "docker", "load", "-i", "/archives/busybox.tar"])?, "busybox:latest")?;
    let line = "echo hello from a container; ip -4 addr show eth0 | grep -c inet";
    let printed = say(home, &["exec", "box", "--", "docker", "run", "--rm", "busybox", "sh", "-c", line])?;
    expect(&printed, "hello from a container\n1\n").context("a container on Docker's bridge")?;
    let build = "mkdir /b && printf 'FROM busybox\\nRUN echo built > /made\\n' > /b/Dockerfile && \
                 DOCKER_BUILDKIT=0 docker build -q -t made /b && docker run --rm made cat /made";
    expect(&say(home, &["exec", "box", "--", "sh", "-c", build])?, "built\n")?;
    say(home, &["stop", "box"])?;
    // What Docker keeps is on a volume, so it is there for the next machine.
    say(home, &["start", "box"])?;
    let again = "until docker info >/dev/null 2>&1; do sleep 1; done; docker image ls --format '{{.Repository}}'";
    let printed = say(home, &["exec", "--timeout", "300s", "box", "--", "sh", "-c", again])?;
    expect(&printed, "made")?;
    say(home, &["rm", "-f", "box"]).map(drop)
}
