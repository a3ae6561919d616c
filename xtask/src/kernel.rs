//! `cargo xtask kernel`: the guest kernel from Debian's kernel source and our own configuration.
//!
//! Result: `~/.cache/msb/kernel/<key>/{vmlinux,bzImage,System.map,config}`; the key covers the configuration, the source's version
//! and the recipe below. Nothing is installed: the source package is only downloaded and unpacked. A line of `msb.config` that
//! Kconfig drops is an error here (with the source it was written for), because an option that is silently off is found
//! by users months later; `required.list` is checked against the built configuration with any source.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{cache, debian, program};

/// Raised when the way of building changes, so that old cache entries are not taken for new ones.
const RECIPE: &str = "2";

/// The source this configuration was written for, then what other releases have instead.
const SOURCES: &[&str] = &["linux-source-6.1", "linux-source-6.12", "linux-source"];

/// What is kept as it is built.
const RESULTS: &[(&str, &str)] =
    &[("bzImage", "arch/x86/boot/bzImage"), ("System.map", "System.map"), ("config", ".config")];

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Print the folder the result has or will have, and build nothing
    #[arg(long)]
    key: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.key {
        println!("{}", cache::root()?.join("kernel").join(plan()?.key).display());
        return Ok(());
    }
    println!("{}", built()?.display());
    Ok(())
}

/// Which kernel this tree wants.
struct Plan {
    source: &'static str,
    version: String,
    key: String,
}

fn plan() -> Result<Plan> {
    let folder = cache::repository().join("guest/kernel");
    let config = std::fs::read(folder.join("msb.config")).context("cannot read guest/kernel/msb.config")?;
    let key = |version: &str| cache::key([config.as_slice(), version.as_bytes(), RECIPE.as_bytes()]);
    let (source, version) = debian::first_known(SOURCES)?;
    Ok(Plan { key: key(&version), source, version })
}

/// The folder of the built kernel; builds it when the cache has none.
///
/// # Errors
///
/// When the source cannot be had, an option was lost, or the build fails (its log is named).
pub(crate) fn built() -> Result<PathBuf> {
    let plan = plan()?;
    let entry = cache::root()?.join("kernel").join(&plan.key);
    if !entry.is_dir() {
        debian::ensure(&[debian::KERNEL])?;
    }
    let place = cache::entry("kernel", &plan.key, |result| build(&plan, result))?;
    // The list may have grown since this kernel was built.
    check_required(&std::fs::read_to_string(place.join("config"))?)?;
    Ok(place)
}

