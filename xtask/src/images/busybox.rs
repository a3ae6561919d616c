//! The `busybox` and `app` images, from the package busybox-static.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use super::archive::{Compression, Image, StoredLayer};
use super::layer::{Layer, Owner, ROOT};
use crate::{debian, program};

/// The ordinary user of both images.
const APP: Owner = (1000, 1000);

const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/:/bin/false
nobody:x:65534:65534:nobody:/:/bin/false
app:x:1000:1000:an ordinary user:/home/app:/bin/sh
";
const GROUP: &str = "root:x:0:\ndaemon:x:1:\nstaff:x:50:app\nnogroup:x:65534:\napp:x:1000:\n";

/// `cap_net_raw=ep`, revision 2, as the kernel stores it in `security.capability` (linux/capability.h, struct vfs_cap_data).
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// What the `app` image starts: tells who and where it is, then either ends with the code it is asked for or serves until SIGUSR1.
const ENTRY: &str = "\
#!/bin/sh
echo \"entry: $*\"
case \"$1\" in
  exit) exit \"$2\" ;;
  serve)
    trap 'echo stopped by SIGUSR1 > /data/stopped; exit 0' USR1
    echo serving
    while :; do sleep 1; done ;;
  *) echo \"user $(id -u):$(id -g) in $(pwd) with $GREETING\" ;;
esac
";

/// Writes `busybox.tar`, `busybox-oci.tar` and `app.tar`.
pub(crate) fn make(result: &Path) -> Result<()> {
    let work = tempfile::tempdir()?;
    let package = debian::download("busybox-static", work.path())?;
    debian::unpack(&package, work.path())?;
    let program = ["bin/busybox", "usr/bin/busybox"]
        .iter()
        .map(|path| work.path().join(path))
        .find(|path| path.is_file())
        .context("the package busybox-static holds no busybox")?;
    let applets = program::output(program::command(&program).arg("--list"))?;
    let program = std::fs::read(&program)?;

    let gzip = |tar| StoredLayer { tar, compression: Compression::Gzip };
    let mut layers = vec![gzip(base(&program, &applets)?), gzip(files()?), gzip(changes()?)];
    let busybox = Image {
        reference: "busybox:latest",
        config: json!({
            "Cmd": ["sh"],
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Labels": { "org.opencontainers.image.title": "busybox" },
        }),
        layers: layers.clone(),
    };
    busybox.write_docker(&result.join("busybox.tar"))?;
    busybox.write_oci(&result.join("busybox-oci.tar"))?;

    layers.push(StoredLayer { tar: application()?, compression: Compression::Zstd });
    let app = Image {
        reference: "app:1",
        config: json!({
            "User": "app",
            "WorkingDir": "/srv/app",
            "Entrypoint": ["/srv/app/entry"],
            "Cmd": ["default", "words"],
            "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "GREETING=hello from the image"],
            "Labels": { "org.opencontainers.image.title": "app", "team": "images" },
            "Volumes": { "/data": {} },
            "StopSignal": "SIGUSR1",
        }),
        layers,
    };
    app.write_oci(&result.join("app.tar"))
}

/// Layer 1: the program, a hard link to it per applet, and the usual folders.
fn base(program: &[u8], applets: &str) -> Result<Vec<u8>> {
    let mut layer = Layer::new();
    for folder in [
        "bin",
        "dev",
        "etc",
        "home",
        "opt",
        "proc",
        "sbin",
        "srv",
        "sys",
        "usr",
        "usr/bin",
        "usr/sbin",
        "usr/local",
        "usr/local/bin",
        "var",
        "var/log",
        "var/spool",
    ] {
        layer.folder(folder, 0o755, ROOT)?;
    }
    layer.folder("root", 0o700, ROOT)?;
    layer.folder("tmp", 0o1777, ROOT)?;
    layer.folder("var/tmp", 0o1777, ROOT)?;
    layer.file("bin/busybox", 0o755, ROOT, program)?;
    for applet in applets.lines().map(str::trim).filter(|name| !name.is_empty() && *name != "busybox") {
        layer.hard_link(&format!("bin/{applet}"), "bin/busybox")?;
    }
    layer.symbolic_link("usr/bin/env", "/bin/env")?;
    layer.file("etc/passwd", 0o644, ROOT, PASSWD.as_bytes())?;
    layer.file("etc/group", 0o644, ROOT, GROUP.as_bytes())?;
    layer.file("etc/shadow", 0o640, ROOT, b"root:*:19000:0:99999:7:::\napp:*:19000:0:99999:7:::\n")?;
    layer.file("etc/nsswitch.conf", 0o644, ROOT, b"hosts: files dns\n")?;
    layer.file("etc/os-release", 0o644, ROOT, b"ID=busybox\nNAME=busybox\n")?;
    layer.finish()
}

