//! Routes of files: calls that answer once, content as a stream in both directions, watches. Everything is done by the guest's agent in
//! a file session ([`Files`]); no path of a sandbox is ever looked up on the host.

use std::collections::VecDeque;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use msb_actors::vm::files::{Answer, Files};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::file_api::{
    ContentQuery, DirectoryEntry, FileAnswer, FileCall, FileCallRequest, LIST_LEN_MAX, WatchQuery, WatchRecord,
    WriteQuery,
};
use msb_protocol::files::{
    FILE_DATA_MAX, FileAttributes, FileChange, FileChangeKind, FileLink, FileMakeDirectory, FileOpen, FileOperation,
    FileOutcome, FilePath, FileRead, FileRemoveKind, FileRename, FileSetStat, FileSetStatHandle, FileWatch, FileWrite,
    OpenFiles,
};
use msb_protocol::id::SandboxName;
use tokio::sync::mpsc;

use super::ApiState;
use super::failure::{Failure, body, query};
use super::images::json_lines;
use super::sandboxes::name;

/// Reads and writes that are under way for one stream.
const AHEAD: usize = 8;
/// Pieces and lines that wait for a slow client.
const QUEUE_LEN: usize = 4;
/// errno(3) of a directory where a file was meant.
const EISDIR: i32 = 21;

#[utoipa::path(post, path = "/v1/sandboxes/{name}/files", params(("name" = String, Path)), request_body = FileCallRequest, responses((status = 200, body = FileAnswer), (status = "4XX", body = ApiError)))]
pub(crate) async fn call(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    bytes: Bytes,
) -> Result<Json<FileAnswer>, Failure> {
    let request: FileCallRequest = body(&bytes, None)?;
    let files = open(&state, &name(&sandbox)?, request.user, true).await?;
    Ok(Json(perform(&files, request.call).await?))
}

async fn open(state: &ApiState, sandbox: &SandboxName, user: Option<String>, counts: bool) -> Result<Files, ApiError> {
    let open = OpenFiles { user: user.unwrap_or_default(), at_home: false };
    Files::open(&state.daemon, sandbox, open, counts).await
}

async fn perform(files: &Files, call: FileCall) -> Result<FileAnswer, ApiError> {
    let operation = match call {
        FileCall::Stat { path, no_follow } => {
            return Ok(FileAnswer::Attributes { attributes: files.stat(path.as_bytes(), no_follow).await? });
        }
        FileCall::List { path } => return list(files, path).await,
        FileCall::Remove { path, recursive: true } => {
            files.remove(path.as_bytes(), FileRemoveKind::Tree).await?;
            return Ok(FileAnswer::Done);
        }
        FileCall::Remove { path, recursive: false } => {
            match files.remove(path.as_bytes(), FileRemoveKind::File).await {
                Err(error) if error.errno == Some(EISDIR) => {
                    files.remove(path.as_bytes(), FileRemoveKind::Directory).await?;
                }
                outcome => outcome?,
            }
            return Ok(FileAnswer::Done);
        }
        FileCall::ReadLink { path } => FileOperation::ReadLink(at(path)),
        FileCall::RealPath { path } => FileOperation::RealPath(at(path)),
        FileCall::MakeDirectory { path, mode, parents } => {
            FileOperation::MakeDirectory(FileMakeDirectory { path: path.into_bytes(), mode, parents })
        }
        FileCall::Rename { from, to, no_replace } => {
            FileOperation::Rename(FileRename { from: from.into_bytes(), to: to.into_bytes(), no_replace })
        }
        FileCall::Symlink { target, path } => {
            FileOperation::Symlink(FileLink { target: target.into_bytes(), path: path.into_bytes() })
        }
        FileCall::HardLink { target, path } => {
            FileOperation::HardLink(FileLink { target: target.into_bytes(), path: path.into_bytes() })
        }
        FileCall::Change { path, no_follow, change } => {
            FileOperation::SetStat(FileSetStat { path: path.into_bytes(), no_follow, change: Some(change) })
        }
    };
    match files.call(operation).await? {
        FileOutcome::Path(path) => Ok(FileAnswer::Path { path: text(&path) }),
        _ => Ok(FileAnswer::Done),
    }
}

