"""The same without `async`: every call runs on an event loop in a thread of its own and waits for it.

```python
with msb.sync.Sandbox.create("box", image="busybox") as box:
    print(box.exec(["echo", "hello"]).stdout_text)
```
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, TypeVar, Unpack

from . import client as client_module
from . import image as image_module
from . import sandbox as sandbox_module
from . import volume as volume_module
from .copy import CopyReport
from .fs import READ_LEN_MAX
from .fs import Fs as AsyncFs
from .models import (
    DirectoryEntry,
    EventRecord,
    FileAttributes,
    FileChange,
    ImageDetail,
    ImageHandle,
    ImagePruneReport,
    LogRecord,
    MetricsHistory,
    PingReport,
    ProcessEnd,
    PullProgress,
    SandboxDetail,
    SandboxMetrics,
    SandboxPage,
    SandboxSummary,
    SshConfig,
    VolumeDetail,
)
from .sandbox import ExecOptions, SandboxOptions
from .spec import Rootfs
from .session import OUTPUT_LEN_MAX, ExecEvent, ExecHandle, ExecOutput

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_loop_pid = 0


def _run(work: Coroutine[Any, Any, T]) -> T:
    global _loop, _loop_pid
    with _lock:
        # A child of fork(2) has no copy of the thread.
        if _loop is None or _loop_pid != os.getpid():
            _loop, _loop_pid = asyncio.new_event_loop(), os.getpid()
            threading.Thread(target=_loop.run_forever, name="msb", daemon=True).start()
        loop = _loop
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result()
    except BaseException:
        # Ctrl-C must also end what we wait for.
        future.cancel()
        raise


def _iterate(source: AsyncIterator[T]) -> Iterator[T]:
    async def following() -> list[T]:
        async for item in source:
            return [item]
        return []

    try:
        while found := _run(following()):
            yield found[0]
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            _run(close())


class Client:
    """A connection to a service."""

    def __init__(self, inner: client_module.Client) -> None:
        self.inner = inner

    @classmethod
    def connect(cls) -> Client:
        """Finds the service of this environment, or starts one."""
        return cls(_run(client_module.Client.connect()))

    @classmethod
    def at(cls, socket: str) -> Client:
        """Connects to the service on this socket."""
        return cls(_run(client_module.Client.at(socket)))


def _inner(client: Client | None) -> client_module.Client | None:
    return client.inner if client else None


class Session:
    """A running command: iterate over its events, or `wait` for its end."""

    def __init__(self, inner: ExecHandle) -> None:
        self._inner = inner

    def __iter__(self) -> Iterator[ExecEvent]:
        return _iterate(self._inner)

    def write(self, data: bytes | str) -> None:
        """Writes to the command's stdin; what does not fit its window waits until somebody iterates (in another thread)."""
        _run(self._inner.write(data))

    def close_stdin(self) -> None:
        """Ends stdin."""
        _run(self._inner.close_stdin())

    def signal(self, which: int | str) -> None:
        """Sends a signal to the command's process group."""
        _run(self._inner.signal(which))

    def kill(self) -> None:
        """Sends SIGKILL."""
        _run(self._inner.kill())

    def resize(self, rows: int, columns: int) -> None:
        """Tells the command its terminal's size."""
        _run(self._inner.resize(rows, columns))

    def wait(self) -> ProcessEnd:
        """Waits for its end."""
        return _run(self._inner.wait())

    def close(self) -> None:
        """Ends the stream, and with it an exec that still runs."""
        _run(self._inner.aclose())

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Fs:
    """The files of one sandbox. Relative paths begin at `/`."""

    def __init__(self, inner: AsyncFs) -> None:
        self._inner = inner

    def as_user(self, user: str) -> Fs:
        """Acts as another user."""
        return Fs(self._inner.as_user(user))

    def read(self, path: str, *, len_max: int = READ_LEN_MAX) -> bytes:
        """Reads a whole file."""
        return _run(self._inner.read(path, len_max=len_max))

    def read_text(self, path: str, *, len_max: int = READ_LEN_MAX) -> str:
        """Reads a whole file as UTF-8."""
        return _run(self._inner.read_text(path, len_max=len_max))

    def read_stream(self, path: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Reads a file, or a part of it, piece by piece."""
        return _iterate(self._inner.read_stream(path, offset=offset, length=length))

    def write(self, path: str, content: bytes | str, *, mode: int | None = None) -> FileAttributes:
        """Writes a whole file."""
        return _run(self._inner.write(path, content, mode=mode))

    def append(self, path: str, content: bytes | str) -> FileAttributes:
        """Adds to the end of a file."""
        return _run(self._inner.append(path, content))

    def stat(self, path: str, *, follow: bool = True) -> FileAttributes:
        """Attributes of a path."""
        return _run(self._inner.stat(path, follow=follow))

    def exists(self, path: str) -> bool:
        """Whether there is anything at a path."""
        return _run(self._inner.exists(path))

    def list(self, path: str) -> list[DirectoryEntry]:
        """The entries of a directory, sorted by name."""
        return _run(self._inner.list(path))

    def mkdir(self, path: str, *, parents: bool = False, mode: int | None = None) -> None:
        """Makes a directory."""
        _run(self._inner.mkdir(path, parents=parents, mode=mode))

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Removes a file or an empty directory, or with `recursive` whatever it is."""
        _run(self._inner.remove(path, recursive=recursive))

    def rename(self, source: str, target: str, *, replace: bool = True) -> None:
        """Renames."""
        _run(self._inner.rename(source, target, replace=replace))

    def symlink(self, target: str, path: str) -> None:
        """Makes a symbolic link at `path` that leads to `target`."""
        _run(self._inner.symlink(target, path))

    def hard_link(self, target: str, path: str) -> None:
        """Gives a file another name."""
        _run(self._inner.hard_link(target, path))

    def read_link(self, path: str) -> str:
        """What a symbolic link leads to."""
        return _run(self._inner.read_link(path))

    def real_path(self, path: str) -> str:
        """The path without links, dots and doubled slashes."""
        return _run(self._inner.real_path(path))

    def chmod(self, path: str, mode: int) -> None:
        """Changes permission bits."""
        _run(self._inner.chmod(path, mode))

    def chown(self, path: str, uid: int, gid: int) -> None:
        """Changes owner and group."""
        _run(self._inner.chown(path, uid, gid))

    def truncate(self, path: str, size: int) -> None:
        """Cuts a file, or grows it with a hole."""
        _run(self._inner.truncate(path, size))

    def watch(self, path: str, *, recursive: bool = False) -> Iterator[FileChange]:
        """Watches a directory's entries or a file."""
        return _iterate(self._inner.watch(path, recursive=recursive))

    def copy_from_host(self, source: str | os.PathLike[str], target: str) -> FileAttributes:
        """Copies one file of this machine into the sandbox."""
        return _run(self._inner.copy_from_host(source, target))

    def copy_to_host(self, source: str, target: str | os.PathLike[str]) -> None:
        """Copies one file of the sandbox to this machine."""
        _run(self._inner.copy_to_host(source, target))


class Sandbox:
    """A sandbox of a service. As a context manager it is stopped and removed at the end of the block."""

    def __init__(self, inner: sandbox_module.Sandbox) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        """Its name."""
        return self.inner.name

    @property
    def status(self) -> str:
        """Its state at the last call that answered with it."""
        return self.inner.status

    @property
    def detail(self) -> SandboxDetail:
        """What was known at that call."""
        return self.inner.detail

    @classmethod
    def create(
        cls, name: str | None = None, *, image: str | Rootfs, client: Client | None = None, **options: Unpack[SandboxOptions]
    ) -> Sandbox:
        """Creates and boots a sandbox."""
        creation = sandbox_module.Sandbox.create(name, image=image, client=_inner(client), **options)
        return cls(_run(creation.create()))

    @classmethod
    def get(cls, name: str, *, client: Client | None = None) -> Sandbox:
        """The sandbox of this name."""
        return cls(_run(sandbox_module.Sandbox.get(name, client=_inner(client))))

    @classmethod
    def list(
        cls, *, labels: Iterable[str] = (), selector: str | None = None, client: Client | None = None
    ) -> list[SandboxSummary]:
        """The sandboxes whose labels fit every term and the selector."""
        return _run(sandbox_module.Sandbox.list(labels=labels, selector=selector, client=_inner(client)))

    @classmethod
    def list_page(
        cls,
        *,
        labels: Iterable[str] = (),
        selector: str | None = None,
        limit: int,
        after: str | None = None,
        client: Client | None = None,
    ) -> SandboxPage:
        """A page of them; its `next`, if there is one, is the next page's `after`."""
        page = sandbox_module.Sandbox.list_page(
            labels=labels, selector=selector, limit=limit, after=after, client=_inner(client)
        )
        return _run(page)

    @classmethod
    def start(cls, name: str, *, client: Client | None = None) -> Sandbox:
        """Starts a resting sandbox."""
        return cls(_run(sandbox_module.Sandbox.start(name, client=_inner(client))))

    @classmethod
    def remove(cls, name: str, *, force: bool = False, client: Client | None = None) -> None:
        """Removes a sandbox."""
        _run(sandbox_module.Sandbox.remove(name, force=force, client=_inner(client)))

    def refresh(self) -> SandboxDetail:
        """Asks anew."""
        return _run(self.inner.refresh())

    def exec(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | str | None = None,
        output_len_max: int = OUTPUT_LEN_MAX,
        **options: Unpack[ExecOptions],
    ) -> ExecOutput:
        """Runs a command to its end and keeps its output."""
        return _run(self.inner.exec(command, stdin=stdin, output_len_max=output_len_max, **options))

    def exec_stream(self, command: Sequence[str], *, stdin: bool = False, **options: Unpack[ExecOptions]) -> Session:
        """Runs a command as a stream of events."""
        return Session(_run(self.inner.exec_stream(command, stdin=stdin, **options)))

    def shell(self, script: str, *, stdin: bytes | str | None = None, **options: Unpack[ExecOptions]) -> ExecOutput:
        """Runs a line of the sandbox's own shell."""
        return _run(self.inner.shell(script, stdin=stdin, **options))

    def attach(self, *, stdin: bool = False) -> Session:
        """Watches the main workload."""
        return Session(_run(self.inner.attach(stdin=stdin)))

    def logs(
        self,
        *,
        follow: bool = False,
        tail: int | None = None,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        source: str | None = None,
        grep: str | None = None,
    ) -> Iterator[LogRecord]:
        """Reads its log; with `follow` until it rests."""
        return _iterate(self.inner.logs(follow=follow, tail=tail, since=since, until=until, source=source, grep=grep))

    def events(self, *, follow: bool = False, since: int | None = None) -> Iterator[EventRecord]:
        """What happened to it."""
        return _iterate(self.inner.events(follow=follow, since=since))

    def metrics(self) -> SandboxMetrics | None:
        """Its newest sample."""
        return _run(self.inner.metrics())

    def metrics_stream(self, *, interval: float = 1.0) -> Iterator[SandboxMetrics]:
        """Its samples from now on."""
        return _iterate(self.inner.metrics_stream(interval=interval))

    def metrics_history(self, *, last: float | None = None, points_max: int | None = None) -> MetricsHistory:
        """Its last hour, or the last seconds of it."""
        return _run(self.inner.metrics_history(last=last, points_max=points_max))

    @property
    def fs(self) -> Fs:
        """Its files."""
        return Fs(self.inner.fs)

    def copy_into(self, source: str | os.PathLike[str], target: str, *, user: str | None = None) -> CopyReport:
        """Copies a file or directory of this machine into it."""
        return _run(self.inner.copy_into(source, target, user=user))

    def copy_out(self, source: str, target: str | os.PathLike[str], *, user: str | None = None) -> CopyReport:
        """Copies a file or directory of it to this machine."""
        return _run(self.inner.copy_out(source, target, user=user))

    def ssh_config(self, *, alias: str | None = None) -> SshConfig:
        """What makes `ssh msb-NAME` work."""
        return _run(self.inner.ssh_config(alias=alias))

    def ping(self) -> PingReport:
        """Asks its agent for a sign of life."""
        return _run(self.inner.ping())

    def touch(self) -> None:
        """Counts as activity."""
        _run(self.inner.touch())

    def detach(self) -> None:
        """Lets it outlive this process."""
        _run(self.inner.detach())

    def stop(self, *, grace: float | None = None) -> None:
        """Stops it."""
        _run(self.inner.stop(grace=grace))

    def kill(self) -> None:
        """Ends it at once."""
        _run(self.inner.kill())

    def restart(self) -> None:
        """Stops it if it runs, and starts it."""
        _run(self.inner.restart())

    def wait_until_stopped(self) -> SandboxDetail:
        """Waits until it rests."""
        return _run(self.inner.wait_until_stopped())

    def delete(self, *, force: bool = False) -> None:
        """Removes it."""
        _run(self.inner.delete(force=force))

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _run(self.inner.__aexit__(kind, error, trace))


class Image:
    """The images of a service."""

    oci = staticmethod(image_module.Image.oci)
    bind = staticmethod(image_module.Image.bind)
    disk = staticmethod(image_module.Image.disk)

    @staticmethod
    def pull(
        reference: str,
        *,
        platform: str | None = None,
        credentials: tuple[str, str] | None = None,
        insecure: bool = False,
        progress: Callable[[PullProgress], object] | None = None,
        client: Client | None = None,
    ) -> ImageHandle:
        """Fetches an image from its registry; `progress` is called in the event loop's thread."""
        pull = image_module.Image.pull(
            reference,
            platform=platform,
            credentials=credentials,
            insecure=insecure,
            progress=progress,
            client=_inner(client),
        )
        return _run(pull)

    @staticmethod
    def save(
        references: str | Iterable[str],
        path: str | os.PathLike[str],
        *,
        format: Literal["docker", "oci"] = "docker",
        client: Client | None = None,
    ) -> None:
        """Saves images as one archive."""
        _run(image_module.Image.save(references, path, format=format, client=_inner(client)))

    @staticmethod
    def tag(reference: str, name: str, *, client: Client | None = None) -> ImageHandle:
        """Gives an image another name."""
        return _run(image_module.Image.tag(reference, name, client=_inner(client)))

    @staticmethod
    def prune(
        *,
        all: bool = False,
        dry_run: bool = False,
        older_than: float | None = None,
        keep_bytes: int | None = None,
        labels: Iterable[str] = (),
        client: Client | None = None,
    ) -> ImagePruneReport:
        """Removes the images that this allows and nothing needs."""
        prune = image_module.Image.prune(
            all=all, dry_run=dry_run, older_than=older_than, keep_bytes=keep_bytes, labels=labels, client=_inner(client)
        )
        return _run(prune)

    @staticmethod
    def gc(*, client: Client | None = None) -> ImagePruneReport:
        """Deprecated: `prune`."""
        return _run(image_module.Image.gc(client=_inner(client)))

    @staticmethod
    def gc_layers(*, client: Client | None = None) -> ImagePruneReport:
        """Deprecated: `prune`."""
        return _run(image_module.Image.gc_layers(client=_inner(client)))

    @staticmethod
    def load(archive: str | os.PathLike[str], *, tag: str | None = None, client: Client | None = None) -> list[ImageHandle]:
        """Loads a docker or OCI archive."""
        return _run(image_module.Image.load(archive, tag=tag, client=_inner(client)))

    @staticmethod
    def list(*, client: Client | None = None) -> list[ImageHandle]:
        """Every image, newest first."""
        return _run(image_module.Image.list(client=_inner(client)))

    @staticmethod
    def get(reference: str, *, client: Client | None = None) -> ImageHandle:
        """One image."""
        return _run(image_module.Image.get(reference, client=_inner(client)))

    @staticmethod
    def inspect(reference: str, *, client: Client | None = None) -> ImageDetail:
        """Everything about one image."""
        return _run(image_module.Image.inspect(reference, client=_inner(client)))

    @staticmethod
    def remove(reference: str, *, force: bool = False, client: Client | None = None) -> None:
        """Removes an image."""
        _run(image_module.Image.remove(reference, force=force, client=_inner(client)))


class Volume:
    """The named volumes of a service, and mounts of every kind."""

    bind = staticmethod(volume_module.Volume.bind)
    named = staticmethod(volume_module.Volume.named)
    tmpfs = staticmethod(volume_module.Volume.tmpfs)
    disk = staticmethod(volume_module.Volume.disk)

    @staticmethod
    def create(
        name: str,
        *,
        kind: volume_module.VolumeKind = "dir",
        size_mib: int | None = None,
        client: Client | None = None,
    ) -> VolumeDetail:
        """Makes a volume."""
        return _run(volume_module.Volume.create(name, kind=kind, size_mib=size_mib, client=_inner(client)))

    @staticmethod
    def get(name: str, *, client: Client | None = None) -> VolumeDetail:
        """One volume."""
        return _run(volume_module.Volume.get(name, client=_inner(client)))

    @staticmethod
    def list(*, client: Client | None = None) -> list[VolumeDetail]:
        """Every volume, by name."""
        return _run(volume_module.Volume.list(client=_inner(client)))

    @staticmethod
    def remove(name: str, *, client: Client | None = None) -> None:
        """Removes a volume."""
        _run(volume_module.Volume.remove(name, client=_inner(client)))
