//! The tier `sdk`: one suite of calls and expectations (`sdk/conformance/suite.json`) through every SDK, against one real service with
//! real sandboxes; then the quickstarts of `docs/sdk/` as they stand there; then `msb mcp`, asked by an MCP client that is not ours.
//!
//! Each SDK has a driver beside it, which carries calls out and judges nothing. What is expected is compared here, once for all.

mod hostile;
mod mcp;
pub(crate) mod measure;
mod registry;
mod suite;
mod toolchain;
mod trees;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::home::Home;
use crate::{binaries, cache, debian, images, install, program};
use registry::Registry;
use toolchain::Toolchain;

/// An SDK: how its driver and its quickstart are started.
pub(crate) struct Sdk {
    /// Its language, lower case.
    name: &'static str,
    driver: Vec<String>,
    quickstart: Option<Vec<String>>,
}

/// Everything built: the programs, the test images, a driver for each SDK.
pub(crate) struct Built {
    tree: PathBuf,
    archives: PathBuf,
    sdks: Vec<Sdk>,
    /// What starts the MCP client.
    mcp: Vec<String>,
}

impl Built {
    /// Builds it; of the SDKs only those whose name has this text in it, if one is given.
    pub(crate) fn ensure(build: binaries::Arguments, filter: Option<&str>) -> Result<Self> {
        debian::ensure(&[debian::RUN])?;
        let tools = Toolchain::ensure()?;
        let tree = cache::development_tree();
        install::install(&tree, build)?;
        let archives = images::small()?;
        let wanted = |name: &str| filter.is_none_or(|text| name.contains(text));
        let mut sdks = Vec::new();
        if wanted("rust") {
            sdks.push(rust(build)?);
        }
        if wanted("python") {
            sdks.push(python(&tools)?);
        }
        let mut mcp = Vec::new();
        if wanted("typescript") || wanted("mcp") {
            let (sdk, client) = typescript(&tools)?;
            if wanted("typescript") {
                sdks.push(sdk);
            }
            if wanted("mcp") {
                mcp = client;
            }
        }
        if wanted("go") {
            sdks.push(go(&tools)?);
        }
        Ok(Self { tree, archives, sdks, mcp })
    }
}

/// Runs everything, or what the filter leaves; fails with the names of the cases that failed.
pub(crate) fn run(build: binaries::Arguments, filter: Option<&str>) -> Result<()> {
    let Built { tree, archives, sdks, mcp } = Built::ensure(build, filter)?;
    let home = Home::new("sdk-home", &tree)?;
    let mut failed = Vec::new();
    let work = tempfile::Builder::new().prefix("msb-sdk-").tempdir_in(cache::target())?;
    let registry = Registry::of(&archives.join("busybox-oci.tar"), &work.path().join("registry"))?;
    std::fs::create_dir(work.path().join("tree"))?;
    trees::make(&work.path().join("tree"))?;
    trees::unpack(&archives.join("busybox.tar"), &work.path().join("rootfs"))?;
    std::fs::write(work.path().join("rootfs/marker"), "outside\n")?;
    let place =
        suite::Place { home: &home, tree: &tree, archives: &archives, work: work.path(), registry: &registry.host };
    for sdk in &sdks {
        failed.extend(suite::run(sdk, &place)?);
        if let Some(words) = &sdk.quickstart {
            let mut command = home.command(&words[0]);
            command.args(&words[1..]).current_dir(&archives);
            if let Err(error) = program::run(&mut command) {
                failed.push(format!("{}: quickstart of docs/sdk: {error}", sdk.name));
            }
        }
    }
    if !mcp.is_empty() {
        failed.extend(mcp::run(&mcp, &home, &tree, &archives)?);
    }
    if !failed.is_empty() {
        bail!("{}", failed.join("\n"));
    }
    Ok(())
}

