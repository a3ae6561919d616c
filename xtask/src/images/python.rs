//! The `python` image: Debian's minbase with python3.
//!
//! Two layers: what debootstrap made, and a small one on top with a folder and a program.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::archive::{Compression, Image, StoredLayer};
use super::layer::{Layer, ROOT};
use super::root;

/// Writes `python.tar`.
pub(crate) fn make(codename: &str, mirror: &str, result: &Path) -> Result<()> {
    let base = root::layer(codename, mirror, "python3-minimal", None)?;
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
        layers: vec![gzip(base), gzip(top.finish()?)],
    };
    image.write_oci(&result.join("python.tar"))
}
