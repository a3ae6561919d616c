//! Files of a sandbox: read, write, list and change them without a command inside. Every error of the sandbox's system carries its
//! errno ([`crate::protocol::error::ApiError::errno`]).

use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http_body_util::BodyExt;
use msb_protocol::file_api::{DirectoryEntry, FileAnswer, FileCall, FileCallRequest, WatchRecord};
use msb_protocol::files::{FileAttributes, FileChange};
use msb_protocol::id::SandboxName;

use crate::client::{Client, JsonLines};
use crate::error::Error;

/// The files of one sandbox, in the name of one of its users. Cheap to clone. Relative paths begin at `/`.
#[derive(Clone, Debug)]
pub struct Fs {
    client: Client,
    sandbox: SandboxName,
    user: Option<String>,
}

/// Content as it arrives.
pub struct Content {
    body: Pin<Box<dyn Stream<Item = Result<Bytes, Error>> + Send>>,
}

impl Stream for Content {
    type Item = Result<Bytes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.body.as_mut().poll_next(context)
    }
}

impl Fs {
    pub(crate) fn new(client: Client, sandbox: SandboxName) -> Self {
        Self { client, sandbox, user: None }
    }

    /// Acts as another user: `USER|UID[:GROUP|GID]`.
    #[must_use]
    pub fn as_user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    async fn call(&self, call: FileCall) -> Result<FileAnswer, Error> {
        self.client.file_call(&self.sandbox, &FileCallRequest { user: self.user.clone(), call }).await
    }

    async fn done(&self, call: FileCall) -> Result<(), Error> {
        self.call(call).await.map(drop)
    }

