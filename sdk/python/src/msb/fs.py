"""Files of a sandbox: read, write, list and change them without a command inside. An error of the sandbox's system carries its `errno`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator
from typing import TYPE_CHECKING, Any

from ._failure import MsbError
from .errors import FileFailedError, LimitExceededError, PathNotFoundError, PermissionDeniedError
from .models import DirectoryEntry, FileAttributes, FileChange, decode

if TYPE_CHECKING:
    from .client import Client

#: Most bytes that `read` keeps unless the caller says otherwise. A stream has no limit.
READ_LEN_MAX = 64 << 20
#: Bytes of a file of this machine that are read and sent at a time.
PIECE_LEN = 256 << 10


class Fs:
    """The files of one sandbox, in the name of one of its users. Relative paths begin at `/`."""

    def __init__(self, client: Client, sandbox: str, user: str | None = None) -> None:
        self._client = client
        self._sandbox = sandbox
        self._user = user

    def as_user(self, user: str) -> Fs:
        """Acts as another user: `USER|UID[:GROUP|GID]`."""
        return Fs(self._client, self._sandbox, user)

    async def _call(self, operation: str, **arguments: object) -> dict[str, Any]:
        call = {"operation": operation} | {key: value for key, value in arguments.items() if value is not None}
        return await self._client.file_call(self._sandbox, call, self._user)

    async def read(self, path: str, *, len_max: int = READ_LEN_MAX) -> bytes:
        """Reads a whole file; raises `PathNotFoundError`, and `LimitExceededError` for one that is longer than `len_max`."""
        whole = bytearray()
        async for piece in self.read_stream(path):
            whole += piece
            if len(whole) > len_max:
                raise LimitExceededError(f"'{path}' has more than {len_max} bytes", hint="read it as a stream, or raise len_max")
        return bytes(whole)

    async def read_text(self, path: str, *, len_max: int = READ_LEN_MAX) -> str:
        """Reads a whole file as UTF-8; raises `UnicodeDecodeError` for one that is not."""
        return (await self.read(path, len_max=len_max)).decode()

    def read_stream(self, path: str, *, offset: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """Reads a file, or a part of it, piece by piece."""
        return self._client.file_content(self._sandbox, path, self._user, offset, length)

    async def write(self, path: str, content: bytes | str, *, mode: int | None = None) -> FileAttributes:
        """Writes a whole file: it appears under its name only when all of it is there. One that was there keeps mode and owner."""
        return await self.write_stream(path, _once(content), mode=mode)

    async def write_stream(self, path: str, content: AsyncIterable[bytes], *, mode: int | None = None) -> FileAttributes:
        """As `write`, from a stream. An error of the stream ends it, and nothing is left behind."""
        return await self._client.file_write(self._sandbox, path, content, self._user, mode)

    async def append(self, path: str, content: bytes | str) -> FileAttributes:
        """Adds to the end of a file, which is made if it does not exist."""
        return await self._client.file_write(self._sandbox, path, _once(content), self._user, append=True)

    async def stat(self, path: str, *, follow: bool = True) -> FileAttributes:
        """Attributes of a path; without `follow` a symbolic link is meant itself."""
        return decode(FileAttributes, (await self._call("stat", path=path, no_follow=not follow)).get("attributes"))

    async def exists(self, path: str) -> bool:
        """Whether there is anything at a path."""
        try:
            await self.stat(path, follow=False)
        except PathNotFoundError as error:
            if error.errno is None:
                raise
            return False
        return True

    async def list(self, path: str) -> list[DirectoryEntry]:
        """The entries of a directory, sorted by name."""
        return decode(list[DirectoryEntry], (await self._call("list", path=path)).get("entries"))

    async def mkdir(self, path: str, *, parents: bool = False, mode: int | None = None) -> None:
        """Makes a directory; with `parents` also those above it, and one that exists is fine. Else raises `PathExistsError`."""
        await self._call("make_directory", path=path, parents=parents, mode=mode)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Removes a file or an empty directory, or with `recursive` whatever it is; links are not followed."""
        await self._call("remove", path=path, recursive=recursive)

    async def rename(self, source: str, target: str, *, replace: bool = True) -> None:
        """Renames; a file that has the new name is replaced."""
        await self._call("rename", **{"from": source, "to": target, "no_replace": not replace})

    async def symlink(self, target: str, path: str) -> None:
        """Makes a symbolic link at `path` that leads to `target`."""
        await self._call("symlink", target=target, path=path)

    async def hard_link(self, target: str, path: str) -> None:
        """Gives a file another name."""
        await self._call("hard_link", target=target, path=path)

    async def read_link(self, path: str) -> str:
        """What a symbolic link leads to."""
        return decode(str, (await self._call("read_link", path=path)).get("path"))

    async def real_path(self, path: str) -> str:
        """The path without links, dots and doubled slashes."""
        return decode(str, (await self._call("real_path", path=path)).get("path"))

    async def chmod(self, path: str, mode: int) -> None:
        """Changes permission bits."""
        await self._call("change", path=path, change={"mode": mode})

    async def chown(self, path: str, uid: int, gid: int) -> None:
        """Changes owner and group."""
        await self._call("change", path=path, change={"uid": uid, "gid": gid})

    async def truncate(self, path: str, size: int) -> None:
        """Cuts a file, or grows it with a hole."""
        await self._call("change", path=path, change={"size": size})

    async def watch(self, path: str, *, recursive: bool = False) -> AsyncIterator[FileChange]:
        """Watches a directory's entries or a file. The first record, `watching`, says that the watch is in place."""
        async for record in self._client.file_watch(self._sandbox, path, self._user, recursive):
            yield record

    async def copy_from_host(self, source: str | os.PathLike[str], target: str) -> FileAttributes:
        """Copies one file of this machine into the sandbox, with its permission bits; whole trees are `Sandbox.copy_into`'s."""
        with open_local(source) as file:
            mode = os.fstat(file.fileno()).st_mode & 0o7777

            async def pieces() -> AsyncIterator[bytes]:
                while piece := await asyncio.to_thread(file.read, PIECE_LEN):
                    yield piece

            return await self.write_stream(target, pieces(), mode=mode)

    async def copy_to_host(self, source: str, target: str | os.PathLike[str]) -> None:
        """Copies one file of the sandbox to this machine. It is there whole or not at all."""
        await write_whole(self.read_stream(source), target)


async def _once(content: bytes | str) -> AsyncIterator[bytes]:
    yield content.encode() if isinstance(content, str) else content


def local_error(path: str | os.PathLike[str], error: OSError) -> MsbError:
    """The error of this machine's file system."""
    message = f"{os.fspath(path)}: {error.strerror}"
    if isinstance(error, PermissionError):
        return PermissionDeniedError(message)
    return PathNotFoundError(message) if isinstance(error, FileNotFoundError) else FileFailedError(message)


def open_local(path: str | os.PathLike[str]) -> Any:
    """Opens a file of this machine for reading; raises `PathNotFoundError` and `PermissionDeniedError`."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise local_error(path, error) from error


async def write_whole(content: AsyncIterable[bytes], path: str | os.PathLike[str]) -> None:
    """Writes a file of this machine that is there whole or not at all."""
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with open(temporary, "xb") as file:
            async for piece in content:
                await asyncio.to_thread(file.write, piece)
        os.replace(temporary, path)
    except BaseException as error:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        if isinstance(error, OSError):
            raise local_error(path, error) from error
        raise


__all__ = ["READ_LEN_MAX", "Fs"]
