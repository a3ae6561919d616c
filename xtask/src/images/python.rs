//! The `python` image: Debian's minbase with python3, by debootstrap, squeezed.
//!
//! Two layers: what debootstrap made, without documentation and package lists, and a small one on top with a user and a program.
//! Needs root, because the files belong to many owners.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::archive::{Compression, Image, StoredLayer};
use super::layer::{Layer, ROOT};
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

/// Writes `python.tar`.
pub(crate) fn make(codename: &str, mirror: &str, result: &Path) -> Result<()> {
    let work = tempfile::Builder::new().prefix("msb-python-").tempdir()?;
    let (root, tar) = (work.path().join("root"), work.path().join("base.tar"));
    let log = cache::root()?.join("log/debootstrap.log");
    let made = (|| {
        let mut bootstrap = program::command_as_root("debootstrap")?;
        bootstrap.args(["--variant=minbase", "--include=python3-minimal"]).arg(codename).arg(&root).arg(mirror);
        program::run_logged("debootstrap", &mut bootstrap, &log)?;
        let mut pack = program::command_as_root("tar")?;
        pack.args(["--sort=name", "--numeric-owner", "--xattrs", "--mtime=@1704067200", "--format=pax"])
            .args([
                "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
                "--no-wildcards-match-slash",
                "--anchored",
            ])
            .args(SQUEEZED.iter().map(|pattern| format!("--exclude=./{pattern}")))
            .arg("-C")
            .arg(&root)
            .arg("-cf")
            .arg(&tar)
            .arg(".");
        program::run_logged("packing the layer", &mut pack, &log)
    })();
    // The tree belongs to root, so the temporary folder cannot always remove it by itself.
    let removed = program::command_as_root("rm")
        .and_then(|mut rm| program::run(rm.args(["-rf", "--one-file-system"]).arg(&root)));
    made.and(removed)?;

    let mut top = Layer::new();
    top.folder("srv/work", 0o777, ROOT)?;
    top.file("srv/work/hello.py", 0o644, ROOT, b"import sys\nprint('hello from python', sys.version.split()[0])\n")?;
    let gzip = |tar| StoredLayer { tar, compression: Compression::Gzip };
    let image = Image {
        reference: "python:latest",
        config: json!({
            "Cmd": ["python3"],
            "WorkingDir": "/srv/work",
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
        }),
        layers: vec![gzip(std::fs::read(&tar)?), gzip(top.finish()?)],
    };
    image.write_oci(&result.join("python.tar"))
}
