"""Copies of whole trees between this machine and a sandbox, as tar streams, by the rules of `docker cp`. `Sandbox.copy_into` and
`Sandbox.copy_out` are made of these.

What a sandbox sends is never trusted: it can make nothing but the one name that was asked for, and nothing through a link. A copy that fails
leaves nothing half-written under a final name.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import tarfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

from .errors import ExecLostError, InvalidArchiveError, PathExistsError, PathNotFoundError
from .fs import Fs, local_error
from .session import ExecHandle, Exited, Stderr, Stdout

if TYPE_CHECKING:
    from .client import Client

T = TypeVar("T")

#: Who copies if nobody is named: what is copied into a sandbox is its root's, as with docker.
USER = "0:0"
#: Bytes of a tar stream that are handled at a time.
PIECE_LEN = 64 << 10
#: Longest path in a stream, in bytes, and most links that are followed to a destination (as in Linux).
PATH_LEN_MAX, LINKS_MAX = 4096, 40
#: Most bytes of a sandbox's warnings that are kept.
WARNINGS_LEN_MAX = 64 << 10


@dataclass
class CopyReport:
    """What a copy did."""

    bytes: int = 0
    """Bytes of the stream: contents and headers."""
    warnings: list[str] = field(default_factory=list)
    """What was left out, a line each."""


def place(source: str, is_directory: bool, destination: str, found: str) -> tuple[str, str | None]:
    """In which directory a copy is made and under which name; without one the directory itself is filled.

    `found` is what is at the destination: `nothing`, `file` or `directory`. Raises `PathNotFoundError` and `PathExistsError`.
    """
    if found == "directory":
        return destination, _base_name(source)
    if found == "file" and is_directory:
        raise PathExistsError(f"cannot copy to '{destination}': a file is there, and the source is a directory")
    if found == "nothing" and not is_directory and destination.endswith("/"):
        raise PathNotFoundError(f"cannot copy to '{destination}': the directory does not exist")
    name = _base_name(destination)
    if name is None:
        raise PathNotFoundError(f"cannot copy to '{destination}': it does not exist")
    return destination.rstrip("/")[: -len(name)] or ".", name


def _base_name(path: str) -> str | None:
    name = path.rstrip("/").rsplit("/", 1)[-1]
    return None if name in ("", ".", "..") else name


class _Pipe:
    """The tar stream of a thread, joined to a session of the event loop."""

    def __init__(self, handle: ExecHandle, report: CopyReport) -> None:
        self._handle = handle
        self._loop = asyncio.get_running_loop()
        self._report = report
        self._rest = b""
        self._warned = bytearray()
        self._over = False

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def write(self, data: bytes) -> int:
        self._wait(self._handle.write(data))
        self._report.bytes += len(data)
        return len(data)

    def read(self, count: int) -> bytes:
        while len(self._rest) < count and not self._over:
            piece = self._wait(self._next())
            self._over = piece is None
            self._rest += piece or b""
        piece, self._rest = self._rest[:count], self._rest[count:]
        return piece

    async def _next(self) -> bytes | None:
        async for event in self._handle:
            if isinstance(event, Stdout):
                self._report.bytes += len(event.data)
                return event.data
            self._hear(event)
            if isinstance(event, Exited):
                return None
        raise ExecLostError("the tar stream broke off")

    def _hear(self, event: object) -> None:
        if isinstance(event, Stderr):
            self._warned += event.data[: WARNINGS_LEN_MAX - len(self._warned)]
            self._report.warnings = self._warned.decode("utf-8", "replace").splitlines()

    async def finish(self) -> None:
        """Reads to the end of the session, so that what went wrong on the other side is raised."""
        async for event in self._handle:
            self._hear(event)
            if isinstance(event, Exited):
                return
        raise ExecLostError("the tar stream broke off")

    def drain(self) -> None:
        """Reads what follows a stream's end."""
        while self.read(PIECE_LEN):
            pass


