//! Files of JSON lines that a VM process writes and rotates, read back in order and followed: the workload's log and the network's
//! decision log. `name` is the newest, `name.1` the one before it. Blocking; called on the pool by `api::logs` and `api::network`.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::marker::PhantomData;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use msb_actors::sandbox::view::View;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};

/// Rotated files that are looked for.
const FILES_MAX: u32 = 100;
/// Longest line that is read, in bytes; a longer one is left out.
const LINE_LEN_MAX: u64 = 1 << 20;
/// Most lines of `tail`, so that a client cannot make the daemon remember more.
const TAIL_MAX: u64 = 100_000;
/// Records that wait for a slow client.
pub(super) const QUEUE_LEN: usize = 256;
/// How often a followed file is looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(100);

/// Which lines.
#[derive(Clone, Copy, Debug)]
pub(super) struct Which {
    /// Only the last ones before now.
    pub(super) tail: Option<u64>,
    /// Go on with new ones.
    pub(super) follow: bool,
}

/// Becomes true when the sandbox rests, as long as `followed` has a reader.
pub(super) fn rests<T: Send + 'static>(
    mut view: watch::Receiver<Arc<View>>,
    followed: Option<mpsc::Sender<T>>,
) -> watch::Receiver<bool> {
    let (rest, rests) = watch::channel(false);
    if let Some(lines) = followed {
        tokio::spawn(async move {
            tokio::select! {
                // A view without a sender belongs to a sandbox that is gone.
                _ = view.wait_for(|view| view.rests()) => drop(rest.send_replace(true)),
                () = lines.closed() => {}
            }
        });
    }
    rests
}

/// Reads everything there is, then follows. Ends when the client is gone: every send fails then.
pub(super) fn read<T: DeserializeOwned>(
    directory: &Path,
    name: &str,
    which: Which,
    takes: impl Fn(&T) -> bool,
    lines: &mpsc::Sender<T>,
    rests: &watch::Receiver<bool>,
) {
    let mut current = None;
    let mut kept: VecDeque<T> = VecDeque::new();
    let tail = which.tail.map(|tail| usize::try_from(tail.min(TAIL_MAX)).unwrap_or(usize::MAX));
    for path in files(directory, name) {
        let Ok(mut file) = LogFile::open(&path) else { continue };
        while let Some(record) = file.next_record() {
            if !takes(&record) {
                continue;
            }
            match tail {
                None => {
                    if lines.blocking_send(record).is_err() {
                        return;
                    }
                }
                Some(limit) => {
                    kept.push_back(record);
                    if kept.len() > limit {
                        kept.pop_front();
                    }
                }
            }
        }
        current = Some(file);
    }
    for record in kept {
        if lines.blocking_send(record).is_err() {
            return;
        }
    }
    if which.follow {
        follow(&directory.join(name), current, takes, lines, rests);
    }
}

fn follow<T: DeserializeOwned>(
    path: &Path,
    mut current: Option<LogFile<T>>,
    takes: impl Fn(&T) -> bool,
    lines: &mpsc::Sender<T>,
    rests: &watch::Receiver<bool>,
) {
    loop {
        // Looked at before reading: what was written until the sandbox rested is read after it.
        let over = *rests.borrow() || rests.has_changed().is_err();
        let newest = std::fs::metadata(path).ok().map(|file| file.ino());
        if let Some(file) = &mut current {
            while let Some(record) = file.next_record() {
                if takes(&record) && lines.blocking_send(record).is_err() {
                    return;
                }
            }
        }
        // Read to its end first, then turned: nothing is appended to a file that was put aside.
        if newest.is_some()
            && newest != current.as_ref().map(|file| file.inode)
            && let Ok(file) = LogFile::open(path)
        {
            current = Some(file);
            continue;
        }
        if over || lines.is_closed() {
            return;
        }
        std::thread::sleep(FOLLOW_INTERVAL);
    }
}

/// Existing files, oldest first.
fn files(directory: &Path, name: &str) -> Vec<PathBuf> {
    let rotated = (1..=FILES_MAX).rev().map(|number| directory.join(format!("{name}.{number}")));
    rotated.chain(std::iter::once(directory.join(name))).filter(|path| path.exists()).collect()
}

/// One file of records.
pub(super) struct LogFile<T> {
    reader: BufReader<File>,
    inode: u64,
    record: PhantomData<T>,
}

impl<T: DeserializeOwned> LogFile<T> {
    /// Opens it.
    pub(super) fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        let inode = file.metadata()?.ino();
        Ok(Self { reader: BufReader::new(file), inode, record: PhantomData })
    }

    /// The next whole record; lines that are none are left out, an unfinished one waits for its end.
    pub(super) fn next_record(&mut self) -> Option<T> {
        loop {
            let mut line = Vec::new();
            let read = std::io::Read::take(&mut self.reader, LINE_LEN_MAX).read_until(b'\n', &mut line).ok()?;
            if read == 0 {
                return None;
            }
            if !line.ends_with(b"\n") && (read as u64) < LINE_LEN_MAX {
                self.reader.seek(SeekFrom::Current(-i64::try_from(read).ok()?)).ok()?;
                return None;
            }
            if let Ok(record) = serde_json::from_slice(&line) {
                return Some(record);
            }
        }
    }
}
