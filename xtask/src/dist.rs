//! `cargo xtask dist`: what is shipped, under `target/dist/`.
//!
//! ```text
//! msb-VERSION-x86_64.tar.gz      the tree of `install`, for any prefix: unpack, run ./install.sh [PREFIX]
//! msb_VERSION_amd64.deb          the same under /usr
//! SHA256SUMS
//! ```
//!
//! Both hold the manifest that `msb self uninstall` goes by; a package does not, because its files are the package manager's.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::{binaries, cache, install, newcomer, program};

const VERSION: &str = env!("CARGO_PKG_VERSION");

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Where the results go; target/dist when left out
    #[arg(long)]
    output: Option<PathBuf>,
    /// Try them in a Debian root without compilers: install, hello from a guest, remove; needs root
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    build: binaries::Arguments,
}

/// Unpacks into a prefix. Units and the manifest name the prefix, so both are written where it is known.
const INSTALLER: &str = r#"#!/bin/sh
# Installs msb below a prefix: ./install.sh [/usr/local]
set -eu
prefix=${1:-/usr/local}
case $prefix in /*) ;; *) echo "install.sh: the prefix must be absolute: $prefix" >&2; exit 2 ;; esac
here=$(cd "$(dirname "$0")" && pwd)
manifest=$prefix/share/msb/installed.txt
# Folders that this or an earlier installation made: `msb self uninstall` takes them away, and no other.
made=$(grep '/$' "$manifest" 2>/dev/null || true)
made=$made$(cd "$here/tree" && find . -mindepth 1 -type d | sed 's|^\./||' | while read -r folder; do
    [ -d "$prefix/$folder" ] || printf '\n%s/' "$folder"
done)
(cd "$here/tree" && find . -type f -o -type l | sed 's|^\./||') | while read -r file; do
    mkdir -p "$prefix/$(dirname "$file")"
    # Replaced by a rename: a running service keeps what it has opened.
    cp -p "$here/tree/$file" "$prefix/$file.new$$"
    case $file in lib/systemd/*) sed -i "s|@PREFIX@|$prefix|g" "$prefix/$file.new$$" ;; esac
    mv -f "$prefix/$file.new$$" "$prefix/$file"
done
printf '%s\n' "$made" | sed '/^$/d' >>"$manifest"
echo "installed under $prefix; next: $prefix/bin/msb doctor"
if [ -d /run/systemd/system ] && [ "$(id -u)" -ne 0 ] && [ ! -e "/var/lib/systemd/linger/$(id -un)" ]; then
    echo "sandboxes end with your last session until you run: loginctl enable-linger $(id -un)"
fi
"#;

/// After the package is unpacked: the group exists, and systemd knows the units. Nothing is started or enabled by itself.
const POSTINST: &str = "#!/bin/sh
set -e
if [ \"$1\" = configure ]; then
    getent group msb >/dev/null || groupadd --system msb
    if [ -d /run/systemd/system ]; then systemctl daemon-reload || true; fi
fi
";

/// Before it is removed (not upgraded): sandboxes end with a flush.
const PRERM: &str = r#"#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl disable --now msb-flush.service msbd.service msbd.socket >/dev/null 2>&1 || true
    # The services of users who have their own, in their managers.
    loginctl list-users --no-legend 2>/dev/null | while read -r uid name rest; do
        systemctl --user --machine="$name@" stop msb.slice msbd.socket msbd.service >/dev/null 2>&1 || true
    done
fi
if [ "$1" = remove ]; then
    # Services that msb itself has started belong to no unit. Each is asked as its own user, with the environment that finds it.
    for process in /proc/[0-9]*; do
        [ "$(readlink "$process/exe" 2>/dev/null)" = /usr/bin/msbd ] || continue
        # One that has ended meanwhile needs nothing.
        uid=$(sed -n 's/^Uid:\t\([0-9]*\).*/\1/p' "$process/status" 2>/dev/null) || continue
        gid=$(sed -n 's/^Gid:\t\([0-9]*\).*/\1/p' "$process/status" 2>/dev/null) || continue
        xargs -0 -a "$process/environ" sh -c 'uid=$1 gid=$2; shift 2
            exec timeout 60 setpriv --reuid "$uid" --regid "$gid" --clear-groups env -i "$@" /usr/bin/msb self stop --sandboxes
        ' sh "$uid" "$gid" >/dev/null 2>&1 || true
    done
fi
"#;

/// After it is gone: no unit is known, no socket is left; with a purge no state of the host's service either. Homes of users are theirs.
const POSTRM: &str = "#!/bin/sh
set -e
case \"$1\" in
    remove) rm -rf /run/msb ;;
    purge) rm -rf /run/msb /var/lib/msb ;;