async def copy_into(
    client: Client, sandbox: str, source: str | os.PathLike[str], target: str, user: str | None = None
) -> CopyReport:
    """Copies a file or directory of this machine into a sandbox."""
    source = os.fspath(source)
    try:
        is_directory = stat.S_ISDIR(os.lstat(source).st_mode)
    except OSError as error:
        raise local_error(source, error) from error
    user = user or USER
    files = Fs(client, sandbox, user)
    target, found = await _destination(files, target)
    directory, name = place(source, is_directory, target, found)
    action: dict[str, object] = {"kind": "unpack", "directory": directory, "name": name}
    report = CopyReport()
    handle = await client.archive(sandbox, {key: value for key, value in action.items() if value is not None}, user, True)
    left_out: list[str] = []
    async with handle:
        pipe = _Pipe(handle, report)

        def known(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
            if entry.isreg() or entry.isdir() or entry.issym() or entry.islnk():
                return entry
            left_out.append(f"{entry.name}: no file, directory or link; left out")
            return None

        def pack() -> None:
            with tarfile.open(fileobj=cast(IO[bytes], pipe), mode="w|", format=tarfile.PAX_FORMAT, bufsize=PIECE_LEN) as archive:
                archive.add(source, arcname=name or ".", filter=known)

        async def send() -> None:
            await asyncio.to_thread(pack)
            await handle.close_stdin()

        sending = asyncio.ensure_future(send())
        hearing = asyncio.ensure_future(pipe.finish())
        try:
            await asyncio.wait([sending, hearing], return_when=asyncio.FIRST_COMPLETED)
            # A stream that broke has nothing to say about why: the other side has.
            if not hearing.done() and not isinstance(sending.exception(), ExecLostError):
                await sending
            await hearing
        except OSError as error:
            raise local_error(source, error) from error
        finally:
            await handle.aclose()
            for task in (sending, hearing):
                task.cancel()
            await asyncio.gather(sending, hearing, return_exceptions=True)
    report.warnings = left_out + report.warnings
    return report


async def copy_out(
    client: Client, sandbox: str, source: str, target: str | os.PathLike[str], user: str | None = None
) -> CopyReport:
    """Copies a file or directory of a sandbox to this machine."""
    user = user or USER
    is_directory = (await Fs(client, sandbox, user).stat(source, follow=False)).is_directory
    target = os.path.realpath(target) + ("/" if os.fspath(target).endswith("/") else "")
    found = "directory" if os.path.isdir(target) else "file" if os.path.lexists(target) else "nothing"
    directory, name = place(source, is_directory, target, found)
    if not os.path.isdir(directory):
        raise PathNotFoundError(f"{directory}: the directory does not exist")
    report = CopyReport()
    action = {"kind": "pack", "path": source, "name": name or "."}
    async with await client.archive(sandbox, action, user, False) as handle:
        pipe = _Pipe(handle, report)
        try:
            await asyncio.to_thread(_unpack, pipe, directory, name)
        except tarfile.TarError as error:
            raise InvalidArchiveError(f"the sandbox's tar stream cannot be understood: {error}") from error
        except OSError as error:
            raise local_error(error.filename or target, error) from error
    return report


def _unpack(pipe: _Pipe, directory: str, name: str | None) -> None:
    # A name that is free gets everything at once, at the end; what is there is filled file by file.
    staged = name is not None and not os.path.lexists(os.path.join(directory, name))
    base = os.path.join(directory, f".msb-copy-{os.urandom(8).hex()}") if staged else directory
    if staged:
        os.mkdir(base, 0o700)
    try:
        times: list[tuple[str, tarfile.TarInfo]] = []
        with tarfile.open(fileobj=cast(IO[bytes], pipe), mode="r|", bufsize=PIECE_LEN) as archive:
            for entry in archive:
                path = _inside(base, entry.name, name)
                if path is not None:
                    _make(archive, entry, path, base, name)
                    if entry.isdir():
                        times.append((path, entry))
        pipe.drain()
        # Last, and the deepest first: a mode may forbid what comes after it, and every new entry changes a directory's time.
        for path, entry in reversed(times):
            os.chmod(path, entry.mode & 0o777, follow_symlinks=True)
            os.utime(path, (entry.mtime, entry.mtime))
        if staged and name is not None:
            os.rename(os.path.join(base, name), os.path.join(directory, name))
    finally:
        if staged:
            shutil.rmtree(base, ignore_errors=True)


def _inside(base: str, member: str, name: str | None) -> str | None:
    """The path of a member, whose folders are real ones; none for the root of a stream that fills its directory."""
    parts = [part for part in member.split("/") if part not in ("", ".")]
    wrong = member.startswith("/") or ".." in parts or len(os.fsencode(member)) > PATH_LEN_MAX or "\0" in member
    if wrong or (name is not None and parts[:1] != [name]):
        raise InvalidArchiveError(f"the sandbox sent {member[:200]!r}, which was not asked for")
    if not parts:
        return None
    path = base
    for part in parts[:-1]:
        path = os.path.join(path, part)
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise PathExistsError(f"a link or a file is where {member[:200]!r} needs a directory")
    return os.path.join(path, parts[-1])


def _make(archive: tarfile.TarFile, entry: tarfile.TarInfo, path: str, base: str, name: str | None) -> None:
    there = os.lstat(path).st_mode if os.path.lexists(path) else None
    if entry.isdir():
        if there is None:
            os.mkdir(path, 0o700)
        elif not stat.S_ISDIR(there):
            raise PathExistsError(f"{path} is there, and is no directory")
        return
    if there is not None and stat.S_ISDIR(there):
        raise PathExistsError(f"{path} is a directory")
    temporary = f"{path}.msb-{os.urandom(4).hex()}"
    try:
        if entry.issym():
            os.symlink(entry.linkname, temporary)
        elif entry.islnk():
            linked = _inside(base, entry.linkname, name)
            if linked is None or not stat.S_ISREG(os.lstat(linked).st_mode):
                raise InvalidArchiveError(f"the sandbox sent a hard link to {entry.linkname[:200]!r}, which is no file of the copy")
            os.link(linked, temporary, follow_symlinks=False)
        elif entry.isreg():
            content = archive.extractfile(entry)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:
                if content is not None:
                    shutil.copyfileobj(content, file, PIECE_LEN)
                os.fchmod(file.fileno(), entry.mode & 0o777)
            os.utime(temporary, (entry.mtime, entry.mtime))
        else:
            # The agent leaves devices out; one that is sent all the same is not made.
            return
        os.replace(temporary, path)
    except BaseException:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise


async def _destination(files: Fs, path: str) -> tuple[str, str]:
    """The destination with a link in its last component followed, and what is there."""
    for _ in range(LINKS_MAX):
        try:
            attributes = await files.stat(path, follow=False)
        except PathNotFoundError:
            return path, "nothing"
        if not attributes.is_symlink:
            return path, "directory" if attributes.is_directory else "file"
        target = await files.read_link(path)
        path = target if target.startswith("/") else os.path.join(os.path.dirname(path.rstrip("/")) or "/", target)
    raise PathNotFoundError(f"'{path}' leads through too many symbolic links")


__all__ = ["CopyReport"]