fn at(path: String) -> FilePath {
    FilePath { path: path.into_bytes(), no_follow: false }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

async fn list(files: &Files, path: String) -> Result<FileAnswer, ApiError> {
    let handle = files.handle(FileOperation::OpenDirectory(at(path.clone()))).await?;
    let mut entries = Vec::new();
    loop {
        let batch = files.entries(handle).await?;
        if batch.is_empty() {
            break;
        }
        entries.extend(
            batch.into_iter().map(|entry| DirectoryEntry { name: text(&entry.name), attributes: entry.attributes }),
        );
        if entries.len() > LIST_LEN_MAX {
            let message = format!("the directory '{path}' has more than {LIST_LEN_MAX} entries");
            return Err(
                ApiError::new(ErrorCode::LimitExceeded, message).with_hint("list it with a command in the sandbox")
            );
        }
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(FileAnswer::Entries { entries })
}

#[utoipa::path(get, path = "/v1/sandboxes/{name}/files/content", params(("name" = String, Path), ContentQuery), responses((status = 200, body = String, content_type = "application/octet-stream", description = "the bytes; an answer that breaks off met an error"), (status = "4XX", body = ApiError)))]
pub(crate) async fn read(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    which: Result<Query<ContentQuery>, QueryRejection>,
) -> Result<Response, Failure> {
    let which = query(which)?;
    let files = open(&state, &name(&sandbox)?, which.user, true).await?;
    let handle = files.open_file(FileOpen { path: which.path.into_bytes(), read: true, ..FileOpen::default() }).await?;
    let end = which.len.map_or(u64::MAX, |len| which.offset.saturating_add(len));
    let (pieces, waiting) = mpsc::channel::<std::io::Result<Bytes>>(QUEUE_LEN);
    tokio::spawn(async move {
        if let Err(error) = pump_out(&files, handle, which.offset, end, &pieces).await {
            // The head is sent already: only a broken answer can tell.
            let _ = pieces.send(Err(std::io::Error::other(error.message))).await;
        }
    });
    let stream =
        futures_util::stream::unfold(waiting, |mut waiting| async move { Some((waiting.recv().await?, waiting)) });
    Ok(([(CONTENT_TYPE, "application/octet-stream")], Body::from_stream(stream)).into_response())
}

/// Reads from `offset` to `end` or the file's end, some requests ahead.
async fn pump_out(
    files: &Files,
    handle: u32,
    mut offset: u64,
    end: u64,
    pieces: &mpsc::Sender<std::io::Result<Bytes>>,
) -> Result<(), ApiError> {
    let mut ahead: VecDeque<(u32, Answer)> = VecDeque::new();
    let mut asked = offset;
    loop {
        while ahead.len() < AHEAD && asked < end {
            let len = u32::try_from((end - asked).min(FILE_DATA_MAX as u64)).unwrap_or(u32::MAX);
            let answer = files.start(FileOperation::Read(FileRead { handle, offset: asked, len })).await?;
            ahead.push_back((len, answer));
            asked += u64::from(len);
        }
        let Some((len, answer)) = ahead.pop_front() else { return Ok(()) };
        let FileOutcome::Data(data) = answer.wait().await? else {
            return Err(ApiError::new(ErrorCode::ExecLost, "the sandbox's agent answered a read with something else"));
        };
        if data.is_empty() {
            return Ok(());
        }
        offset += data.len() as u64;
        if data.len() < len as usize {
            // What was asked for beyond it does not fit any more: it is asked for anew, and answered with nothing at the end.
            ahead.clear();
            asked = offset;
        }
        if pieces.send(Ok(Bytes::from(data))).await.is_err() {
            return Ok(());
        }
    }
}

#[utoipa::path(put, path = "/v1/sandboxes/{name}/files/content", params(("name" = String, Path), WriteQuery), request_body(content = String, content_type = "application/octet-stream", description = "the bytes"), responses((status = 200, body = FileAnswer, description = "the file's attributes"), (status = "4XX", body = ApiError)))]
pub(crate) async fn write(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    how: Result<Query<WriteQuery>, QueryRejection>,
    request: Request,
) -> Result<Json<FileAnswer>, Failure> {
    let how = query(how)?;
    let files = open(&state, &name(&sandbox)?, how.user.clone(), true).await?;
    let place = WritePlace::find(&files, &how).await?;
    let mut offset = 0u64;
    let mut ahead = VecDeque::new();
    let mut body = request.into_body().into_data_stream();
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|error| {
            ApiError::new(ErrorCode::Cancelled, format!("the content broke off after {offset} bytes: {error}"))
        })?;
        for data in piece.chunks(FILE_DATA_MAX) {
            let write = FileWrite { handle: place.handle, offset, data: data.to_vec() };
            ahead.push_back(files.start(FileOperation::Write(write)).await?);
            offset += data.len() as u64;
            if ahead.len() >= AHEAD
                && let Some(answer) = ahead.pop_front()
            {
                answer.wait().await?;
            }
        }
    }
    for answer in ahead {
        answer.wait().await?;
    }
    let attributes = place.finish().await?;
    Ok(Json(FileAnswer::Attributes { attributes }))
}

/// Where content goes until it is whole. Dropped before that, what was begun is removed.
struct WritePlace {
    files: Files,
    handle: u32,
    /// The name under which it is made and the name it gets; none where it is written in place.
    names: Option<(Vec<u8>, Vec<u8>)>,
    change: FileChange,
}

