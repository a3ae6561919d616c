//! Copies of whole trees between this machine and sandboxes, as tar streams: [`Client::copy_into`], [`Client::copy_out`],
//! [`Client::copy_between`], and the bare streams [`Client::pack`] and [`Client::unpack`]. The command line's `msb cp` is made of these.
//!
//! ```text
//!  copy_into:  pack (a thread) ─► channel ─► stdin of an archive session ─► the agent unpacks
//!  copy_out:   the agent packs ─► stdout of an archive session ─► channel ─► unpack (a thread)
//! ```
//!
//! What a sandbox sends is never trusted: it can make nothing but the one name that was asked for. A copy that fails or is given up
//! ([`CopyControl::cancel`], or by dropping its future) leaves nothing half-written under a final name, on either side.

mod channel;
mod rules;

use std::ffi::CString;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::file_api::{ArchiveAction, ArchiveRequest};
use msb_protocol::id::SandboxName;
use msb_tree::{Owner, PackOptions, TreeError, UnpackOptions};
use tokio_util::sync::CancellationToken;

use self::channel::{ChannelReader, ChannelWriter, Piece};
use self::rules::{Found, Place};
use crate::client::Client;
use crate::error::Error;
use crate::session::{Session, SessionEvent};

/// Who copies if nobody is named: what is copied into a sandbox is its root's, as with docker.
const USER: &str = "0:0";
/// Pieces that wait between a thread and the stream.
const QUEUE_LEN: usize = 8;
/// Most bytes of a sandbox's warnings that are kept.
const WARNINGS_LEN_MAX: usize = 64 << 10;
/// Most links that are followed to a destination (as in Linux).
const LINKS_MAX: usize = 40;

/// How to copy.
#[derive(Clone, Debug, Default)]
pub struct CopyOptions {
    /// Keeps owners, set-id bits and all extended attributes, as far as the receiver may.
    pub archive: bool,
    /// Follows a symbolic link that is the source itself.
    pub follow_link: bool,
    /// In whose name the sandbox reads and writes: `USER|UID[:GROUP|GID]`; none: its root.
    pub user: Option<String>,
    /// What watches the copy and can end it.
    pub control: CopyControl,
}

/// Watches a copy, and ends it.
#[derive(Clone, Debug, Default)]
pub struct CopyControl {
    moved: Arc<AtomicU64>,
    cancelled: CancellationToken,
}

impl CopyControl {
    /// Bytes of the stream that were moved so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    /// Ends the copy: it fails with `cancelled` once everything unfinished is taken away.
    pub fn cancel(&self) {
        self.cancelled.cancel();
    }

    fn count(&self, len: usize) {
        self.moved.fetch_add(len as u64, Ordering::Relaxed);
    }

    async fn given_up(&self) -> Error {
        self.cancelled.cancelled().await;
        Error::Client(ApiError::new(ErrorCode::Cancelled, "the copy was given up; nothing is left half-written"))
    }
}

/// What a copy did.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct CopyReport {
    /// Bytes of the stream: contents and headers.
    pub bytes: u64,
    /// What was left out or could not be kept, a line each.
    pub warnings: Vec<String>,
}

/// A tar stream from a sandbox, piece by piece.
pub struct ArchiveStream {
    session: Session,
    control: CopyControl,
    warnings: Lines,
    over: bool,
}

impl ArchiveStream {
    /// The next piece; none when the stream has ended whole.
    ///
    /// # Errors
    /// What the sandbox met, `exec_lost` if the stream broke off, `cancelled`.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        while !self.over {
            let event = tokio::select! {
                event = self.session.next() => event?,
                error = self.control.given_up() => return Err(error),
            };
            match event {
                Some(SessionEvent::Stdout(piece)) => {
                    self.control.count(piece.len());
                    return Ok(Some(piece));
                }
                Some(SessionEvent::Stderr(text)) => self.warnings.add(&text),
                Some(SessionEvent::Exited(_)) => self.over = true,
                Some(SessionEvent::Started { .. } | SessionEvent::OutputLost { .. }) => {}
                None => return Err(lost()),
            }
        }
        Ok(None)
    }

    /// What was left out; complete once the stream has ended.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        self.warnings.lines()
    }
}

