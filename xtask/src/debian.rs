//! Debian packages: which ones a chore needs, why, and how to get them.
//!
//! Two roads: [`ensure`] installs programs (as root or through sudo, never asking), and [`download`] fetches a package only to read
//! files out of it, which needs no root and changes nothing on the machine.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::program;

/// A package, the file or program that shows it is there, and the reason it is wanted.
pub(crate) struct Package {
    name: &'static str,
    /// A program on the path, or an absolute path.
    evidence: &'static str,
    why: &'static str,
}

const fn package(name: &'static str, evidence: &'static str, why: &'static str) -> Package {
    Package { name, evidence, why }
}

/// What compiling the programs needs beside cargo.
pub(crate) const BUILD: &[Package] = &[
    package("gcc", "cc", "links programs and compiles the C parts of some libraries"),
    package("libc6-dev", "/usr/lib/x86_64-linux-gnu/libc.a", "the C library, static for msb-vmm and msb-agent"),
    package("binutils", "strip", "takes symbols out of installed programs"),
    package("e2fsprogs", "mke2fs", "makes the template of the writable disk, once"),
    package("zstd", "zstd", "packs one layer of the test images"),
];

/// What building the guest kernel needs.
pub(crate) const KERNEL: &[Package] = &[
    package("gcc", "gcc", "compiles the kernel"),
    package("libc6-dev", "/usr/include/stdio.h", "the kernel's build compiles its own tools"),
    package("make", "make", "drives the kernel's build"),
    package("bc", "bc", "the kernel's build computes with it"),
    package("bison", "bison", "the kernel's configuration parser"),
    package("flex", "flex", "the kernel's configuration scanner"),
    package("libelf-dev", "/usr/include/libelf.h", "objtool checks the compiled kernel's mitigations"),
    package("lz4", "lz4", "compresses bzImage"),
    package("xz-utils", "xz", "unpacks the kernel's source"),
];

/// What making the images needs.
pub(crate) const IMAGES: &[Package] = &[
    package("debootstrap", "debootstrap", "makes the root of the python image"),
    package("zstd", "zstd", "packs one layer of the test images"),
];

/// What running sandboxes needs on a machine without usable KVM.
pub(crate) const RUN: &[Package] =
    &[package("qemu-system-x86", "qemu-system-x86_64", "the engine that works on any Linux machine")];

/// What building and checking the Python SDK needs; pip brings the rest.
pub(crate) const PYTHON: &[Package] = &[
    package("python3", "python3", "runs the Python SDK"),
    package("python3-venv", "/usr/share/doc/python3-venv", "keeps the SDK's tools apart from the system's"),
];

/// What only tests use: independent programs that check our results.
pub(crate) const CHECK: &[Package] = &[
    package("erofs-utils", "fsck.erofs", "checks the root images we write"),
    package("umoci", "umoci", "unpacks the same layers for comparison"),
    package("skopeo", "skopeo", "reads and converts the same images"),
    package("buildah", "buildah", "makes archives as podman does"),
    package("attr", "setfattr", "gives the files of those archives attributes"),
    package("acl", "setfacl", "gives the files of those archives access lists"),
    package("docker-registry", "docker-registry", "the registry that images are pulled from"),
    package("apache2-utils", "htpasswd", "the password file of that registry"),
    package("openssl", "openssl", "the certificates of that registry"),
    package("cpio", "cpio", "reads the initramfs we write"),
    package("busybox-static", "/bin/busybox", "the programs inside the lab's machine"),
];

/// What fuzzing needs: libFuzzer comes as C++ source.
pub(crate) const FUZZ: &[Package] = &[package("g++", "g++", "compiles libFuzzer")];

/// What whole-system cases use beside the product.
pub(crate) const SYSTEM: &[Package] = &[package("tmux", "tmux", "the terminal whose screen a case reads")];

/// The clients that people use with sandboxes, against which tests hold our servers.
pub(crate) const CLIENTS: &[Package] = &[
    package("openssh-client", "ssh", "logs in, copies and forwards through the sandbox's SSH server"),
    package("rsync", "rsync", "copies over SSH"),
    package("curl", "curl", "speaks through a forwarded SOCKS port"),
    package("sshfs", "sshfs", "mounts a sandbox's directory over SSH"),
    package("iproute2", "ip", "makes the network that a sandbox of a test is in"),
];

/// What measures traffic, here and in a sandbox.
pub(crate) const TRAFFIC: &[Package] = &[package("iperf3", "iperf3", "sends and counts what is forwarded")];

/// What makes networks of our own to measure in.
pub(crate) const NAMESPACES: &[Package] = &[package("iproute2", "ip", "makes network namespaces and what joins them")];

/// What the benchmark of disks works on, and how it sees which programs a create starts.
pub(crate) const DISKS: &[Package] = &[
    package("git", "git", "makes the repository that guests clone"),
    package("strace", "strace", "shows which programs a create starts"),
];

/// What the programs need that watch our metrics.
pub(crate) const OBSERVE: &[Package] = &[
    package("python3", "python3", "runs what decodes metrics with the official definitions"),
    package("python3-venv", "/usr/share/python-wheels", "brings pip, which fetches a collector into the cache"),
];