    /// Reads a whole file of at most `len_max` bytes.
    ///
    /// # Errors
    /// `path_not_found`, `permission_denied`, `file_failed`; `limit_exceeded` for a longer file.
    pub async fn read(&self, path: &str, len_max: usize) -> Result<Vec<u8>, Error> {
        let mut content = self.read_stream(path).await?;
        let mut bytes = Vec::new();
        while let Some(piece) = content.next().await {
            let piece = piece?;
            if bytes.len() + piece.len() > len_max {
                let error = msb_protocol::error::ApiError::new(
                    msb_protocol::error::ErrorCode::LimitExceeded,
                    format!("'{path}' has more than {len_max} bytes"),
                );
                return Err(Error::Client(error.with_hint("read it as a stream, or raise len_max")));
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    /// Reads a file as a stream.
    ///
    /// # Errors
    /// As [`Fs::read`].
    pub async fn read_stream(&self, path: &str) -> Result<Content, Error> {
        self.read_range(path, 0, None).await
    }

    /// Reads a part of a file as a stream: from `offset`, at most `len` bytes.
    ///
    /// # Errors
    /// As [`Fs::read`].
    pub async fn read_range(&self, path: &str, offset: u64, len: Option<u64>) -> Result<Content, Error> {
        let mut pairs = self.pairs(path);
        pairs.push(("offset", offset.to_string()));
        pairs.extend(len.map(|len| ("len", len.to_string())));
        let (body, connection) = self.client.file_content(&self.sandbox, &pairs).await?;
        let body = stream::unfold((body, connection), |(mut body, connection)| async move {
            loop {
                let piece = match body.frame().await? {
                    Ok(frame) => match frame.into_data() {
                        Ok(data) => Ok(data),
                        Err(_) => continue,
                    },
                    Err(error) => Err(Error::unavailable(format!("the file's content broke off: {error}"))),
                };
                return Some((piece, (body, connection)));
            }
        });
        Ok(Content { body: Box::pin(body) })
    }

    /// Writes a whole file: it appears under its name only when all of it is there. A file that was there keeps mode and owner.
    ///
    /// # Errors
    /// `path_not_found`, `permission_denied`, `disk_full`, `file_failed`.
    pub async fn write(&self, path: &str, content: impl Into<Bytes>) -> Result<FileAttributes, Error> {
        let content: Bytes = content.into();
        self.write_stream(path, None, stream::iter([Ok(content)])).await
    }

    /// As [`Fs::write`], from a stream, with permission bits.
    ///
    /// # Errors
    /// As [`Fs::write`]; an error of the stream ends it and nothing is left behind.
    pub async fn write_stream<S>(&self, path: &str, mode: Option<u32>, content: S) -> Result<FileAttributes, Error>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    {
        let mut pairs = self.pairs(path);
        pairs.extend(mode.map(|mode| ("mode", mode.to_string())));
        attributes(self.client.file_write(&self.sandbox, &pairs, content).await?)
    }

    /// Adds to the end of a file, which is made if it does not exist.
    ///
    /// # Errors
    /// As [`Fs::write`].
    pub async fn append(&self, path: &str, content: impl Into<Bytes>) -> Result<FileAttributes, Error> {
        let mut pairs = self.pairs(path);
        pairs.push(("append", "true".to_owned()));
        let content: Bytes = content.into();
        attributes(self.client.file_write(&self.sandbox, &pairs, stream::iter([Ok(content)])).await?)
    }

    /// Attributes of a path; a symbolic link is followed.
    ///
    /// # Errors
    /// `path_not_found`, `permission_denied`, `file_failed`.
    pub async fn stat(&self, path: &str) -> Result<FileAttributes, Error> {
        attributes(self.call(FileCall::Stat { path: path.into(), no_follow: false }).await?)
    }

    /// Attributes of a path; a symbolic link is meant itself.
    ///
    /// # Errors
    /// As [`Fs::stat`].
    pub async fn stat_link(&self, path: &str) -> Result<FileAttributes, Error> {
        attributes(self.call(FileCall::Stat { path: path.into(), no_follow: true }).await?)
    }

    /// Whether there is anything at a path.
    ///
    /// # Errors
    /// As [`Fs::stat`], but for `path_not_found`.
    pub async fn exists(&self, path: &str) -> Result<bool, Error> {
        match self.stat_link(path).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() && error.api().errno.is_some() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The entries of a directory, sorted by name.
    ///
    /// # Errors
    /// As [`Fs::stat`]; `limit_exceeded` for a directory of more than 65,536 entries.
    pub async fn list(&self, path: &str) -> Result<Vec<DirectoryEntry>, Error> {
        match self.call(FileCall::List { path: path.into() }).await? {
            FileAnswer::Entries { entries } => Ok(entries),
            _ => Err(nonsense()),
        }
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// `path_exists`, `path_not_found`, `permission_denied`, `file_failed`.
    pub async fn make_directory(&self, path: &str) -> Result<(), Error> {
        self.done(FileCall::MakeDirectory { path: path.into(), mode: None, parents: false }).await
    }

    /// Makes a directory with its missing parents; one that exists is fine.
    ///
    /// # Errors
    /// As [`Fs::make_directory`].
    pub async fn make_directories(&self, path: &str) -> Result<(), Error> {
        self.done(FileCall::MakeDirectory { path: path.into(), mode: None, parents: true }).await
    }

    /// Removes a file or an empty directory.
    ///
    /// # Errors
    /// `path_not_found`, `path_exists` for a directory that is not empty, `permission_denied`, `file_failed`.
    pub async fn remove(&self, path: &str) -> Result<(), Error> {
        self.done(FileCall::Remove { path: path.into(), recursive: false }).await
    }

    /// Removes whatever it is, with everything below it; links are not followed.
    ///
    /// # Errors
    /// As [`Fs::remove`].
    pub async fn remove_all(&self, path: &str) -> Result<(), Error> {
        self.done(FileCall::Remove { path: path.into(), recursive: true }).await
    }

    /// Renames; a file that has the new name is replaced.
    ///
    /// # Errors
    /// As [`Fs::remove`].
    pub async fn rename(&self, from: &str, to: &str) -> Result<(), Error> {
        self.done(FileCall::Rename { from: from.into(), to: to.into(), no_replace: false }).await
    }

    /// Makes a symbolic link at `path` that leads to `target`.
    ///
    /// # Errors
    /// `path_exists`, `path_not_found`, `permission_denied`, `file_failed`.
    pub async fn symlink(&self, target: &str, path: &str) -> Result<(), Error> {
        self.done(FileCall::Symlink { target: target.into(), path: path.into() }).await
    }

    /// Gives a file another name.
    ///
    /// # Errors
    /// As [`Fs::symlink`].
    pub async fn hard_link(&self, target: &str, path: &str) -> Result<(), Error> {
        self.done(FileCall::HardLink { target: target.into(), path: path.into() }).await
    }

    /// What a symbolic link leads to.
    ///
    /// # Errors
    /// As [`Fs::stat`]; errno EINVAL for what is no link.
    pub async fn read_link(&self, path: &str) -> Result<String, Error> {
        text(self.call(FileCall::ReadLink { path: path.into() }).await?)
    }

    /// The path without links, dots and doubled slashes.
    ///
    /// # Errors
    /// As [`Fs::stat`].
    pub async fn real_path(&self, path: &str) -> Result<String, Error> {
        text(self.call(FileCall::RealPath { path: path.into() }).await?)
    }

    /// Changes mode, owner, times or size.
    ///
    /// # Errors
    /// As [`Fs::stat`].
    pub async fn change(&self, path: &str, change: FileChange) -> Result<(), Error> {
        self.done(FileCall::Change { path: path.into(), no_follow: false, change }).await
    }

    /// Changes permission bits.
    ///
    /// # Errors
    /// As [`Fs::stat`].
    pub async fn chmod(&self, path: &str, mode: u32) -> Result<(), Error> {
        self.change(path, FileChange { mode: Some(mode), ..FileChange::default() }).await
    }

    /// Changes owner and group.
    ///
    /// # Errors
    /// As [`Fs::stat`].
    pub async fn chown(&self, path: &str, uid: u32, gid: u32) -> Result<(), Error> {
        self.change(path, FileChange { uid: Some(uid), gid: Some(gid), ..FileChange::default() }).await
    }

    /// Watches a directory's entries or a file. The first record says that the watch is in place.
    ///
    /// # Errors
    /// As [`Fs::stat`].
    pub async fn watch(&self, path: &str, recursive: bool) -> Result<JsonLines<WatchRecord>, Error> {
        let mut pairs = self.pairs(path);
        pairs.push(("recursive", recursive.to_string()));
        self.client.file_watch(&self.sandbox, &pairs).await
    }

    /// Copies a file of this machine into the sandbox.
    ///
    /// # Errors
    /// As [`Fs::write`]; `path_not_found` for the file here.
    pub async fn copy_from_host(&self, from: &Path, to: &str) -> Result<FileAttributes, Error> {
        let failed = |error: &std::io::Error| local(from, error);
        let file = tokio::fs::File::open(from).await.map_err(|error| failed(&error))?;
        let mode = {
            use std::os::unix::fs::MetadataExt;
            file.metadata().await.map_err(|error| failed(&error))?.mode() & 0o7777
        };
        self.write_stream(to, Some(mode), pieces(file)).await
    }
}

/// A file of this machine in pieces.
fn pieces(file: tokio::fs::File) -> impl Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    stream::unfold(Some(file), |file| async move {
        use tokio::io::AsyncReadExt;
        let mut file = file?;
        let mut piece = Vec::with_capacity(PIECE_LEN);
        match (&mut file).take(PIECE_LEN as u64).read_to_end(&mut piece).await {
            Ok(0) => None,
            Ok(_) => Some((Ok(Bytes::from(piece)), Some(file))),
            Err(error) => Some((Err(error), None)),
        }
    })
}

/// Bytes of one piece of a file that is sent.
const PIECE_LEN: usize = 256 << 10;

fn local(path: &Path, error: &std::io::Error) -> Error {
    use msb_protocol::error::{ApiError, ErrorCode};
    let code = match error.kind() {
        std::io::ErrorKind::NotFound => ErrorCode::PathNotFound,
        std::io::ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
        _ => ErrorCode::FileFailed,
    };
    Error::Client(ApiError::new(code, format!("cannot read {}: {error}", path.display())))
}

fn attributes(answer: FileAnswer) -> Result<FileAttributes, Error> {
    match answer {
        FileAnswer::Attributes { attributes } => Ok(attributes),
        _ => Err(nonsense()),
    }
}

fn text(answer: FileAnswer) -> Result<String, Error> {
    match answer {
        FileAnswer::Path { path } => Ok(path),
        _ => Err(nonsense()),
    }
}

fn nonsense() -> Error {
    Error::protocol("it fits no file call")
}

impl Fs {
    fn pairs(&self, path: &str) -> Vec<(&'static str, String)> {
        let mut pairs = vec![("path", path.to_owned())];
        pairs.extend(self.user.clone().map(|user| ("user", user)));
        pairs
    }
}
