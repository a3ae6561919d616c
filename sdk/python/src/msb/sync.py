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
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, TypeVar, Unpack

from . import client as client_module
from . import image as image_module
from . import sandbox as sandbox_module
from .models import EventRecord, ImageDetail, ImageHandle, LogRecord, ProcessEnd, SandboxDetail, SandboxMetrics, SandboxSummary
from .sandbox import ExecOptions, SandboxOptions
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
        cls, name: str | None = None, *, image: str, client: Client | None = None, **options: Unpack[SandboxOptions]
    ) -> Sandbox:
        """Creates and boots a sandbox."""
        creation = sandbox_module.Sandbox.create(name, image=image, client=_inner(client), **options)
        return cls(_run(creation.create()))

    @classmethod
    def get(cls, name: str, *, client: Client | None = None) -> Sandbox:
        """The sandbox of this name."""
        return cls(_run(sandbox_module.Sandbox.get(name, client=_inner(client))))

    @classmethod
    def list(cls, *, labels: Iterable[str] = (), client: Client | None = None) -> list[SandboxSummary]:
        """The sandboxes whose labels fit every term."""
        return _run(sandbox_module.Sandbox.list(labels=labels, client=_inner(client)))

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
    ) -> Iterator[LogRecord]:
        """Reads its log; with `follow` until it rests."""
        return _iterate(self.inner.logs(follow=follow, tail=tail, since=since, until=until, source=source))

    def events(self, *, follow: bool = False, since: int | None = None) -> Iterator[EventRecord]:
        """What happened to it."""
        return _iterate(self.inner.events(follow=follow, since=since))

    def metrics(self) -> SandboxMetrics | None:
        """Its newest sample."""
        return _run(self.inner.metrics())

    def metrics_stream(self, *, interval: float = 1.0) -> Iterator[SandboxMetrics]:
        """Its newest sample at each interval in seconds, as long as it has one."""
        return _iterate(self.inner.metrics_stream(interval=interval))

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