fn build(plan: &Plan, result: &Path) -> Result<()> {
    println!("guest kernel: {} {} is not in the cache, building it (5 to 10 minutes)", plan.source, plan.version);
    let root = cache::root()?;
    std::fs::create_dir_all(root.join("work"))?;
    let work = tempfile::Builder::new().prefix("kernel-").tempdir_in(root.join("work"))?;
    let log = root.join(format!("log/kernel-{}.log", plan.key));

    let package = debian::download(real_package(plan.source)?.as_str(), work.path())?;
    debian::unpack(&package, work.path())?;
    std::fs::remove_file(&package)?;
    let archive = std::fs::read_dir(work.path().join("usr/src"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.to_string_lossy().ends_with(".tar.xz"))
        .context("the source package holds no .tar.xz")?;
    program::run_logged(
        "unpacking the source",
        program::command("tar")
            .arg("-xJf")
            .arg(&archive)
            .arg("-C")
            .arg(work.path())
            .arg("--one-top-level=source")
            .arg("--strip-components=1"),
        &log,
    )?;
    let source = work.path().join("source");

    let configuration = cache::repository().join("guest/kernel/msb.config");
    let make = || {
        let mut make = program::command("make");
        // The same source and configuration give the same bytes.
        make.current_dir(&source)
            .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01")
            .env("KBUILD_BUILD_USER", "msb")
            .env("KBUILD_BUILD_HOST", "msb")
            .env("KCONFIG_ALLCONFIG", &configuration);
        make
    };
    program::run_logged("configuring", make().arg("allnoconfig"), &log)?;
    let config = std::fs::read_to_string(source.join(".config"))?;
    check_required(&config)?;
    let lost = lost_options(&std::fs::read_to_string(&configuration)?, &config);
    if !lost.is_empty() {
        let list = lost.join("\n  ");
        if plan.source == SOURCES[0] {
            bail!(
                "guest/kernel/msb.config asks for options that this source drops (wrong name, or a dependency is off):\n  {list}"
            );
        }
        println!("  this source drops options of msb.config that are not required:\n  {list}");
    }
    let jobs = std::thread::available_parallelism().map_or(2, usize::from);
    program::run_logged("compiling", make().arg(format!("-j{jobs}")).args(["vmlinux", "bzImage"]), &log)?;
    add_relocations(&source, &result.join("vmlinux"))?;
    for (name, built) in RESULTS {
        std::fs::copy(source.join(built), result.join(name)).with_context(|| format!("the build made no {built}"))?;
    }
    Ok(())
}

/// Copies vmlinux with the table that its bzImage is moved by as a section, so that our loader can move it (docs/kernel.md), in place of the
/// linker's relocations, which are thirty times as long.
fn add_relocations(source: &Path, result: &Path) -> Result<()> {
    let table = source.join("arch/x86/boot/compressed/vmlinux.relocs");
    program::output(
        program::command("objcopy")
            .arg("--remove-section=.rela*")
            .arg(format!("--add-section=.vmlinux.relocs={}", table.display()))
            .arg(source.join("vmlinux"))
            .arg(result),
    )
    .map(|_| ())
}

/// `linux-source` only depends on the package that holds the source; the others hold it themselves.
fn real_package(name: &str) -> Result<String> {
    if name != "linux-source" {
        return Ok(name.to_owned());
    }
    let text = program::output(program::command("apt-cache").args(["depends", name]))?;
    text.lines()
        .find_map(|line| line.trim().strip_prefix("Depends: linux-source-"))
        .map(|version| format!("linux-source-{version}"))
        .context("linux-source depends on no linux-source-VERSION")
}

/// Fails, naming each, when an option of `required.list` is not on in this configuration.
fn check_required(config: &str) -> Result<()> {
    let list = cache::repository().join("guest/kernel/required.list");
    let list = std::fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
    let lost = lost_options(&list, config);
    if !lost.is_empty() {
        bail!("the built kernel lacks options that guest/kernel/required.list demands:\n  {}", lost.join("\n  "));
    }
    Ok(())
}

/// The settings of `wanted` (lines `CONFIG_X=…` or `# CONFIG_X is not set`) that `config` does not hold as they stand.
/// An option that is wanted off may also be absent.
fn lost_options(wanted: &str, config: &str) -> Vec<String> {
    let held: BTreeSet<&str> = config.lines().map(str::trim).collect();
    let mut lost = Vec::new();
    for line in wanted.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("# ").and_then(|rest| rest.strip_suffix(" is not set")) {
            if held.iter().any(|line| line.starts_with(&format!("{name}="))) {
                lost.push(format!("{name} must be off"));
            }
        } else if line.starts_with("CONFIG_") && !held.contains(line) {
            lost.push(line.to_owned());
        }
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_options_names_what_was_dropped_or_left_on() {
        let wanted = "# a comment\nCONFIG_A=y\nCONFIG_B=\"x\"\nCONFIG_GONE=y\n# CONFIG_LOOP is not set\n# CONFIG_OFF is not set\n";
        let config = "CONFIG_A=y\nCONFIG_B=\"x\"\nCONFIG_LOOP=y\n# CONFIG_GONE is not set\n";
        assert_eq!(lost_options(wanted, config), ["CONFIG_GONE=y", "CONFIG_LOOP must be off"]);
    }

    #[test]
    fn every_required_option_is_asked_for_or_implied_by_one() {
        // The two files are edited apart; a name with a typing error would never be found on.
        let folder = cache::repository().join("guest/kernel");
        let required = std::fs::read_to_string(folder.join("required.list")).expect("required.list");
        for line in required.lines().filter(|line| line.starts_with("CONFIG_")) {
            assert!(line.ends_with("=y"), "{line}");
        }
    }
}