/// All of them.
pub(crate) const EVERYTHING: &[&[Package]] =
    &[BUILD, KERNEL, IMAGES, RUN, CHECK, CLIENTS, TRAFFIC, SYSTEM, FUZZ, OBSERVE];

/// Installs what is missing of these groups, saying which and why; does nothing and says nothing when all is there.
///
/// # Errors
///
/// When something is missing and cannot be installed: not Debian, no root, or apt's own reason.
pub(crate) fn ensure(groups: &[&'static [Package]]) -> Result<()> {
    let missing = missing(groups);
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    println!("Debian packages this needs and this machine lacks:");
    for package in &missing {
        println!("  {:<18} {}", package.name, package.why);
    }
    if !program::is_installed("apt-get") {
        bail!("this is not a Debian or Ubuntu machine; install by hand what provides: {}", names.join(" "));
    }
    if !program::can_become_root() {
        bail!("installing needs root; run: apt-get install --no-install-recommends {}", names.join(" "));
    }
    let log = crate::cache::root()?.join("log/apt.log");
    update_lists_if_unknown(&names, &log)?;
    let mut install = program::command_as_root("apt-get")?;
    install.env("DEBIAN_FRONTEND", "noninteractive").args(["install", "--yes", "--no-install-recommends"]).args(&names);
    program::run_logged("installing them", &mut install, &log)?;
    let still: Vec<&str> = self::missing(groups).iter().map(|package| package.name).collect();
    if !still.is_empty() {
        bail!("apt installed them, but their files are not where expected: {}", still.join(" "));
    }
    Ok(())
}

/// The packages of these groups whose evidence is not on this machine, each once.
fn missing(groups: &[&'static [Package]]) -> Vec<&'static Package> {
    let mut missing: Vec<&Package> = Vec::new();
    for package in groups.iter().flat_map(|group| group.iter()) {
        let there = if package.evidence.starts_with('/') {
            Path::new(package.evidence).exists()
        } else {
            program::is_installed(package.evidence)
        };
        if !there && missing.iter().all(|other| other.name != package.name) {
            missing.push(package);
        }
    }
    missing
}

/// The version apt would install, or `None` when it knows no such package.
pub(crate) fn candidate(name: &str) -> Option<String> {
    let text = program::output(program::command("apt-cache").args(["policy", name])).ok()?;
    let version = text.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_owned())
}

/// The first of these packages that apt knows, with its version; asks for fresh lists when it knows none of them.
///
/// # Errors
///
/// When apt knows none of them even then.
pub(crate) fn first_known<'a>(names: &[&'a str]) -> Result<(&'a str, String)> {
    let find = || names.iter().find_map(|name| candidate(name).map(|version| (*name, version)));
    if let Some(found) = find() {
        return Ok(found);
    }
    update_lists(&crate::cache::root()?.join("log/apt.log"))?;
    find().with_context(|| format!("apt knows none of: {}", names.join(", ")))
}

/// Fetches a package file into `folder` without installing it.
pub(crate) fn download(name: &str, folder: &Path) -> Result<PathBuf> {
    first_known(&[name])?;
    let fetch = || {
        let mut fetch = program::command("apt-get");
        fetch.args(["download", "-qq", name]).current_dir(folder);
        program::output(&mut fetch)
    };
    // Lists that are older than the mirror name a version it has dropped; fresh ones help.
    if fetch().is_err() {
        update_lists(&crate::cache::root()?.join("log/apt.log"))?;
        fetch().with_context(|| format!("cannot download the package {name}"))?;
    }
    std::fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            path.extension().is_some_and(|ending| ending == "deb")
                && path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(&format!("{name}_")))
        })
        .with_context(|| format!("apt-get downloaded no file for {name}"))
}

/// Unpacks a package file's content into `folder`.
pub(crate) fn unpack(package: &Path, folder: &Path) -> Result<()> {
    program::output(program::command("dpkg-deb").arg("--extract").arg(package).arg(folder)).map(|_| ())
}

/// This machine's Debian or Ubuntu code name and the mirror its packages come from.
pub(crate) fn release() -> Result<(String, String)> {
    let text = std::fs::read_to_string("/etc/os-release").context("this machine has no /etc/os-release")?;
    let codename = text
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .context("/etc/os-release names no VERSION_CODENAME")?;
    let list = || {
        program::output(program::command("apt-get").args([
            "indextargets",
            "--format",
            "$(CODENAME) $(REPO_URI)",
            "Created-By: Packages",
        ]))
    };
    let mirror = list()?
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{codename} ")).map(|uri| uri.trim_end_matches('/').to_owned()));
    Ok((codename, mirror.unwrap_or_else(|| "http://deb.debian.org/debian".to_owned())))
}

fn update_lists_if_unknown(names: &[&str], log: &Path) -> Result<()> {
    if names.iter().all(|name| candidate(name).is_some()) {
        return Ok(());
    }
    update_lists(log)
}

fn update_lists(log: &Path) -> Result<()> {
    let mut update = program::command_as_root("apt-get")?;
    update.env("DEBIAN_FRONTEND", "noninteractive").args(["update", "-qq"]);
    program::run_logged("updating apt's lists", &mut update, log)
}
