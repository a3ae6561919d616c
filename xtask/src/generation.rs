//! Programs of earlier generations, against which the upgrade is tested: a machine that was started by an older service with an older
//! `msb-vmm` and an older agent goes on under the new one.
//!
//! ```text
//! ~/.cache/msb/generation/guest-G-vmm-V/{bin/{msb,msbd,msb-vmm},share/msb/…}    one tree for each pair of generations that CI has tested here
//! ~/.cache/msb/generation/agent-KEY/initramfs.cpio                          the agent of generation 1, compiled from its last commit
//! ```
//!
//! Called by `cargo xtask test`. What a run has tested is kept when it has passed, so the first run after a generation was raised finds the
//! one before it. A machine that is new has only what can be compiled from the repository's history.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{binaries, cache, initramfs, program};

/// The last commit whose agent speaks generation 1 of the guest border.
const FIRST_AGENT: &str = "6e72a81";

/// The pair of generations of this tree, after `protocol/src/version.rs`.
fn current() -> Result<String> {
    let path = cache::repository().join("protocol/src/version.rs");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    pair(&text).with_context(|| format!("{} names no generations", path.display()))
}

fn pair(text: &str) -> Option<String> {
    let number = |name: &str| -> Option<u32> {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("pub const {name}: u32 = ")))?;
        line.strip_suffix(';')?.parse().ok()
    };
    Some(format!("guest-{}-vmm-{}", number("GUEST_GENERATION")?, number("VMM_GENERATION")?))
}

/// Keeps what was tested, once for each pair of generations.
pub(crate) fn keep(tree: &Path) -> Result<()> {
    cache::entry("generation", &current()?, |folder| {
        for part in ["bin", "share"] {
            program::output(program::command("cp").arg("--recursive").arg(tree.join(part)).arg(folder.join(part)))?;
        }
        // Nothing that an upgrade leaves running.
        Ok(std::fs::remove_file(folder.join("bin/msb-metrics"))?)
    })?;
    Ok(())
}

/// The kept trees of other generations than this one.
pub(crate) fn earlier() -> Result<Vec<PathBuf>> {
    let (folder, own) = (cache::root()?.join("generation"), current()?);
    let mut trees: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("guest-") && name != own.as_str())
        })
        .collect();
    trees.sort();
    Ok(trees)
}

/// The initramfs with the agent of generation 1, compiled once, where the repository has its history.
pub(crate) fn first_agent() -> Result<PathBuf> {
    let compiler = program::output(program::command("rustc").arg("--version"))?;
    let key = cache::key([FIRST_AGENT, &compiler].map(str::as_bytes));
    let place = cache::entry("generation", &format!("agent-{key}"), |folder| {
        let (source, target) = (folder.join("source"), folder.join("target"));
        std::fs::create_dir(&source)?;
        let archive = folder.join("source.tar");
        let mut git = program::command("git");
        git.args(["archive", "--format=tar", "--output"]).arg(&archive).arg(FIRST_AGENT);
        if program::output(&mut git).is_err() {
            bail!("the repository has no history that reaches back to {FIRST_AGENT}");
        }
        program::output(program::command("tar").arg("-xf").arg(&archive).arg("-C").arg(&source))?;
        let mut cargo = binaries::cargo();
        cargo
            .args(["build", "--locked", "--profile", "vm", "--target", binaries::TARGET])
            .args(["--package", "msb-guest", "--bin", "msb-agent"])
            .current_dir(&source)
            .env("CARGO_TARGET_DIR", &target)
            .env("RUSTFLAGS", "-C target-feature=+crt-static");
        let log = cache::root()?.join("log/generation.log");
        program::run_logged("compiling the agent of generation 1", &mut cargo, &log)?;
        let stripped = folder.join("msb-agent");
        let agent = target.join(binaries::TARGET).join("vm/msb-agent");
        program::output(program::command("strip").arg("-o").arg(&stripped).arg(agent))?;
        initramfs::write(&stripped, &folder.join("initramfs.cpio"))?;
        for unused in [source, target] {
            std::fs::remove_dir_all(unused)?;
        }
        for unused in [archive, stripped] {
            std::fs::remove_file(unused)?;
        }
        Ok(())
    })?;
    Ok(place.join("initramfs.cpio"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pair_is_read_from_the_source() {
        let text = "/// x\npub const GUEST_GENERATION: u32 = 3;\npub const GUEST_GENERATION_MIN: u32 = 1;\npub const VMM_GENERATION: u32 = 2;\n";
        assert_eq!(pair(text).as_deref(), Some("guest-3-vmm-2"));
        assert_eq!(pair("pub const GUEST_GENERATION: u32 = x;"), None);
        assert!(current().is_ok());
    }
}
