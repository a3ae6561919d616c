//! `cargo xtask dist --check`: what is shipped, in the hands of somebody who has nothing else.
//!
//! ```text
//!  a Debian root without compilers, made once (~/.cache/msb/root/<key>/), read-only
//!    └ an overlay that is thrown away, mounts and processes of its own
//!        ├ the package: installed, hello from a guest (engine qemu), a second sandbox left running, purged
//!        └ the tarball: installed under a home, hello, `msb self uninstall --purge`
//! ```
//!
//! After each nothing may be left that was not there before: no file, no process. Called by `dist`; needs root. Nothing there runs systemd:
//! units are the affair of `cargo xtask lab --systemd`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{cache, debian, images, program};

/// Changed whenever what is made here changes.
const RECIPE: &str = "1";
/// Beside the minimal system: the engine, which the package recommends.
const INCLUDE: &str = "qemu-system-x86";

/// The root, found in the cache or made.
fn root() -> Result<PathBuf> {
    let (codename, mirror) = debian::release()?;
    let key = cache::key([RECIPE, &codename, INCLUDE].map(str::as_bytes));
    let place = cache::entry("root", &key, |folder| {
        println!("A Debian root is made once: {codename} with {INCLUDE}, some minutes.");
        let root = folder.join("root");
        let log = cache::root()?.join("log/root.log");
        let mut debootstrap = program::command_as_root("debootstrap")?;
        debootstrap.args(["--variant=minbase", "--include", INCLUDE, &codename]).arg(&root).arg(&mirror);
        program::run_logged("debootstrap", &mut debootstrap, &log)?;
        let mut squeeze = program::command_as_root("sh")?;
        squeeze.args(["-euc", "rm -rf \"$1\"/var/cache/apt/* \"$1\"/var/lib/apt/lists/*", "sh"]).arg(&root);
        program::run_logged("its package lists go", &mut squeeze, &log)
    })?;
    Ok(place.join("root"))
}

/// Holds the results of `dist` in this folder against their checksums, and tries both of them.
pub(crate) fn check(results: &Path) -> Result<()> {
    debian::ensure(&[debian::IMAGES])?;
    let mut sums = program::command("sha256sum");
    print!("{}", program::output(sums.args(["--check", "SHA256SUMS"]).current_dir(results))?);
    let root = root()?;
    // On a disk: an overlay cannot lie over another.
    let work = tempfile::Builder::new().prefix("newcomer-").tempdir_in(cache::target())?;
    let script = work.path().join("script");
    std::fs::write(&script, INSIDE).with_context(|| format!("cannot write {}", script.display()))?;
    let mut run = program::command_as_root("unshare")?;
    run.args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", OUTSIDE, "sh"]);
    run.arg(root).arg(work.path()).arg(results).arg(images::small()?.join("busybox.tar"));
    let status = run.status().context("cannot start unshare")?;
    // Root's files, which a temporary folder of somebody else's cannot remove by itself.
    let mut remove = program::command_as_root("sh")?;
    let removed = program::output(remove.args(["-euc", "rm -rf --one-file-system \"$1\"/*", "sh"]).arg(work.path()));
    if !status.success() {
        bail!("in the Debian root: {status}");
    }
    removed.map(drop)
}

/// The mounts, which vanish with their namespace.
const OUTSIDE: &str = r#"
root=$1 work=$2 results=$3 image=$4
mkdir "$work/upper" "$work/work" "$work/new"
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$root,upperdir=$work/upper,workdir=$work/work" "$work/new"
mount -t proc proc "$work/new/proc"
mount --rbind /dev "$work/new/dev"
mount -t tmpfs -o mode=1777 tmpfs "$work/new/tmp"
mount -t tmpfs tmpfs "$work/new/mnt"
cp "$results"/msb_*.deb "$work/new/mnt/msb.deb"
cp "$results"/msb-*.tar.gz "$work/new/mnt/msb.tar.gz"
cp "$image" "$work/new/mnt/busybox.tar"
cp "$work/script" "$work/new/mnt/script"
chmod -R a+rX "$work/new/mnt"
exec chroot "$work/new" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 /bin/bash -euo pipefail /mnt/script
"#;

/// What a newcomer does, and what is looked for afterwards.
const INSIDE: &str = r#"
fail() { echo "NOT SO: $*"; exit 1; }
for name in cc gcc clang ld as cargo rustc make; do
    if command -v "$name"; then fail "$name is there"; fi
done
useradd --create-home --shell /bin/bash ann
# As ann who is logged in nowhere: no manager, no runtime folder.
ann() { setpriv --reuid ann --regid ann --init-groups env -i HOME=/home/ann PATH="$path" LC_ALL=C.UTF-8 MSB_ENGINE=qemu bash -euo pipefail -c "$1"; }
# Everything but what a package manager remembers of what it did.
files() {
    find / -xdev \( -path /var/lib/dpkg -o -path /var/log -o -path /var/cache -o -name 'group*' -path '/etc/*' -o -name 'gshadow*' -path '/etc/*' \) -prune \
        -o -print | sort
}
programs() { readlink /proc/[0-9]*/exe | grep -E '/(msb[^/]*|qemu[^/]*)( |$)' || true; }
nothing_left() {
    files > /tmp/after
    diff /tmp/before /tmp/after || fail "after the removal of $1 the files are not what they were"
    for _ in $(seq 100); do [ -z "$(programs)" ] && return; sleep 0.1; done
    fail "after the removal of $1 these go on: $(programs)"
}
hello() {
    ann 'msb image load -q -i /mnt/busybox.tar >/dev/null'
    said=$(ann 'msb run --rm busybox echo hello')
    [ "$said" = hello ] || fail "it said $said"
    took=$(( ($(date +%s%N) - began) / 1000000 ))
    echo "$1: from nothing to hello in $took ms"
    [ "$took" -lt 60000 ] || fail "that is more than a minute"
}

path=/usr/bin:/bin
files > /tmp/before
began=$(date +%s%N)
dpkg --install /mnt/msb.deb
hello "the package"
ann 'msb run -d --name left busybox sleep 600 >/dev/null'
dpkg --purge msb
# What ann made is hers; no package takes it away.
rm -rf /home/ann/.msb
nothing_left "the package"

path=/home/ann/.local/bin:/usr/bin:/bin
began=$(date +%s%N)
ann 'mkdir /tmp/unpacked; tar -xzf /mnt/msb.tar.gz -C /tmp/unpacked; /tmp/unpacked/*/install.sh /home/ann/.local'
hello "the tarball"
ann 'msb run -d --name left busybox sleep 600 >/dev/null'
ann 'msb doctor >/dev/null' || fail "doctor is not content"
ann 'msb self uninstall --purge --yes >/dev/null'
rmdir /home/ann/.local
nothing_left "the tarball"

# Folders that a distribution ships empty stay.
path=/usr/local/bin:/usr/bin:/bin
began=$(date +%s%N)
/tmp/unpacked/*/install.sh
hello "the tarball under /usr/local"
ann 'msb self stop; rm -rf /home/ann/.msb'
MSB_ENGINE=qemu HOME=/root /usr/local/bin/msb self uninstall --purge --yes >/dev/null
nothing_left "the tarball under /usr/local"
echo "no file and no process is left"
"#;