/// Lines of a sandbox, which may be anything: bounded, and fit to be shown.
#[derive(Default)]
struct Lines {
    bytes: Vec<u8>,
}

impl Lines {
    fn add(&mut self, text: &[u8]) {
        let room = WARNINGS_LEN_MAX - self.bytes.len();
        self.bytes.extend_from_slice(&text[..text.len().min(room)]);
    }

    fn lines(&self) -> Vec<String> {
        self.bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(msb_tree::shown).collect()
    }
}

impl Client {
    /// Copies a file or directory of this machine into a sandbox, by the rules of `docker cp`.
    ///
    /// # Errors
    /// `path_not_found`, `path_exists`, `disk_full` and what else either side's system answered; `cancelled`.
    pub async fn copy_into(
        &self,
        from: &Path,
        sandbox: &SandboxName,
        to: &str,
        options: &CopyOptions,
    ) -> Result<CopyReport, Error> {
        let source = from.as_os_str().as_bytes();
        let is_directory = host_kind(from, options.follow_link)?;
        let (to, found) = self.destination(sandbox, to, options).await?;
        let place = rules::place(source, is_directory, to.as_bytes(), found)?;
        let path = c_path(source)?;
        let (name, follow) = (place.stream_name().to_vec(), options.follow_link);
        let (sender, pieces) = tokio::sync::mpsc::channel(QUEUE_LEN);
        let packing = tokio::task::spawn_blocking(move || {
            let mut warnings = Vec::new();
            let options = PackOptions { path: &path, name: &name, follow };
            let outcome = msb_tree::pack(options, ChannelWriter::new(&sender), &mut |warning| warnings.push(warning));
            if outcome.is_ok() {
                // Nobody left to read it: then the other side says why.
                let _ = sender.blocking_send(Piece::End);
            }
            outcome.map(|_| warnings)
        });
        let input = futures_util::stream::unfold(pieces, |mut pieces| async move {
            match pieces.recv().await {
                Some(Piece::Data(data)) => Some((Ok(data), pieces)),
                Some(Piece::End) => None,
                // The thread tells why.
                None => Some((Err(lost()), pieces)),
            }
        });
        let sent = self.fill(sandbox, place, Box::pin(input), options).await;
        let packed = packing.await.map_err(Error::protocol)?;
        match (packed, sent) {
            // A thread whose stream broke has nothing to say about why.
            (Ok(_) | Err(TreeError::Stream(_)), Err(error)) => Err(error),
            (Err(error), _) => Err(local(error)),
            (Ok(mut warnings), Ok(mut report)) => {
                warnings.append(&mut report.warnings);
                Ok(CopyReport { warnings, ..report })
            }
        }
    }

