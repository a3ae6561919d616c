//! Docker itself, for the one test that loads what `docker save` writes. Called by the tier `unit`. Nothing is installed: Debian's
//! packages are unpacked into the cache, and the test runs the daemon on a socket of its own.

use std::path::PathBuf;

use anyhow::Result;

use crate::{cache, debian};

/// The daemon with its client, and what it starts.
const PACKAGES: [&str; 3] = ["docker.io", "containerd", "runc"];

/// The folder with `usr/bin/docker` and `usr/sbin/dockerd`.
pub(crate) fn fetch() -> Result<PathBuf> {
    let (_, version) = debian::first_known(&PACKAGES[..1])?;
    cache::entry("docker", &cache::key([version.as_bytes()]), |folder| {
        println!("fetching docker {version}, unpacked and not installed");
        for name in PACKAGES {
            let package = debian::download(name, folder)?;
            debian::unpack(&package, folder)?;
            std::fs::remove_file(&package)?;
        }
        Ok(())
    })
}
