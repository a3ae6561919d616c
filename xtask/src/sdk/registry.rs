//! A registry of one image on loopback, so that the suite can pull: the blobs of an OCI archive over plain HTTP (distribution-spec,
//! "Pulling"). It knows no names and no tags: whatever is asked for is the one image.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::program;

/// Serves until the process ends.
pub(super) struct Registry {
    /// `127.0.0.1:PORT`
    pub(super) host: String,
}

struct Content {
    blobs: PathBuf,
    manifest: String,
    media_type: String,
}

impl Registry {
    /// Unpacks the archive in a folder and serves it.
    pub(super) fn of(archive: &Path, folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        program::output(program::command("tar").arg("-xf").arg(archive).arg("-C").arg(folder))?;
        let index: Value = serde_json::from_slice(&std::fs::read(folder.join("index.json"))?)?;
        let text = |value: &Value| value.as_str().map(str::to_owned).context("an odd index");
        let content = Arc::new(Content {
            blobs: folder.join("blobs/sha256"),
            manifest: text(&index["manifests"][0]["digest"])?,
            media_type: text(&index["manifests"][0]["mediaType"])?,
        });
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let host = listener.local_addr()?.to_string();
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let content = Arc::clone(&content);
                std::thread::spawn(move || serve(connection, &content));
            }
        });
        Ok(Self { host })
    }
}

/// One request, one answer.
fn serve(mut connection: TcpStream, content: &Content) -> std::io::Result<()> {
    let mut reader = BufReader::new(connection.try_clone()?);
    let (mut first, mut line) = (String::new(), String::new());
    reader.read_line(&mut first)?;
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let mut words = first.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (digest, kind) = match path.rsplit_once('/') {
        _ if path == "/v2/" => (None, "application/json"),
        Some((place, _)) if place.ends_with("/manifests") => (Some(content.manifest.as_str()), &*content.media_type),
        Some((place, digest)) if place.ends_with("/blobs") => (Some(digest), "application/octet-stream"),
        _ => return connection.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"),
    };
    let hex = digest.map(|digest| digest.trim_start_matches("sha256:"));
    let body = match hex {
        None => b"{}".to_vec(),
        Some(hex) if hex.bytes().all(|byte| byte.is_ascii_hexdigit()) => std::fs::read(content.blobs.join(hex))?,
        Some(_) => Vec::new(),
    };
    write!(
        connection,
        "HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {}\r\ndocker-content-digest: {}\r\nconnection: close\r\n\r\n",
        body.len(),
        digest.unwrap_or_default()
    )?;
    if method == "HEAD" { Ok(()) } else { connection.write_all(&body) }
}
