//! Tools about files in a sandbox. Content is text where it is UTF-8, else base64, and never more than a bounded piece of it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::{StreamExt, stream};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::files::{FileAttributes, FileTime};
use msb_sdk::Fs;
use rmcp::handler::server::wrapper::Parameters;
use rmcp::model::CallToolResult;
use rmcp::schemars::JsonSchema;
use rmcp::service::RequestContext;
use rmcp::{RoleServer, tool, tool_router};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Server;

/// Bytes that one read gives when the caller does not say.
const READ_LEN_DEFAULT: u64 = 64 << 10;
/// Most bytes that one read gives.
const READ_LEN_MAX: u64 = 1 << 20;
/// Largest file that one call writes, in bytes.
const WRITE_LEN_MAX: usize = 4 << 20;
/// Most entries that one listing gives.
const LIST_LEN_MAX: usize = 1000;

/// How content is written in a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(crate = "rmcp::schemars")]
pub enum Encoding {
    /// As it is.
    #[default]
    Text,
    /// RFC 4648, for bytes that are no text.
    Base64,
}

/// Arguments of the tools that only need a path.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct PathArguments {
    /// The sandbox's name
    name: String,
    /// The path in the sandbox; a relative one begins at /
    path: String,
}

/// Arguments of `sandbox_fs_read`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct ReadArguments {
    /// The sandbox's name
    name: String,
    /// The file in the sandbox; a relative path begins at /
    path: String,
    /// First byte to read, 0 if not given
    #[serde(default)]
    offset: u64,
    /// Most bytes to read: 65536 if not given, 1048576 at most
    #[serde(default)]
    length: Option<u64>,
}

/// Arguments of `sandbox_fs_write`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct WriteArguments {
    /// The sandbox's name
    name: String,
    /// The file in the sandbox; its directory must exist
    path: String,
    /// What it shall hold: at most 4194304 bytes
    content: String,
    /// Whether the content is text as it is (text, the default) or base64
    #[serde(default)]
    encoding: Encoding,
    /// Add to its end in place of replacing it
    #[serde(default)]
    append: bool,
    /// Permission bits in octal, for example 755; those it has, else 644, if not given. Not with append
    #[serde(default)]
    mode: Option<String>,
}

/// Arguments of `sandbox_fs_mkdir`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct MkdirArguments {
    /// The sandbox's name
    name: String,
    /// The directory to make
    path: String,
    /// Make missing parents too, and take a directory that exists for done; true if not given
    #[serde(default)]
    parents: Option<bool>,
}

/// Arguments of `sandbox_fs_remove`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(crate = "rmcp::schemars")]
pub struct RemoveArguments {
    /// The sandbox's name
    name: String,
    /// The file, link or directory to remove
    path: String,
    /// A directory with everything in it
    #[serde(default)]
    recursive: bool,
}

fn time(time: FileTime) -> Option<String> {
    jiff::Timestamp::from_second(time.seconds).ok().map(|at| at.to_string())
}

/// Attributes in the words of ls(1).
fn shown(attributes: &FileAttributes) -> Value {
    let kind = match attributes.mode & 0o170_000 {
        0o100_000 => "file",
        0o040_000 => "directory",
        0o120_000 => "symlink",
        0o020_000 | 0o060_000 => "device",
        0o010_000 => "fifo",
        0o140_000 => "socket",
        _ => "unknown",
    };
    json!({
        "kind": kind, "size": attributes.size, "mode": format!("{:o}", attributes.mode & 0o7777), "uid": attributes.uid,
        "gid": attributes.gid, "modified": time(attributes.modified),
    })
}

/// A piece of a file as text if it is that, apart from a character that the piece's end cuts; else as base64.
fn encoded(mut bytes: Vec<u8>, more: bool) -> (usize, &'static str, String) {
    if let Err(error) = std::str::from_utf8(&bytes)
        && more
        && error.error_len().is_none()
        && error.valid_up_to() > 0
    {
        bytes.truncate(error.valid_up_to());
    }
    let len = bytes.len();
    match String::from_utf8(bytes) {
        Ok(text) => (len, "text", text),
        Err(error) => (len, "base64", BASE64.encode(error.as_bytes())),
    }
}

