//! The `tools` image: Debian with whole programs that are run inside a guest, for the long proofs and the benchmarks: Docker, sudo, an
//! OpenSSH server, git, rsync, curl, iperf3, a DNS client and python3.
//!
//! Two layers: what debootstrap made, and a small one on top that lets the user `app` use sudo without a password.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::archive::{Compression, Image, StoredLayer};
use super::layer::{Layer, ROOT};
use super::root;

/// The packages. ca-certificates and the rest of what they recommend is left out.
const PACKAGES: &str = "docker.io,iptables,sudo,openssh-server,openssh-sftp-server,git,rsync,curl,iperf3,bind9-dnsutils,python3-minimal,procps,iproute2";

/// Writes `tools.tar`.
pub(crate) fn make(codename: &str, mirror: &str, result: &Path) -> Result<()> {
    let base = root::layer(codename, mirror, PACKAGES, Some("app"))?;
    let mut top = Layer::new();
    top.file("etc/sudoers.d/app", 0o440, ROOT, b"app ALL=(ALL) NOPASSWD: ALL\n")?;
    // As a docker archive, whose layers are plain: what is loaded once need not be small.
    let layer = |tar| StoredLayer { tar, compression: Compression::Gzip };
    let image = Image {
        reference: "tools:latest",
        config: json!({
            "Cmd": ["bash"],
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
        }),
        layers: vec![layer(base), layer(top.finish()?)],
    };
    image.write_docker(&result.join("tools.tar"))
}