esac
if [ -d /run/systemd/system ]; then systemctl daemon-reload || true; fi
";

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let output = match &arguments.output {
        Some(path) => std::path::absolute(path)?,
        None => cache::target().join("dist"),
    };
    std::fs::create_dir_all(&output)?;
    let work = tempfile::tempdir()?;
    let tree = work.path().join("tree");
    install::lay_out(&tree, Path::new("@PREFIX@"), arguments.build)?;
    let tarball = tarball(work.path(), &tree, &output)?;
    let package = package(work.path(), &tree, &output, "xz")?;
    let sums = checksums(&[&tarball, &package])?;
    std::fs::write(output.join("SHA256SUMS"), sums)?;
    println!("{}\n{}\n{}", tarball.display(), package.display(), output.join("SHA256SUMS").display());
    if arguments.check { newcomer::check(&output) } else { Ok(()) }
}

/// Only the package, as `msb.deb` in this folder: for the machine that the service is tested in.
pub(crate) fn package_for_tests(folder: &Path, build: binaries::Arguments) -> Result<PathBuf> {
    let work = tempfile::tempdir()?;
    let tree = work.path().join("tree");
    install::lay_out(&tree, Path::new("@PREFIX@"), build)?;
    // Packed and unpacked at once, on this machine.
    let package = package(work.path(), &tree, folder, "none")?;
    let path = folder.join("msb.deb");
    std::fs::rename(package, &path)?;
    Ok(path)
}

fn tarball(work: &Path, tree: &Path, output: &Path) -> Result<PathBuf> {
    let name = format!("msb-{VERSION}-x86_64");
    let top = work.join(&name);
    std::fs::create_dir(&top)?;
    program::output(program::command("cp").arg("-a").arg(tree).arg(top.join("tree")))?;
    let installer = top.join("install.sh");
    std::fs::write(&installer, INSTALLER)?;
    program::output(program::command("chmod").arg("0755").arg(&installer))?;
    let path = output.join(format!("{name}.tar.gz"));
    // The same input gives the same bytes: order, owner and times are fixed.
    program::output(
        program::command("tar")
            .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0", "-C"])
            .arg(work)
            .arg("-czf")
            .arg(&path)
            .arg(&name),
    )?;
    Ok(path)
}

fn package(work: &Path, tree: &Path, output: &Path, compression: &str) -> Result<PathBuf> {
    let root = work.join("package");
    std::fs::create_dir_all(root.join("DEBIAN"))?;
    program::output(program::command("cp").arg("-a").arg(tree).arg(root.join("usr")))?;
    std::fs::remove_file(root.join("usr").join(install::MANIFEST)).context("the tree has a manifest")?;
    for (path, text) in crate::units::files(Path::new("/usr")) {
        let place = root.join("usr").join(path);
        std::fs::write(&place, text).with_context(|| format!("cannot write {}", place.display()))?;
    }
    let control = format!(
        "Package: msb\nVersion: {VERSION}\nArchitecture: amd64\nMaintainer: msb developers <msb@localhost>\nSection: admin\nPriority: optional\n\
         Depends: libc6\nRecommends: qemu-system-x86, dbus-user-session\nDescription: sandboxes in microVMs, from OCI images\n \
         Runs untrusted workloads from OCI images in supervised microVMs.\n"
    );
    std::fs::write(root.join("DEBIAN/control"), control)?;
    for (name, text) in [("postinst", POSTINST), ("prerm", PRERM), ("postrm", POSTRM)] {
        let path = root.join("DEBIAN").join(name);
        std::fs::write(&path, text)?;
        program::output(program::command("chmod").arg("0755").arg(&path))?;
    }
    let path = output.join(format!("msb_{VERSION}_amd64.deb"));
    let mut build = program::command("dpkg-deb");
    build.args(["--root-owner-group", &format!("-Z{compression}"), "--build"]).arg(&root).arg(&path);
    program::output(&mut build)?;
    Ok(path)
}

fn checksums(files: &[&Path]) -> Result<String> {
    let mut text = String::new();
    for path in files {
        let mut hash = Sha256::new();
        std::io::copy(&mut std::fs::File::open(path)?, &mut Sink(&mut hash))?;
        let name = path.file_name().context("a result has a name")?.to_string_lossy().into_owned();
        text.push_str(&format!("{}  {name}\n", hex::encode(hash.finalize())));
    }
    Ok(text)
}

struct Sink<'a>(&'a mut Sha256);

impl std::io::Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