fn decoded(content: String, encoding: Encoding) -> Result<Vec<u8>, ApiError> {
    let bytes = match encoding {
        Encoding::Text => content.into_bytes(),
        Encoding::Base64 => BASE64.decode(content.trim()).map_err(|error| {
            ApiError::new(ErrorCode::InvalidRequest, format!("the content is no base64: {error}"))
                .with_hint("give encoding \"text\" for content that is text as it is")
        })?,
    };
    if bytes.len() > WRITE_LEN_MAX {
        let error = ApiError::new(ErrorCode::LimitExceeded, format!("the content has {} bytes", bytes.len()));
        return Err(error.with_hint(format!("write at most {WRITE_LEN_MAX} bytes, and add the rest with append")));
    }
    Ok(bytes)
}

fn mode(text: Option<&str>) -> Result<Option<u32>, ApiError> {
    let wrong = |text: &str| ApiError::new(ErrorCode::InvalidConfig, format!("{text:?} is no mode in octal, as 755"));
    text.map(|text| u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777).ok_or_else(|| wrong(text)))
        .transpose()
}

impl Server {
    async fn fs(&self, name: &str) -> Result<Fs, ApiError> {
        Ok(self.sandbox(name).await?.fs())
    }
}

#[tool_router(router = file_tools, vis = "pub(super)")]
impl Server {
    /// Reads a file of a sandbox, or a piece of it. Content that is no UTF-8 comes as base64; next_offset says where to go on.
    #[tool(annotations(read_only_hint = true))]
    async fn sandbox_fs_read(
        &self,
        Parameters(arguments): Parameters<ReadArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("sandbox_fs_read", &context, async {
            let fs = self.fs(&arguments.name).await?;
            let length = arguments.length.unwrap_or(READ_LEN_DEFAULT).clamp(1, READ_LEN_MAX);
            // One byte more says whether there is more; files of /proc have no size to ask for.
            let mut content = fs.read_range(&arguments.path, arguments.offset, Some(length + 1)).await?;
            let mut bytes = Vec::new();
            while let Some(piece) = content.next().await {
                bytes.extend_from_slice(&piece?);
                if bytes.len() as u64 > length {
                    break;
                }
            }
            let more = bytes.len() as u64 > length;
            bytes.truncate(usize::try_from(length).unwrap_or(usize::MAX));
            let (len, encoding, content) = encoded(bytes, more);
            let next_offset = more.then_some(arguments.offset + len as u64);
            Ok(json!({ "content": content, "encoding": encoding, "bytes": len, "next_offset": next_offset }))
        })
        .await
    }

    /// Writes a file of a sandbox. It appears under its name only when all of it is there, and an existing one keeps its owner.
    #[tool(annotations(read_only_hint = false, destructive_hint = true))]
    async fn sandbox_fs_write(
        &self,
        Parameters(arguments): Parameters<WriteArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("sandbox_fs_write", &context, async {
            let mode = mode(arguments.mode.as_deref())?;
            let bytes = decoded(arguments.content, arguments.encoding)?;
            let fs = self.fs(&arguments.name).await?;
            let attributes = match (arguments.append, mode) {
                (true, None) => fs.append(&arguments.path, bytes).await?,
                (true, Some(_)) => {
                    return Err(ApiError::new(ErrorCode::InvalidConfig, "mode cannot be given with append"));
                }
                (false, mode) => fs.write_stream(&arguments.path, mode, stream::iter([Ok(bytes.into())])).await?,
            };
            Ok(shown(&attributes))
        })
        .await
    }