    /// Copies a file or directory of a sandbox to this machine, by the rules of `docker cp`. The sandbox can make nothing but the one
    /// name that was asked for, or, for a source that ends with `/.`, what is in the destination.
    ///
    /// # Errors
    /// As [`Client::copy_into`]; `invalid_archive` if the sandbox tries what it must not.
    pub async fn copy_out(
        &self,
        sandbox: &SandboxName,
        from: &str,
        to: &Path,
        options: &CopyOptions,
    ) -> Result<CopyReport, Error> {
        let is_directory = self.source(sandbox, from, options).await?;
        let (to, found) = host_destination(to)?;
        let place = rules::place(from.as_bytes(), is_directory, to.as_os_str().as_bytes(), found)?;
        let directory = {
            let path = PathBuf::from(std::ffi::OsString::from_vec(place.directory.clone()));
            let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
            let opened = rustix::fs::open(&path, flags, rustix::fs::Mode::empty());
            opened.map_err(|errno| {
                local(TreeError::File { what: "open the directory", path: msb_tree::shown(&place.directory), errno })
            })?
        };
        let name = stream_name(&place)?;
        let mut stream = self.archive_out(sandbox, from, name, options).await?;
        let (sender, pieces) = tokio::sync::mpsc::channel(QUEUE_LEN);
        let owner = if options.archive { Owner::Stream } else { Owner::Caller };
        let only = place.name;
        let unpacking = tokio::task::spawn_blocking(move || {
            let mut warnings = Vec::new();
            let options = UnpackOptions { name: only.as_deref(), owner };
            let input = ChannelReader::new(pieces);
            msb_tree::unpack(directory.as_fd(), options, input, &mut |warning| warnings.push(warning)).map(|_| warnings)
        });
        let received = async {
            loop {
                let (piece, last) = stream.next().await?.map_or((Piece::End, true), |data| (Piece::Data(data), false));
                if sender.send(piece).await.is_err() || last {
                    return Ok(());
                }
            }
        }
        .await;
        drop(sender);
        // Waited for in every case: what was unfinished is gone by then.
        let unpacked = unpacking.await.map_err(Error::protocol)?;
        match (unpacked, received) {
            (Ok(_) | Err(TreeError::Stream(_)), Err(error)) => Err(error),
            (Err(error), _) => Err(local(error)),
            (Ok(mut warnings), Ok(())) => {
                warnings.append(&mut stream.warnings());
                Ok(CopyReport { bytes: options.control.bytes(), warnings })
            }
        }
    }