impl WritePlace {
    async fn find(files: &Files, how: &WriteQuery) -> Result<Self, ApiError> {
        let path = how.path.clone().into_bytes();
        let in_place = |append: bool| FileOpen {
            path: path.clone(),
            write: true,
            append,
            create: append,
            truncate: !append,
            mode: Some(how.mode.unwrap_or(0o644)),
            ..FileOpen::default()
        };
        let place = |handle, names, change| Self { files: files.clone(), handle, names, change };
        if how.append {
            return Ok(place(files.open_file(in_place(true)).await?, None, FileChange::default()));
        }
        // A link is written through, as everywhere else.
        let real = files.path(FileOperation::RealPath(at(how.path.clone()))).await?;
        let old = match files.stat(&real, true).await {
            Ok(old) => Some(old),
            Err(error) if error.code == ErrorCode::PathNotFound => None,
            Err(error) => return Err(error),
        };
        if let Some(old) = &old
            && !old.is_file()
        {
            // A device or a FIFO stays what it is; a directory refuses.
            return Ok(place(files.open_file(in_place(false)).await?, None, FileChange::default()));
        }
        let mut temporary = real.clone();
        temporary.truncate(real.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1));
        temporary.extend_from_slice(format!(".msb-{}", uuid::Uuid::new_v4().simple()).as_bytes());
        let open = FileOpen {
            path: temporary.clone(),
            write: true,
            create: true,
            exclusive: true,
            mode: Some(0o600),
            ..FileOpen::default()
        };
        let handle = match files.open_file(open).await {
            Ok(handle) => handle,
            // The file may be written though its directory may not.
            Err(error) if error.code == ErrorCode::PermissionDenied && old.is_some() => {
                return Ok(place(files.open_file(in_place(false)).await?, None, FileChange::default()));
            }
            Err(error) => return Err(error),
        };
        let mode = how.mode.or(old.as_ref().map(|old| old.mode & 0o7777)).unwrap_or(0o644);
        let change = FileChange {
            mode: Some(mode),
            uid: old.as_ref().map(|old| old.uid),
            gid: old.as_ref().map(|old| old.gid),
            ..FileChange::default()
        };
        Ok(place(handle, Some((temporary, real)), change))
    }

    async fn finish(mut self) -> Result<FileAttributes, ApiError> {
        let handle = self.handle;
        if let Some((temporary, real)) = &self.names {
            let set = |change| FileOperation::SetStatHandle(FileSetStatHandle { handle, change: Some(change) });
            if self.change.uid.is_some() {
                let owner = FileChange { mode: None, ..self.change };
                // Only root may give a file away; others own what they write.
                match self.files.done(set(owner)).await {
                    Err(error) if error.code != ErrorCode::PermissionDenied => return Err(error),
                    _ => {}
                }
            }
            self.files.done(set(FileChange { mode: self.change.mode, ..FileChange::default() })).await?;
            let rename = FileRename { from: temporary.clone(), to: real.clone(), no_replace: false };
            self.files.done(FileOperation::Rename(rename)).await?;
            self.names = None;
        }
        let attributes =
            self.files.attributes(FileOperation::StatHandle(msb_protocol::files::FileHandle { handle })).await?;
        self.files.close(handle).await?;
        Ok(attributes)
    }
}

impl Drop for WritePlace {
    fn drop(&mut self) {
        if let Some((temporary, _)) = self.names.take() {
            let files = self.files.clone();
            tokio::spawn(async move {
                // If the sandbox is gone there is nothing to tell.
                let _ = files.remove(&temporary, FileRemoveKind::File).await;
            });
        }
    }
}

#[utoipa::path(get, path = "/v1/sandboxes/{name}/files/watch", params(("name" = String, Path), WatchQuery), responses((status = 200, body = WatchRecord, content_type = "application/x-ndjson", description = "lines, until the client or the sandbox ends it"), (status = "4XX", body = ApiError)))]
pub(crate) async fn watch(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    which: Result<Query<WatchQuery>, QueryRejection>,
) -> Result<Response, Failure> {
    let which = query(which)?;
    let files = open(&state, &name(&sandbox)?, which.user, false).await?;
    let mut changes = files.watch(FileWatch { path: which.path.into_bytes(), recursive: which.recursive }).await?;
    let (lines, waiting) = mpsc::channel(QUEUE_LEN);
    tokio::spawn(async move {
        let mut sent = lines.send(WatchRecord::Watching).await;
        while sent.is_ok() {
            let batch = tokio::select! {
                batch = changes.recv() => batch,
                () = lines.closed() => None,
            };
            let Some(batch) = batch else { break };
            for change in batch {
                let kind = FileChangeKind::try_from(change.kind).unwrap_or(FileChangeKind::Overflow);
                let record = WatchRecord::Change { kind, path: text(&change.path), directory: change.directory };
                sent = lines.send(record).await;
            }
        }
        drop(files);
    });
    Ok(json_lines(waiting))
}
