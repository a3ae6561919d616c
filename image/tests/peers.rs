//! The root of an image is what real tools unpack from it: every path, mode, owner, time, attribute, link, device and byte.

mod support;

use std::path::Path;
use std::process::Command;

use support::tools::{Mount, have, privileged, run, shell, skip};
use support::tree::{assert_same, of_directory, of_erofs};
use support::{assert_sound, concatenate, home, load_file};

/// Fills a root file system with everything a layer can hold.
const FIRST_LAYER: &str = r#"
cd "$1"
mkdir -p bin etc usr/lib var/empty 'with space' deep/a/b/c/d many
printf '#!/bin/sh\n' > bin/tool; chmod 4755 bin/tool; chown 1234:5678 bin/tool
printf data > etc/first; ln etc/first etc/second; ln etc/first usr/third
printf gone > etc/gone; mkdir -p etc/dir/sub; printf x > etc/dir/sub/f; printf y > etc/dir/g
ln -s /etc/first usr/absolute; ln -s ../etc/first usr/relative; ln -s usr/lib lib
mknod usr/null c 1 3; mknod usr/disk b 259 300; mkfifo usr/pipe
chmod 1777 var/empty; chmod 2750 usr/lib
: > etc/none; head -c 4096 /dev/urandom > etc/block; head -c 300001 /dev/urandom > etc/large
head -c 3000000 /dev/zero > etc/zeros
truncate -s 20M etc/holes; printf middle | dd of=etc/holes bs=1 seek=9000000 conv=notrunc status=none
setfattr -n user.plain -v value etc/first
setfattr -n user.binary -v 0x0a000a37206100ff etc/block
setfattr -n trusted.kept -v yes etc/block
setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 bin/tool
setfattr -n user.big -v "$(head -c 3000 /dev/zero | tr '\0' a)" usr/lib
setfacl -m u:1000:rwx,g:50:r etc/block; setfacl -d -m u:1000:rwx usr/lib
i=0; while [ $i -lt 700 ]; do : > "many/a-rather-long-name-so-that-blocks-fill-$i"; i=$((i + 1)); done
: > "$(printf 'n%.0s' $(seq 255))"
: > "$(printf 'latin-\344')"; : > "$(printf 'new\nline')"; : > '!before-dot'; : > '-dash'
ln -s "$(printf 't%.0s' $(seq 4000))" usr/long
touch -d '2001-02-03 04:05:06' etc/first; touch -h -d '1969-12-31 23:59:58 UTC' usr/relative
"#;