    /// Copies a file or directory from one sandbox to another, without a stop on this machine's disk.
    ///
    /// # Errors
    /// As [`Client::copy_into`].
    pub async fn copy_between(
        &self,
        from: (&SandboxName, &str),
        to: (&SandboxName, &str),
        options: &CopyOptions,
    ) -> Result<CopyReport, Error> {
        let is_directory = self.source(from.0, from.1, options).await?;
        let (destination, found) = self.destination(to.0, to.1, options).await?;
        let place = rules::place(from.1.as_bytes(), is_directory, destination.as_bytes(), found)?;
        let name = stream_name(&place)?;
        let mut stream = self.archive_out(from.0, from.1, name, options).await?;
        // Counted once, where it is sent.
        stream.control = CopyControl::default();
        let warnings = Arc::new(std::sync::Mutex::new(Vec::new()));
        let input =
            futures_util::stream::unfold((stream, Arc::clone(&warnings)), |(mut stream, warnings)| async move {
                match stream.next().await {
                    Ok(Some(piece)) => Some((Ok(piece), (stream, warnings))),
                    Ok(None) => {
                        *warnings.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = stream.warnings();
                        None
                    }
                    Err(error) => Some((Err(error), (stream, warnings))),
                }
            });
        let mut report = self.fill(to.0, place, Box::pin(input), options).await?;
        let mut all = std::mem::take(&mut *warnings.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        all.append(&mut report.warnings);
        Ok(CopyReport { warnings: all, ..report })
    }

    /// A file or directory of a sandbox as a tar stream, its root under its own name.
    ///
    /// # Errors
    /// `sandbox_not_found`, `path_not_found` and what else the sandbox's system answers, also later in the stream.
    pub async fn pack(&self, sandbox: &SandboxName, path: &str, options: &CopyOptions) -> Result<ArchiveStream, Error> {
        let place = rules::place(path.as_bytes(), true, b"/", Found::Directory)?;
        let name = stream_name(&place)?;
        self.archive_out(sandbox, path, name, options).await
    }

    /// Unpacks a tar stream in a directory of a sandbox.
    ///
    /// # Errors
    /// `path_not_found` without the directory, `invalid_archive`, `disk_full`; the stream's own; `cancelled`.
    pub async fn unpack<S>(
        &self,
        sandbox: &SandboxName,
        directory: &str,
        input: S,
        options: &CopyOptions,
    ) -> Result<CopyReport, Error>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    {
        let place = Place { directory: directory.as_bytes().to_vec(), name: None };
        let input = input.map(|piece| {
            piece.map_err(|error| Error::Client(ApiError::new(ErrorCode::FileFailed, format!("cannot read: {error}"))))
        });
        self.fill(sandbox, place, Box::pin(input), options).await
    }

    /// Sends a stream to a sandbox that unpacks it.
    async fn fill(
        &self,
        sandbox: &SandboxName,
        place: Place,
        mut input: std::pin::Pin<Box<dyn Stream<Item = Result<Bytes, Error>> + Send>>,
        options: &CopyOptions,
    ) -> Result<CopyReport, Error> {
        let action = ArchiveAction::Unpack {
            directory: text(place.directory)?,
            name: place.name.map(text).transpose()?,
            keep_owner: options.archive,
        };
        let mut session = self.archive(sandbox, action, options, true).await?;
        let mut warnings = Lines::default();
        let stdin = session.take_stdin();
        let sending = async {
            let Some(mut stdin) = stdin else { return Ok(()) };
            while let Some(piece) = input.next().await {
                let piece = piece?;
                if stdin.write_all(&piece).await.is_err() {
                    // The other half tells why.
                    std::future::pending::<()>().await;
                }
                options.control.count(piece.len());
            }
            if stdin.finish().await.is_err() {
                std::future::pending::<()>().await;
            }
            Ok::<(), Error>(())
        };
        let hearing = async {
            loop {
                match session.next().await? {
                    Some(SessionEvent::Exited(_)) => return Ok::<(), Error>(()),
                    Some(SessionEvent::Stderr(text)) => warnings.add(&text),
                    Some(_) => {}
                    None => return Err(lost()),
                }
            }
        };
        let both = async {
            tokio::pin!(hearing);
            tokio::select! {
                heard = &mut hearing => heard,
                sent = sending => {
                    // An error ends the session, and with it what was unfinished.
                    sent?;
                    hearing.await
                }
            }
        };
        tokio::select! {
            outcome = both => outcome?,
            error = options.control.given_up() => return Err(error),
        }
        Ok(CopyReport { bytes: options.control.bytes(), warnings: warnings.lines() })
    }

    async fn archive_out(
        &self,
        sandbox: &SandboxName,
        path: &str,
        name: String,
        options: &CopyOptions,
    ) -> Result<ArchiveStream, Error> {
        let action = ArchiveAction::Pack { path: path.to_owned(), name, follow: options.follow_link };
        let session = self.archive(sandbox, action, options, false).await?;
        Ok(ArchiveStream { session, control: options.control.clone(), warnings: Lines::default(), over: false })
    }

    async fn archive(
        &self,
        sandbox: &SandboxName,
        action: ArchiveAction,
        options: &CopyOptions,
        stdin: bool,
    ) -> Result<Session, Error> {
        let user = Some(options.user.clone().unwrap_or_else(|| USER.to_owned()));
        self.archive_session(sandbox, ArchiveRequest { user, action }, stdin).await
    }

    fn files_of(&self, sandbox: &SandboxName, options: &CopyOptions) -> crate::fs::Fs {
        let user = options.user.clone().unwrap_or_else(|| USER.to_owned());
        crate::fs::Fs::new(self.clone(), sandbox.clone()).as_user(user)
    }

    /// Whether the source in a sandbox is a directory.
    async fn source(&self, sandbox: &SandboxName, path: &str, options: &CopyOptions) -> Result<bool, Error> {
        let files = self.files_of(sandbox, options);
        let attributes = if options.follow_link { files.stat(path).await } else { files.stat_link(path).await };
        Ok(attributes?.is_directory())
    }

    /// The destination in a sandbox with a link in its last component followed, and what is there.
    async fn destination(
        &self,
        sandbox: &SandboxName,
        path: &str,
        options: &CopyOptions,
    ) -> Result<(String, Found), Error> {
        let files = self.files_of(sandbox, options);
        let mut path = path.to_owned();
        for _ in 0..LINKS_MAX {
            match files.stat_link(&path).await {
                Ok(attributes) if attributes.is_symlink() => {}
                Ok(attributes) => {
                    return Ok((path, if attributes.is_directory() { Found::Directory } else { Found::File }));
                }
                Err(error) if error.code() == ErrorCode::PathNotFound => return Ok((path, Found::Nothing)),
                Err(error) => return Err(error),
            }
            let target = files.read_link(&path).await?;
            path = text(followed(path.as_bytes(), target.into_bytes()))?;
        }
        Err(too_many_links(path.as_bytes()))
    }
}

/// The destination on this machine, as [`Client::destination`].
fn host_destination(path: &Path) -> Result<(PathBuf, Found), Error> {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        match std::fs::symlink_metadata(&path) {
            Ok(found) if found.is_symlink() => {}
            Ok(found) => return Ok((path, if found.is_dir() { Found::Directory } else { Found::File })),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((path, Found::Nothing)),
            Err(error) => return Err(host_failure("look at", &path, &error)),
        }
        let target = std::fs::read_link(&path).map_err(|error| host_failure("read", &path, &error))?;
        let next = followed(path.as_os_str().as_bytes(), target.into_os_string().into_vec());
        path = PathBuf::from(std::ffi::OsString::from_vec(next));
    }
    Err(too_many_links(path.as_os_str().as_bytes()))
}

