//! A root made from Debian's packages by debootstrap, squeezed, as one layer. Called by the recipes of images; needs root, because the
//! files belong to many owners.

use std::path::Path;

use anyhow::Result;

use crate::{cache, program};

/// What nobody needs in a container, relative to the root.
const SQUEEZED: &[&str] = &[
    "var/cache/apt/*.bin",
    "var/cache/apt/archives/*.deb",
    "var/lib/apt/lists/*",
    "var/log/*",
    "usr/share/doc/*",
    "usr/share/man/*",
    "usr/share/info/*",
    "usr/share/locale/*",
    "usr/share/i18n/*",
    "usr/share/zoneinfo/*",
    "dev/*",
];

/// The layer of Debian's minbase with these packages and, where a name is given, a user with a home.
pub(crate) fn layer(codename: &str, mirror: &str, packages: &str, user: Option<&str>) -> Result<Vec<u8>> {
    let work = tempfile::Builder::new().prefix("msb-root-").tempdir()?;
    let (root, tar) = (work.path().join("root"), work.path().join("base.tar"));
    let log = cache::root()?.join("log/debootstrap.log");
    let made = make(codename, mirror, packages, user, (&root, &tar), &log);
    // The tree belongs to root, so the temporary folder cannot always remove it by itself.
    let removed = program::command_as_root("rm")
        .and_then(|mut rm| program::run(rm.args(["-rf", "--one-file-system"]).arg(&root)));
    made.and(removed)?;
    Ok(std::fs::read(&tar)?)
}

fn make(
    codename: &str,
    mirror: &str,
    packages: &str,
    user: Option<&str>,
    (root, tar): (&Path, &Path),
    log: &Path,
) -> Result<()> {
    let mut bootstrap = program::command_as_root("debootstrap")?;
    bootstrap.args(["--variant=minbase", &format!("--include={packages}")]).arg(codename).arg(root).arg(mirror);
    program::run_logged("debootstrap", &mut bootstrap, log)?;
    if let Some(user) = user {
        let mut add = program::command_as_root("chroot")?;
        add.arg(root).args(["useradd", "-m", "-s", "/bin/bash", user]);
        program::run_logged("adding the user", &mut add, log)?;
    }
    let mut pack = program::command_as_root("tar")?;
    pack.args(["--sort=name", "--numeric-owner", "--xattrs", "--mtime=@1704067200", "--format=pax"])
        .args([
            "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
            "--no-wildcards-match-slash",
            "--anchored",
        ])
        .args(SQUEEZED.iter().map(|pattern| format!("--exclude=./{pattern}")))
        .arg("-C")
        .arg(root)
        .arg("-cf")
        .arg(tar)
        .arg(".");
    program::run_logged("packing the layer", &mut pack, log)
}
