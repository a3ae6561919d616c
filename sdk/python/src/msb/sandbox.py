"""A sandbox as a value: what `Client` does by name, as methods."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Generator, Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, TypedDict, Unpack

from . import copy as copies
from .client import Client
from .errors import SandboxNotFoundError
from .fs import Fs
from .models import (
    EventRecord,
    LogRecord,
    MetricsHistory,
    PingReport,
    SandboxDetail,
    SandboxMetrics,
    SandboxPage,
    SandboxSummary,
    SshConfig,
)
from .session import OUTPUT_LEN_MAX, ExecHandle, ExecOutput
from .spec import Network, NetworkProfile, PullPolicy, Restart, Rootfs, Security, create_request, exec_request, milliseconds
from .ssh import ssh_config
from .volume import Mount


class SandboxOptions(TypedDict, total=False):
    """What `Sandbox.create` takes beside name and image. Durations are in seconds, sizes in MiB."""

    cpus: int
    memory_mib: int
    root_size_mib: int
    env: Mapping[str, str]
    labels: Mapping[str, str]
    workdir: str
    user: str
    hostname: str
    entrypoint: Sequence[str]
    command: Sequence[str]
    main: bool
    stop_signal: str
    stop_grace: float
    detached: bool
    ephemeral: bool
    engine: Literal["auto", "kvm", "qemu"]
    restart: Restart
    max_retries: int
    idle_timeout: float
    on_idle: Literal["stop", "restart", "suspend"]
    max_duration: float
    mounts: Sequence[Mount]
    ports: Sequence[str]
    network: Network | NetworkProfile
    security: Security
    rlimits: Mapping[str, int | tuple[int, int]]
    pull: PullPolicy
    replace: bool
    replace_grace: float


class ExecOptions(TypedDict, total=False):
    """What `exec` and `exec_stream` take beside the command. The timeout is in seconds, the terminal rows and columns."""

    env: Mapping[str, str]
    workdir: str
    user: str
    terminal: tuple[int, int]
    timeout: float


class Sandbox:
    """A sandbox of a service.

    Dropping the object does nothing to the sandbox; one that is not `detached` ends with this process. As an async context manager
    it is stopped and removed at the end of the block.
    """

    def __init__(self, client: Client, detail: SandboxDetail) -> None:
        self.client = client
        #: What was known at the last call that answered with its state.
        self.detail = detail

    @property
    def name(self) -> str:
        """Its name."""
        return self.detail.name

    @property
    def status(self) -> str:
        """Its state at the last call that answered with it."""
        return self.detail.status

    def __repr__(self) -> str:
        return f"<Sandbox {self.name} ({self.status})>"

    @classmethod
    def create(
        cls, name: str | None = None, *, image: str | Rootfs, client: Client | None = None, **options: Unpack[SandboxOptions]
    ) -> Creation:
        """Creates and boots a sandbox: `await` it, or use it with `async with`.

        Raises `InvalidConfigError` and its kin before any request, `ImageNotFoundError`, `SandboxAlreadyExistsError`, `BootFailedError`.
        """
        return Creation(create_request(name, image, **options), client)

    @classmethod
    async def get(cls, name: str, *, client: Client | None = None) -> Sandbox:
        """The sandbox of this name; raises `SandboxNotFoundError`."""
        client = client or await Client.connect()
        return cls(client, await client.inspect(name))

    @classmethod
    async def list(
        cls, *, labels: Iterable[str] = (), selector: str | None = None, client: Client | None = None
    ) -> list[SandboxSummary]:
        """The sandboxes whose labels fit every term (`KEY=VALUE` or `KEY`) and the selector (`team in (ml,web)`), newest first."""
        client = client or await Client.connect()
        return await client.list(labels, selector)

    @classmethod
    async def list_page(
        cls,
        *,
        labels: Iterable[str] = (),
        selector: str | None = None,
        limit: int,
        after: str | None = None,
        client: Client | None = None,
    ) -> SandboxPage:
        """A page of them; its `next`, if there is one, is the next page's `after`."""
        client = client or await Client.connect()
        return await client.list_page(labels, selector, limit, after)

    @classmethod
    async def start(cls, name: str, *, client: Client | None = None) -> Sandbox:
        """Starts a resting sandbox."""
        client = client or await Client.connect()
        return cls(client, await client.start(name))

    @classmethod
    async def remove(cls, name: str, *, force: bool = False, client: Client | None = None) -> None:
        """Removes a sandbox; `force` kills it first."""
        client = client or await Client.connect()
        await client.remove(name, force)

    async def refresh(self) -> SandboxDetail:
        """Asks anew."""
        self.detail = await self.client.inspect(self.name)
        return self.detail

    async def exec(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | str | None = None,
        output_len_max: int = OUTPUT_LEN_MAX,
        **options: Unpack[ExecOptions],
    ) -> ExecOutput:
        """Runs a command to its end and keeps its output. A command that fails is no error: see `ExecOutput.check`."""
        handle = await self.client.exec(self.name, exec_request(command, stdin=stdin is not None, **options))
        return await handle.collect(stdin.encode() if isinstance(stdin, str) else stdin, output_len_max)

    async def exec_stream(
        self, command: Sequence[str], *, stdin: bool = False, **options: Unpack[ExecOptions]
    ) -> ExecHandle:
        """Runs a command as a stream of events."""
        return await self.client.exec(self.name, exec_request(command, stdin=stdin, **options))

    async def shell(
        self,
        script: str,
        *,
        stdin: bytes | str | None = None,
        output_len_max: int = OUTPUT_LEN_MAX,
        **options: Unpack[ExecOptions],
    ) -> ExecOutput:
        """Runs a line of the sandbox's own shell."""
        return await self.exec(["/bin/sh", "-c", script], stdin=stdin, output_len_max=output_len_max, **options)

    async def attach(self, *, stdin: bool = False) -> ExecHandle:
        """Watches the main workload."""
        return await self.client.attach(self.name, stdin)

    def logs(
        self,
        *,
        follow: bool = False,
        tail: int | None = None,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        source: str | None = None,
        grep: str | None = None,
    ) -> AsyncIterator[LogRecord]:
        """Reads its log; with `follow` until it rests, with `grep` only lines that contain this text."""
        return self.client.logs(
            self.name, follow=follow, tail=tail, since=since, until=until, source=source, grep=grep
        )

    async def events(self, *, follow: bool = False, since: int | None = None) -> AsyncIterator[EventRecord]:
        """What happened to it."""
        async for event in self.client.events(follow=follow, since=since):
            if event.sandbox_id == self.detail.id:
                yield event

    async def metrics(self) -> SandboxMetrics | None:
        """Its newest sample; `None` when it has none because it rests."""
        snapshot = await self.client.metrics(self.name)
        return next((sample for sample in snapshot.sandboxes if sample.id == self.detail.id), None)

    async def metrics_stream(self, *, interval: float = 1.0) -> AsyncIterator[SandboxMetrics]:
        """Its samples from now on, one at each interval in seconds, the first at once."""
        async for snapshot in self.client.metrics_stream(self.name, interval=interval):
            for sample in snapshot.sandboxes:
                if sample.id == self.detail.id:
                    yield sample

    async def metrics_history(self, *, last: float | None = None, points_max: int | None = None) -> MetricsHistory:
        """Its last hour, or the last seconds of it."""
        return await self.client.metrics_history(self.name, last=last, points_max=points_max)

    @property
    def fs(self) -> Fs:
        """Its files."""
        return Fs(self.client, self.name)

    async def copy_into(
        self, source: str | os.PathLike[str], target: str, *, user: str | None = None
    ) -> copies.CopyReport:
        """Copies a file or directory of this machine into it, by the rules of `docker cp`."""
        return await copies.copy_into(self.client, self.name, source, target, user)

    async def copy_out(
        self, source: str, target: str | os.PathLike[str], *, user: str | None = None
    ) -> copies.CopyReport:
        """Copies a file or directory of it to this machine, by the rules of `docker cp`."""
        return await copies.copy_out(self.client, self.name, source, target, user)

    async def ssh_config(self, *, alias: str | None = None) -> SshConfig:
        """What makes `ssh msb-NAME` (or another alias) work."""
        return ssh_config(await self.client.ssh_host(self.name), alias)

    async def ping(self) -> PingReport:
        """Asks its agent for a sign of life. It is no activity, and wakes nothing."""
        return await self.client.ping(self.name)

    async def touch(self) -> None:
        """Counts as activity."""
        self.detail = await self.client.touch(self.name)

    async def detach(self) -> None:
        """Lets it outlive this process."""
        self.detail = await self.client.detach(self.name)

    async def stop(self, *, grace: float | None = None) -> None:
        """Stops it: stop signal, its own grace time in seconds unless one is given, flush."""
        self.detail = await self.client.stop(self.name, None if grace is None else milliseconds(grace, "grace"))

    async def kill(self) -> None:
        """Ends it at once, without a flush."""
        self.detail = await self.client.stop(self.name, force=True)

    async def restart(self) -> None:
        """Stops it if it runs, and starts it."""
        self.detail = await self.client.restart(self.name)

    async def wait_until_stopped(self) -> SandboxDetail:
        """Waits until it rests."""
        self.detail = await self.client.wait(self.name)
        return self.detail

    async def delete(self, *, force: bool = False) -> None:
        """Removes it; `force` kills it first."""
        await self.client.remove(self.name, force)

    async def __aenter__(self) -> Sandbox:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.delete(force=True)
        except SandboxNotFoundError:
            # Somebody else removed it, or it was ephemeral and has ended.
            pass


class Creation:
    """A sandbox that is being created: `await` it, or enter it with `async with`."""

    def __init__(self, request: dict[str, object], client: Client | None) -> None:
        self._request = request
        self._client = client
        self._sandbox: Sandbox | None = None

    async def create(self) -> Sandbox:
        """Creates and boots it."""
        client = self._client or await Client.connect()
        return Sandbox(client, await client.create(self._request))

    def __await__(self) -> Generator[Any, None, Sandbox]:
        return self.create().__await__()

    async def __aenter__(self) -> Sandbox:
        self._sandbox = await self.create()
        return self._sandbox

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sandbox is not None:
            await self._sandbox.__aexit__(kind, error, trace)
