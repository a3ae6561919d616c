//! `cargo xtask demo`: from a fresh machine to a running microVM, then the main commands one by one, each explained.
//!
//! It works in a home of its own (`target/demo`), so it neither sees nor touches sandboxes the user already has, and it leaves
//! nothing running. A line that does not do what its explanation says fails the demo.

use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::home::Home;
use crate::{binaries, cache, debian, images, install, kernel};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    build: binaries::Arguments,
}

/// One line of the session: what it shows, what a user types, and what must come of it.
struct Line {
    shows: &'static str,
    /// A shell line; `msb` and the image archives are found by it.
    typed: &'static str,
    /// A piece of text the output must have; empty when anything will do.
    prints: &'static str,
    code: i32,
}

const fn line(shows: &'static str, typed: &'static str, prints: &'static str, code: i32) -> Line {
    Line { shows, typed, prints, code }
}

const SESSION: &[Line] = &[
    line("what this machine can do, and which engine will be used", "msb doctor", "Engines", 0),
    line("load an image; the service starts by itself", "msb image load -i busybox.tar", "busybox", 0),
    line(
        "run one command in a fresh microVM; nothing of it is left afterwards",
        "msb run busybox echo hello",
        "hello",
        0,
    ),
    line("streams go in and out", "echo data | msb run -i busybox -- cat", "data", 0),
    line("its exit code is the command's own", "msb run busybox -- sh -c 'exit 7'", "", 7),
    line(
        "in the background, under a name",
        "msb run -d --name web busybox -- sh -c 'while :; do date; sleep 1; done'",
        "",
        0,
    ),
    line(
        "a sandbox without a command boots and waits",
        "msb create --name box -c 1 -m 256M -e A=1 --label team=ml busybox",
        "box",
        0,
    ),
    line("commands run in it, with its environment", "msb exec box -- sh -c 'echo $A; exit 7'", "1", 7),
    line("what there is, and what runs", "msb ls; msb ps", "web", 0),
    line("everything about one", "msb inspect box --format json | head -c 400; echo …", "box", 0),
    line("what the background one has printed", "msb logs --tail 3 web", "", 0),
    line(
        "files written survive a stop",
        "msb exec box -- sh -c 'echo kept > /root/note' && msb stop box && msb start box && msb exec box -- cat /root/note",
        "kept",
        0,
    ),
    line("clean up", "msb stop web box; msb rm web box; msb ps -a", "", 0),
];

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    println!("msb demo: what is missing is made now and kept; the second time only the session below runs.\n");
    debian::ensure(&[debian::BUILD, debian::IMAGES, debian::RUN])?;
    println!("1. the guest kernel: {}", kernel::built()?.display());
    let archives = images::small()?;
    println!("2. images made from Debian packages: {}", archives.display());
    let tree = cache::development_tree();
    println!("3. compiling and installing under {}", tree.display());
    install::install(&tree, arguments.build)?;
    println!("4. the session. Its service keeps everything in target/demo and is gone afterwards.\n");

    let home = Home::new("demo", &tree)?;
    for line in SESSION {
        show(&home, &archives, line)?;
    }
    drop(home);
    println!(
        "That was all. To go on by hand:\n  export PATH={}:$PATH\n  msb image load -i {}",
        tree.join("bin").display(),
        archives.join("busybox.tar").display()
    );
    Ok(())
}

/// Prints what the line shows and what is typed, runs it, prints what came, and checks it.
fn show(home: &Home, archives: &Path, line: &Line) -> Result<()> {
    println!("# {}\n$ {}", line.shows, line.typed);
    std::io::stdout().flush()?;
    let output = home
        .command("sh")
        .arg("-c")
        .arg(line.typed)
        .stderr(Stdio::inherit())
        .current_dir(archives)
        .output()
        .context("cannot start sh")?;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    match output.status.code() {
        Some(0) if line.code == 0 => println!(),
        Some(code) if code == line.code => println!("(exit code {code}, as it should be)\n"),
        other => bail!("`{}` ended with {other:?} instead of {}", line.typed, line.code),
    }
    if !text.contains(line.prints) {
        bail!("`{}` did not print \"{}\"", line.typed, line.prints);
    }
    Ok(())
}