    /// Lists a directory of a sandbox, sorted by name.
    #[tool(annotations(read_only_hint = true))]
    async fn sandbox_fs_list(
        &self,
        Parameters(arguments): Parameters<PathArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("sandbox_fs_list", &context, async {
            let entries = self.fs(&arguments.name).await?.list(&arguments.path).await?;
            let row = |(name, attributes): (&String, Option<Value>)| {
                let mut row = attributes.unwrap_or_else(|| json!({}));
                row["name"] = name.as_str().into();
                row
            };
            let rows: Vec<Value> = entries
                .iter()
                .take(LIST_LEN_MAX)
                .map(|entry| row((&entry.name, entry.attributes.as_ref().map(shown))))
                .collect();
            Ok(json!({ "entries": rows, "left_out": entries.len().saturating_sub(LIST_LEN_MAX) }))
        })
        .await
    }

    /// Makes a directory in a sandbox.
    #[tool(annotations(read_only_hint = false, destructive_hint = false, idempotent_hint = true))]
    async fn sandbox_fs_mkdir(
        &self,
        Parameters(arguments): Parameters<MkdirArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("sandbox_fs_mkdir", &context, async {
            let fs = self.fs(&arguments.name).await?;
            if arguments.parents.unwrap_or(true) {
                fs.make_directories(&arguments.path).await?;
            } else {
                fs.make_directory(&arguments.path).await?;
            }
            Ok(json!({ "made": arguments.path }))
        })
        .await
    }

    /// Removes a file, a link or a directory of a sandbox.
    #[tool(annotations(read_only_hint = false, destructive_hint = true))]
    async fn sandbox_fs_remove(
        &self,
        Parameters(arguments): Parameters<RemoveArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("sandbox_fs_remove", &context, async {
            let fs = self.fs(&arguments.name).await?;
            if arguments.recursive {
                fs.remove_all(&arguments.path).await?;
            } else {
                fs.remove(&arguments.path).await?;
            }
            Ok(json!({ "removed": arguments.path }))
        })
        .await
    }

    /// Tells kind, size, mode, owner and time of a path in a sandbox; of a symbolic link also where it leads.
    #[tool(annotations(read_only_hint = true))]
    async fn sandbox_fs_stat(
        &self,
        Parameters(arguments): Parameters<PathArguments>,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        self.answer("sandbox_fs_stat", &context, async {
            let fs = self.fs(&arguments.name).await?;
            let mut row = shown(&fs.stat_link(&arguments.path).await?);
            if row["kind"] == "symlink" {
                row["target"] = fs.read_link(&arguments.path).await?.into();
            }
            Ok(row)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_text_and_a_cut_character_waits_for_the_next_piece() {
        assert_eq!(encoded("grün".into(), false), (5, "text", "grün".into()));
        assert_eq!(encoded(b"gr\xc3".to_vec(), true), (2, "text", "gr".into()));
        assert_eq!(encoded(b"gr\xc3".to_vec(), false), (3, "base64", "Z3LD".into()));
        assert_eq!(encoded(vec![0xff, 0], true), (2, "base64", "/wA=".into()));
        assert_eq!(encoded(vec![0xc3], true), (1, "base64", "ww==".into()), "a piece is never empty");
    }

    #[test]
    fn content_comes_in_two_encodings_and_within_its_limit() {
        assert_eq!(decoded("/wA=".into(), Encoding::Text).unwrap(), b"/wA=");
        assert_eq!(decoded("/wA=\n".into(), Encoding::Base64).unwrap(), [0xff, 0]);
        assert_eq!(decoded("?".into(), Encoding::Base64).unwrap_err().code, ErrorCode::InvalidRequest);
        let long = "x".repeat(WRITE_LEN_MAX + 1);
        assert_eq!(decoded(long, Encoding::Text).unwrap_err().code, ErrorCode::LimitExceeded);
    }

    #[test]
    fn modes_are_octal() {
        assert_eq!(mode(Some("755")).unwrap(), Some(0o755));
        assert_eq!(mode(None).unwrap(), None);
        for text in ["", "8", "17777", "rwx"] {
            assert!(mode(Some(text)).is_err(), "{text}");
        }
    }
}