/// Changes it so that the second layer has whiteouts, type changes and new links.
const SECOND_LAYER: &str = r#"
cd "$1"
rm etc/gone; rm -r etc/dir; printf now-a-file > etc/dir
rm etc/none; mkdir etc/none; printf inside > etc/none/file
rm -r deep/a/b; mkdir deep/a/b; printf new > deep/a/b/fresh
chown 42:43 etc/large; chmod 600 etc/large; printf more >> etc/large
rm usr/pipe; rm etc/second; printf alone > etc/second
printf third > etc/third; ln etc/third usr/fourth
rm many/*-1*; : > many/added
"#;

/// An OCI layout `$1` with the image `v2` of two layers.
fn make_layout(directory: &Path) -> std::path::PathBuf {
    let layout = directory.join("layout");
    let bundle = directory.join("bundle");
    shell(
        r#"umoci init --layout "$1"; umoci new --image "$1:v0"; umoci unpack --image "$1:v0" "$2" >&2
           umoci config --image "$1:v0" --config.user 1000:1000 --config.env A=1 --config.entrypoint /bin/tool --config.cmd --help --config.workingdir /var \
             --config.label team=ml --config.volume /data --config.exposedports 80/tcp --config.stopsignal SIGINT
           rm -rf "$2"; umoci unpack --image "$1:v0" "$2""#,
        &[&layout, &bundle],
    );
    shell(FIRST_LAYER, &[&bundle.join("rootfs")]);
    shell(r#"umoci repack --refresh-bundle --image "$1:v1" "$2""#, &[&layout, &bundle]);
    shell(SECOND_LAYER, &[&bundle.join("rootfs")]);
    shell(r#"umoci repack --image "$1:v2" "$2""#, &[&layout, &bundle]);
    layout
}

fn check_root(rows: &support::tree::Rows, archive: &Path, what: &str, scratch: &Path) {
    let home = home();
    let loaded = load_file(&home.store, archive).unwrap_or_else(|error| panic!("{what}: {error:?}"));
    assert_eq!(loaded.len(), 1, "{what}");
    assert!(loaded[0].dropped.is_empty(), "{what}: {}", loaded[0].dropped);
    let lease = home.store.lease(&loaded[0].references[0]).unwrap();
    let config = lease.config();
    assert_eq!(config.entrypoint, ["/bin/tool"], "{what}");
    assert_eq!(config.command, ["--help"], "{what}");
    assert_eq!(config.user, "1000:1000", "{what}");
    assert_eq!(config.working_directory, "/var", "{what}");
    assert_eq!(config.labels["team"], "ml", "{what}");
    assert_eq!(config.volumes, ["/data"], "{what}");
    assert_eq!(config.exposed_ports, ["80/tcp"], "{what}");
    assert_eq!(config.stop_signal.as_deref(), Some("SIGINT"), "{what}");

    let image = scratch.join("root.erofs");
    concatenate(lease.root(), &image);
    assert_same(rows, &of_erofs(&std::fs::read(&image).unwrap()), &format!("{what}, read by erofs-rs"));
    if have("fsck.erofs") {
        // Version 1.5 follows every inode, directory, chunk and attribute.
        run(Command::new("fsck.erofs").arg("--extract").arg(&image));
    }
    let place = scratch.join("mounted");
    std::fs::create_dir_all(&place).unwrap();
    let mounted =
        Command::new("mount").args(["-t", "erofs", "-o", "loop,ro"]).arg(&image).arg(&place).output().unwrap();
    if mounted.status.success() {
        let mount = Mount(&place);
        assert_same(rows, &of_directory(mount.0), &format!("{what}, mounted by the kernel"));
    } else {
        skip(&format!("this kernel does not mount EROFS here: {}", String::from_utf8_lossy(&mounted.stderr).trim()));
    }
    assert_sound(&home.store);
}

#[test]
fn archives_of_every_tool_give_the_tree_that_umoci_unpacks() {
    if !(privileged() && have("umoci") && have("skopeo") && have("buildah") && have("setfattr") && have("setfacl")) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let layout = make_layout(directory);
    let plain = directory.join("plain");
    shell(r#"umoci unpack --image "$1:v2" "$2""#, &[&layout, &plain]);
    let rows = of_directory(&plain.join("rootfs"));
    assert!(rows.len() > 600, "the sample is rich: {}", rows.len());

    let archive = |name: &str| directory.join(name);
    let copy = |target: &str, path: &Path| {
        run(Command::new("skopeo")
            .args(["copy", "-q"])
            .arg(format!("oci:{}:v2", layout.display()))
            .arg(format!("{target}:{}:tool:v2", path.display())));
    };
    copy("docker-archive", &archive("skopeo-docker.tar"));
    copy("oci-archive", &archive("skopeo-oci.tar"));
    shell(
        r#"tar -C "$1" -cf "$2" oci-layout index.json blobs"#,
        &[&only_v2(&layout, directory), &archive("umoci.tar")],
    );
    shell(
        r#"export STORAGE_DRIVER=vfs; B="buildah --root $1 --runroot $2"
           $B pull -q "docker-archive:$3" > "$1.id"
           $B push -q "$(cat "$1.id")" "docker-archive:$4:tool:v2"
           $B push -q "$(cat "$1.id")" "oci-archive:$5:tool:v2"
           gzip -1 < "$4" > "$4.gz""#,
        &[
            &archive("storage"),
            &archive("run"),
            &archive("skopeo-docker.tar"),
            &archive("buildah-docker.tar"),
            &archive("buildah-oci.tar"),
        ],
    );
    let oci = std::fs::read(archive("buildah-oci.tar")).unwrap();
    std::fs::write(archive("buildah-oci.tar.zst"), support::archive::zstd(&oci)).unwrap();
    for name in [
        "umoci.tar",
        "skopeo-docker.tar",
        "skopeo-oci.tar",
        "buildah-docker.tar",
        "buildah-oci.tar",
        "buildah-docker.tar.gz",
        "buildah-oci.tar.zst",
    ] {
        check_root(&rows, &archive(name), name, directory);
    }
    // Docker itself cannot unpack the second layer, in which a file takes a folder's place: "unlinkat: not a directory".
    let Some(docker) = std::env::var_os("MSB_TEST_DOCKER") else {
        return skip("docker is not here: MSB_TEST_DOCKER names no folder");
    };
    let first = directory.join("first");
    shell(r#"umoci unpack --image "$1:v1" "$2""#, &[&layout, &first]);
    run(Command::new("skopeo")
        .args(["copy", "-q"])
        .arg(format!("oci:{}:v1", layout.display()))
        .arg(format!("docker-archive:{}:tool:v2", archive("first.tar").display())));
    docker_saves(Path::new(&docker), &archive("first.tar"), &archive("docker.tar"), directory);
    check_root(&of_directory(&first.join("rootfs")), &archive("docker.tar"), "docker.tar", directory);
}

/// Has docker load an image and save it again; the daemon is its own and ends with this.
fn docker_saves(programs: &Path, image: &Path, saved: &Path, directory: &Path) {
    shell(
        r#"export PATH="$1/usr/bin:$1/usr/sbin:$PATH" DOCKER_HOST="unix://$4/docker.sock"
           mkdir -p "$4/docker"
           dockerd --data-root "$4/docker/data" --exec-root "$4/docker/run" --pidfile "$4/docker/pid" -H "$DOCKER_HOST" \
             --iptables=false --ip6tables=false --bridge=none --storage-driver=vfs >"$4/docker/log" 2>&1 &
           daemon=$!
           trap 'kill $daemon; wait $daemon || true' EXIT
           for turn in $(seq 300); do docker version >/dev/null 2>&1 && break; sleep 0.2; done
           docker load -q -i "$2" || { cat "$4/docker/log"; exit 1; }
           docker save -o "$3" tool:v2"#,
        &[programs, image, saved, directory],
    );
}

/// A layout with the image `v2` alone, as umoci itself copies it.
fn only_v2(layout: &Path, directory: &Path) -> std::path::PathBuf {
    let target = directory.join("only");
    run(Command::new("skopeo")
        .args(["copy", "-q"])
        .arg(format!("oci:{}:v2", layout.display()))
        .arg(format!("oci:{}:v2", target.display())));
    target
}