/// A folder of this tier under cargo's target folder.
fn stage(name: &str) -> Result<PathBuf> {
    let folder = cache::target().join("sdk").join(name);
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// The one block of code of a quickstart.
fn quickstart(language: &str, fence: &str) -> Result<String> {
    let path = cache::repository().join(format!("docs/sdk/{language}.md"));
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let open = format!("\n```{fence}\n");
    text.split_once(&open)
        .and_then(|(_, rest)| rest.split_once("\n```"))
        .map(|(code, _)| format!("{code}\n"))
        .with_context(|| format!("{} has no block of {fence}", path.display()))
}

fn words(parts: &[&Path]) -> Vec<String> {
    parts.iter().map(|part| part.to_string_lossy().into_owned()).collect()
}

/// The driver is compiled as the programs are, so that what is measured with it is what users have.
fn rust(build: binaries::Arguments) -> Result<Sdk> {
    let (profile, folder) = if build.fast { ("dev", "debug") } else { ("release", "release") };
    program::run(
        binaries::cargo()
            .args(["build", "--locked", "--package", "msb-sdk", "--examples"])
            .args(["--profile", profile]),
    )?;
    let driver = cache::target().join(folder).join("examples/conformance");
    // Cargo compiles files, so this one is in the tree, and must be what the page says.
    let code = std::fs::read_to_string(cache::repository().join("sdk/rust/examples/quickstart.rs"))?;
    if quickstart("rust", "rust")? != code {
        bail!("the code of docs/sdk/rust.md is not sdk/rust/examples/quickstart.rs");
    }
    let code = driver.with_file_name("quickstart");
    Ok(Sdk { name: "rust", driver: words(&[&driver]), quickstart: Some(words(&[&code])) })
}

fn python(tools: &Toolchain) -> Result<Sdk> {
    let source = cache::repository().join("sdk/python");
    let folder = stage("python")?;
    let code = folder.join("quickstart.py");
    std::fs::write(&code, quickstart("python", "python")?)?;
    // A copy, so that building leaves nothing in the repository.
    let copy = folder.join("source");
    copy_tree(&source, &copy)?;
    let mut wheel = tools.python_command();
    wheel.args(["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]);
    program::run(wheel.arg(&folder).arg(&copy))?;
    let wheel = folder.join("msb-0.1.0-py3-none-any.whl");
    let driver = source.join("tests/conformance.py");
    let mut check = tools.python_command();
    check
        .args(["-m", "mypy", "--strict", "--cache-dir"])
        .arg(folder.join("mypy"))
        .args(["-p", "msb"])
        .env("MYPYPATH", copy.join("src"));
    program::run(&mut check)?;
    let mut units = tools.python_command();
    program::run(units.arg(source.join("tests/units.py")).arg("--quiet").env("PYTHONPATH", &wheel))?;
    let path = format!("PYTHONPATH={}", wheel.display());
    let start = |script: &Path| {
        let mut start = vec!["/usr/bin/env".to_owned(), path.clone()];
        start.extend(words(&[&tools.python, script]));
        start
    };
    Ok(Sdk { name: "python", driver: start(&driver), quickstart: Some(start(&code)) })
}

/// The SDK, and what starts the MCP client.
fn typescript(tools: &Toolchain) -> Result<(Sdk, Vec<String>)> {
    let source = cache::repository().join("sdk/typescript");
    let folder = stage("typescript")?;
    for part in ["package.json", "tsconfig.json", "src", "conformance"] {
        copy_tree(&source.join(part), &folder.join(part))?;
    }
    std::fs::write(folder.join("conformance/quickstart.ts"), quickstart("typescript", "ts")?)?;
    let modules = folder.join("node_modules");
    let _ = std::fs::remove_file(&modules);
    std::os::unix::fs::symlink(&tools.node_modules, &modules)?;
    for project in ["tsconfig.json", "conformance/tsconfig.json"] {
        let mut compile = Command::new(&tools.node);
        compile.arg(tools.node_modules.join("typescript/bin/tsc")).args(["-p", project]).current_dir(&folder);
        program::run(&mut compile)?;
    }
    let start = |script: &str| words(&[&tools.node, &folder.join("conformance/dist").join(script)]);
    let sdk = Sdk { name: "typescript", driver: start("driver.js"), quickstart: Some(start("quickstart.js")) };
    Ok((sdk, start("mcp.js")))
}

fn go(tools: &Toolchain) -> Result<Sdk> {
    let source = cache::repository().join("sdk/go");
    let folder = stage("go")?;
    let with = |go: &Path, words: &[&str]| {
        let mut command = Command::new(go);
        command.args(words).current_dir(&source).env("GOTOOLCHAIN", "local").env("GOFLAGS", "-mod=mod");
        command
    };
    let go = |words: &[&str]| with(&tools.go, words);
    for release in std::iter::once(&tools.go).chain(&tools.more_go) {
        program::run(&mut with(release, &["vet", "./..."]))?;
    }
    let driver = folder.join("conformance");
    program::run(go(&["build", "-o"]).arg(&driver).arg("./internal/conformance"))?;
    let example = folder.join("example");
    std::fs::create_dir_all(&example)?;
    std::fs::write(example.join("main.go"), quickstart("go", "go")?)?;
    let module = format!(
        "module example\n\ngo 1.25\n\nrequire github.com/msb-project/msb/sdk/go v0.0.0\n\nreplace github.com/msb-project/msb/sdk/go => {}\n",
        source.display()
    );
    std::fs::write(example.join("go.mod"), module)?;
    let code = folder.join("quickstart");
    program::run(go(&["build", "-o"]).arg(&code).arg(".").current_dir(&example))?;
    Ok(Sdk { name: "go", driver: words(&[&driver]), quickstart: Some(words(&[&code])) })
}

/// Copies a file or a folder.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    if from.is_file() {
        std::fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
        return Ok(());
    }
    let skipped = ["node_modules", "dist", "build", "__pycache__", ".mypy_cache"];
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let name = entry?.file_name();
        if !skipped.iter().any(|skip| name.as_os_str() == *skip) {
            copy_tree(&from.join(&name), &to.join(&name))?;
        }
    }
    Ok(())
}