/// What the link at a path leads to.
fn followed(path: &[u8], target: Vec<u8>) -> Vec<u8> {
    if target.starts_with(b"/") {
        return target;
    }
    let directory = rules::split(path).map_or_else(|| b"/".to_vec(), |(directory, _)| directory);
    [&directory, &b"/"[..], &target].concat()
}

fn too_many_links(path: &[u8]) -> Error {
    let message = format!("'{}' leads through too many symbolic links", msb_tree::shown(path));
    Error::Client(ApiError::new(ErrorCode::FileFailed, message))
}

/// Whether a source on this machine is a directory.
fn host_kind(path: &Path, follow: bool) -> Result<bool, Error> {
    let found = if follow { std::fs::metadata(path) } else { std::fs::symlink_metadata(path) };
    found.map(|found| found.is_dir()).map_err(|error| host_failure("look at", path, &error))
}

fn host_failure(what: &'static str, path: &Path, error: &std::io::Error) -> Error {
    let path = msb_tree::shown(path.as_os_str().as_bytes());
    match error.raw_os_error() {
        Some(errno) => local(TreeError::File { what, path, errno: rustix::io::Errno::from_raw_os_error(errno) }),
        None => Error::Client(ApiError::new(ErrorCode::InvalidConfig, format!("cannot {what} '{path}': {error}"))),
    }
}

/// An error of this machine's side.
fn local(error: TreeError) -> Error {
    let mut api = ApiError::new(error.code(), format!("{error} (on this machine)"));
    if matches!(error, TreeError::Refused { .. } | TreeError::Malformed(_)) {
        api.message = error.to_string();
    }
    if let Some(hint) = error.hint() {
        api = api.with_hint(hint);
    }
    Error::Client(api)
}

fn lost() -> Error {
    Error::Client(ApiError::new(ErrorCode::ExecLost, "the tar stream broke off"))
}

fn stream_name(place: &Place) -> Result<String, Error> {
    text(place.stream_name().to_vec())
}

/// Paths of a sandbox are text in the control API.
fn text(bytes: Vec<u8>) -> Result<String, Error> {
    String::from_utf8(bytes).map_err(|error| {
        let message = format!("the path '{}' is no UTF-8 text", msb_tree::shown(error.as_bytes()));
        let hint = "copy the directory it is in: names below the path may be any bytes";
        Error::InvalidConfig(ApiError::new(ErrorCode::InvalidConfig, message).with_hint(hint))
    })
}

fn c_path(path: &[u8]) -> Result<CString, Error> {
    CString::new(path)
        .map_err(|_| Error::InvalidConfig(ApiError::new(ErrorCode::InvalidConfig, "a path has a zero byte")))
}