/// Layer 2: files of an ordinary user, extended attributes, special files, and what layer 3 takes away.
fn files() -> Result<Vec<u8>> {
    let mut layer = Layer::new();
    layer.folder("home/app", 0o750, APP)?;
    layer.file("home/app/.profile", 0o644, APP, b"PS1='$ '\n")?;
    layer.folder("opt/attributes", 0o755, ROOT)?;
    layer.file_with_attributes(
        "opt/attributes/noted",
        0o644,
        ROOT,
        b"has a note\n",
        &[("user.note", b"kept as it is\n")],
    )?;
    layer.file_with_attributes(
        "opt/attributes/capable",
        0o755,
        ROOT,
        b"#!/bin/sh\nexit 0\n",
        &[("security.capability", &CAPABILITY)],
    )?;
    layer.folder("opt/special", 0o755, ROOT)?;
    layer.character_device("opt/special/null", 0o666, 1, 3)?;
    layer.fifo("opt/special/fifo", 0o622)?;
    layer.file("opt/special/set-uid", 0o4755, ROOT, b"#!/bin/sh\nid -u\n")?;
    layer.file("opt/special/a name with spaces, and \u{e4}\u{f6}\u{fc}", 0o644, ROOT, b"found\n")?;
    layer.file("opt/special/zeros", 0o644, ROOT, &vec![0; 1 << 20])?;
    layer.hard_link("opt/special/zeros-again", "opt/special/zeros")?;
    layer.folder("opt/old", 0o755, ROOT)?;
    layer.file("opt/old/hidden", 0o644, ROOT, b"must not be seen\n")?;
    layer.file("opt/removed", 0o644, ROOT, b"must not be seen\n")?;
    layer.file("opt/replaced", 0o600, APP, b"old\n")?;
    layer.folder("opt/was-folder", 0o755, ROOT)?;
    layer.file("opt/was-folder/inside", 0o644, ROOT, b"must not be seen\n")?;
    layer.finish()
}

/// Layer 3: whiteouts, an opaque folder, a file in place of a folder, a file replaced.
fn changes() -> Result<Vec<u8>> {
    let mut layer = Layer::new();
    layer.whiteout("opt", "removed")?;
    layer.folder("opt/old", 0o755, ROOT)?;
    layer.opaque("opt/old")?;
    layer.file("opt/old/new", 0o644, ROOT, b"seen\n")?;
    layer.file("opt/replaced", 0o640, (1000, 50), b"new\n")?;
    layer.whiteout("opt", "was-folder")?;
    layer.symbolic_link("opt/link", "old/new")?;
    layer.file("opt/was-folder", 0o644, ROOT, b"now a file\n")?;
    layer.finish()
}

/// Layer 4, only in `app`.
fn application() -> Result<Vec<u8>> {
    let mut layer = Layer::new();
    layer.folder("srv/app", 0o755, APP)?;
    layer.file("srv/app/entry", 0o755, APP, ENTRY.as_bytes())?;
    layer.folder("data", 0o755, APP)?;
    layer.file("data/from-image", 0o644, APP, b"an image may have files under its volume\n")?;
    layer.finish()
}
