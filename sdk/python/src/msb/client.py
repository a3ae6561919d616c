"""One typed call for each route of the control API. `Sandbox` and `Image` are built on it.

Every call opens a connection of its own, so a client holds no descriptor between calls and can be used from any task. No request
that may have been carried out is ever retried.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import quote

from . import _http, _locate
from ._failure import MsbError, error_from_value
from .errors import DaemonUnavailableError, UnsupportedOperationError
from .models import (
    EventRecord,
    FileAttributes,
    FileChange,
    ImageDetail,
    ImageHandle,
    ImagePruneReport,
    LogRecord,
    MetricsHistory,
    MetricsSnapshot,
    PingReport,
    PullProgress,
    SandboxDetail,
    SandboxPage,
    SandboxSummary,
    SshHost,
    VersionInfo,
    VolumeDetail,
    decode,
)
from .session import ExecHandle
from .spec import check_name, milliseconds

T = TypeVar("T")

#: The version of the control API this package speaks.
API_VERSION = 1


def _query(pairs: Iterable[tuple[str, object]]) -> str:
    parts = []
    for key, value in pairs:
        if value is None or value is False:
            continue
        text = "true" if value is True else value.isoformat() if isinstance(value, datetime) else str(value)
        parts.append(f"{key}={quote(text, safe='')}")
    return "?" + "&".join(parts) if parts else ""


def _sandbox(name: str, rest: str = "") -> str:
    return f"/v1/sandboxes/{check_name(name)}{rest}"


class Client:
    """A connection to a service. Make one with `connect` or `at`."""

    def __init__(self, socket: str, owner: int | None, version: VersionInfo) -> None:
        self.socket = socket
        #: What the service said it is.
        self.version = version
        self._owner = owner

    @classmethod
    async def connect(cls, environment: Mapping[str, str] | None = None) -> Client:
        """Finds the service of this environment, or starts one as `msb` does.

        Raises `RuntimeNotFoundError` when msb is not installed, `DaemonUnavailableError` when it does not come up.
        """
        surroundings = _locate.Surroundings.of_process()
        if environment is not None:
            surroundings = _locate.Surroundings(environment, surroundings.uid)
        found: list[Client] = []

        async def open_socket(path: str, owner: int | None) -> None:
            found.append(await cls._open(path, owner))

        await _locate.find_or_start(surroundings, open_socket)
        return found[-1]

    @classmethod
    async def at(cls, socket: str) -> Client:
        """Connects to the service on this socket. Starts nothing."""
        try:
            return await cls._open(socket, None)
        except OSError as error:
            raise _locate.cannot_connect(socket, error) from error

    @classmethod
    async def _open(cls, socket: str, owner: int | None) -> Client:
        connection = await _http.Connection.open(socket, owner)
        try:
            headers = await _http.send(connection, "GET", "/v1/version")
            version = decode(VersionInfo, json.loads(await connection.collect(headers)))
        except ValueError as error:
            raise _http.protocol_error(str(error)) from error
        finally:
            await connection.close()
        if version.api_version != API_VERSION:
            raise UnsupportedOperationError(
                f"msbd {version.version} speaks version {version.api_version} of the control API, "
                f"this client speaks {API_VERSION}",
                hint="restart msbd, so that it runs the installed version",
                details=["operation=connect", f"needs={API_VERSION}", f"peer={version.api_version}"],
            )
        return cls(socket, owner, version)

    async def _connection(self) -> _http.Connection:
        try:
            return await _http.Connection.open(self.socket, self._owner)
        except OSError as error:
            raise _locate.cannot_connect(self.socket, error) from error

    async def _call(self, method: str, target: str, body: object = None) -> Any:
        connection = await self._connection()
        try:
            sent = None if body is None else json.dumps(body).encode()
            headers = await _http.send(connection, method, target, sent)
            return json.loads(await connection.collect(headers))
        except ValueError as error:
            raise _http.protocol_error(str(error)) from error
        finally:
            await connection.close()

    async def _get(self, kind: type[T], target: str) -> T:
        return decode(kind, await self._call("GET", target))

    async def _post(self, target: str, body: object = None) -> SandboxDetail:
        return decode(SandboxDetail, await self._call("POST", target, body))

    async def _lines(
        self,
        method: str,
        target: str,
        stream: AsyncIterable[bytes] | None = None,
        content_type: str = "application/json",
        body: object = None,
    ) -> AsyncIterator[Any]:
        connection = await self._connection()
        try:
            sent = None if body is None else json.dumps(body).encode()
            headers = await _http.send(connection, method, target, sent, stream=stream, content_type=content_type)
            async for line in connection.lines(headers):
                yield json.loads(line)
        except ValueError as error:
            raise _http.protocol_error(str(error)) from error
        finally:
            connection.abort()

    async def _session(self, target: str, first: dict[str, Any], stdin: bool) -> ExecHandle:
        connection = await self._connection()
        try:
            socket = await _http.WebSocket.upgrade(connection, target)
            return await ExecHandle.begin(socket, first, stdin)
        except BaseException:
            connection.abort()
            raise

    async def host(self) -> dict[str, Any]:
        """What the host can do, as the service sees it."""
        return dict(await self._call("GET", "/v1/host"))

    async def shutdown(self) -> None:
        """Ends the service; its sandboxes go on."""
        await self._call("POST", "/v1/shutdown", {})

    async def create(self, request: Mapping[str, Any]) -> SandboxDetail:
        """Creates a sandbox."""
        return await self._post("/v1/sandboxes", dict(request))

    async def list(self, labels: Iterable[str] = (), selector: str | None = None) -> list[SandboxSummary]:
        """The sandboxes whose labels fit every term (`KEY=VALUE` or `KEY`) and the selector, newest first."""
        return (await self.list_page(labels, selector)).sandboxes

    async def list_page(
        self,
        labels: Iterable[str] = (),
        selector: str | None = None,
        limit: int | None = None,
        after: str | None = None,
    ) -> SandboxPage:
        """At most `limit` of them, those after the page whose `next` is given as `after`."""
        pairs = [*(("label", label) for label in labels), ("selector", selector), ("limit", limit), ("after", after)]
        return await self._get(SandboxPage, "/v1/sandboxes" + _query(pairs))

    async def inspect(self, name: str) -> SandboxDetail:
        """Everything about one sandbox."""
        return await self._get(SandboxDetail, _sandbox(name))

    async def remove(self, name: str, force: bool = False) -> None:
        """Removes a sandbox; `force` kills it first."""
        await self._call("DELETE", _sandbox(name) + _query([("force", force)]))

    async def start(self, name: str, hold_main: bool = False) -> SandboxDetail:
        """Starts a resting sandbox."""
        return await self._post(_sandbox(name, "/start"), {"hold_main": hold_main})

    async def stop(self, name: str, grace_ms: int | None = None, force: bool = False) -> SandboxDetail:
        """Stops a sandbox; answers once it rests."""
        return await self._post(_sandbox(name, "/stop"), _stop_request(grace_ms, force))

    async def restart(self, name: str, grace_ms: int | None = None, force: bool = False) -> SandboxDetail:
        """Stops a sandbox if it runs, and starts it."""
        return await self._post(_sandbox(name, "/restart"), _stop_request(grace_ms, force))

    async def detach(self, name: str) -> SandboxDetail:
        """Lets a sandbox outlive its creator."""
        return await self._post(_sandbox(name, "/detach"))

    async def touch(self, name: str) -> SandboxDetail:
        """Counts as activity."""
        return await self._post(_sandbox(name, "/touch"))

    async def ping(self, name: str) -> PingReport:
        """Asks a running sandbox's agent for a sign of life. It is no activity, and wakes nothing."""
        return decode(PingReport, await self._call("POST", _sandbox(name, "/ping")))

    async def ssh_host(self, name: str) -> SshHost:
        """How an SSH client finds a sandbox."""
        return await self._get(SshHost, _sandbox(name, "/ssh/host"))

    async def wait(self, name: str) -> SandboxDetail:
        """Waits until a sandbox rests."""
        return await self._get(SandboxDetail, _sandbox(name, "/wait"))

    async def exec(self, name: str, request: Mapping[str, Any]) -> ExecHandle:
        """Runs a command in a sandbox."""
        first = {"type": "exec", "exec": dict(request)}
        return await self._session(_sandbox(name, "/exec"), first, bool(request.get("stdin")))

    async def attach(self, name: str, stdin: bool = False, start: bool = False) -> ExecHandle:
        """Watches the main workload; with `start` it begins one that was held back."""
        first = {"type": "attach", "stdin": stdin, "terminal": None, "timeout_ms": None}
        return await self._session(_sandbox(name, "/main" if start else "/attach"), first, stdin)

    async def logs(
        self,
        name: str,
        *,
        follow: bool = False,
        tail: int | None = None,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        source: str | None = None,
        grep: str | None = None,
    ) -> AsyncIterator[LogRecord]:
        """Reads a sandbox's log."""
        pairs = [("follow", follow), ("tail", tail), ("since", since), ("until", until), ("source", source), ("grep", grep)]
        async for line in self._lines("GET", _sandbox(name, "/logs") + _query(pairs)):
            yield decode(LogRecord, line)

    async def events(self, *, follow: bool = False, since: int | None = None) -> AsyncIterator[EventRecord]:
        """Reads what happened."""
        async for line in self._lines("GET", "/v1/events" + _query([("follow", follow), ("since", since)])):
            yield decode(EventRecord, line)

    async def metrics(self, name: str | None = None, labels: Iterable[str] = ()) -> MetricsSnapshot:
        """The newest sample of every sandbox, or of those that fit."""
        pairs = [("name", name), *(("label", label) for label in labels)]
        return await self._get(MetricsSnapshot, "/v1/metrics" + _query(pairs))

    async def metrics_stream(
        self, name: str | None = None, labels: Iterable[str] = (), *, interval: float = 1.0
    ) -> AsyncIterator[MetricsSnapshot]:
        """The same at each interval in seconds (0.1 to 3600), the first at once. A reader that is slow misses some."""
        pairs = [("name", name), *(("label", label) for label in labels), ("interval_ms", milliseconds(interval, "interval"))]
        async for line in self._lines("GET", "/v1/metrics/stream" + _query(pairs)):
            yield decode(MetricsSnapshot, line)

    async def metrics_history(
        self, name: str, *, last: float | None = None, points_max: int | None = None
    ) -> MetricsHistory:
        """The last hour of one sandbox, or the last seconds of it."""
        last_ms = None if last is None else milliseconds(last, "last")
        target = _sandbox(name, "/metrics") + _query([("last_ms", last_ms), ("points_max", points_max)])
        return await self._get(MetricsHistory, target)

    async def archive(self, name: str, action: Mapping[str, Any], user: str | None, stdin: bool) -> ExecHandle:
        """A tree of a sandbox as a tar stream, in either direction."""
        archive = {"action": dict(action)} | ({} if user is None else {"user": user})
        return await self._session(_sandbox(name, "/archive"), {"type": "archive", "archive": archive}, stdin)

    async def file_call(self, name: str, call: Mapping[str, Any], user: str | None = None) -> dict[str, Any]:
        """One call on a sandbox's files."""
        request = {"call": dict(call)} | ({} if user is None else {"user": user})
        return dict(await self._call("POST", _sandbox(name, "/files"), request))

    async def file_content(
        self, name: str, path: str, user: str | None = None, offset: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]:
        """The content of a file, piece by piece."""
        pairs = [("path", path), ("user", user), ("offset", offset), ("len", length)]
        connection = await self._connection()
        try:
            headers = await _http.send(connection, "GET", _sandbox(name, "/files/content") + _query(pairs))
            async for piece in connection.body(headers):
                yield piece
        finally:
            connection.abort()

    async def file_write(
        self,
        name: str,
        path: str,
        content: AsyncIterable[bytes],
        user: str | None = None,
        mode: int | None = None,
        append: bool = False,
    ) -> FileAttributes:
        """Writes the content of a file."""
        target = _sandbox(name, "/files/content") + _query([("path", path), ("user", user), ("mode", mode), ("append", append)])
        connection = await self._connection()
        try:
            headers = await _http.send(connection, "PUT", target, stream=content, content_type="application/octet-stream")
            answer = json.loads(await connection.collect(headers))
        except ValueError as error:
            raise _http.protocol_error(str(error)) from error
        finally:
            connection.abort()
        return decode(FileAttributes, answer.get("attributes"))

    async def file_watch(self, name: str, path: str, user: str | None = None, recursive: bool = False) -> AsyncIterator[FileChange]:
        """Changes of a directory's entries, or of a file."""
        pairs = [("path", path), ("user", user), ("recursive", recursive)]
        async for line in self._lines("GET", _sandbox(name, "/files/watch") + _query(pairs)):
            yield decode(FileChange, {"kind": "watching"} if line.get("type") == "watching" else line)

    async def volumes(self) -> builtins.list[VolumeDetail]:
        """Every volume, by name."""
        return decode(list[VolumeDetail], (await self._call("GET", "/v1/volumes")).get("volumes"))

    async def volume(self, name: str) -> VolumeDetail:
        """One volume."""
        return await self._get(VolumeDetail, f"/v1/volumes/{check_name(name)}")

    async def create_volume(self, name: str, kind: str = "dir", size_mib: int | None = None) -> VolumeDetail:
        """Makes a volume."""
        request = {"name": check_name(name), "kind": kind} | ({} if size_mib is None else {"size_mib": size_mib})
        return decode(VolumeDetail, await self._call("POST", "/v1/volumes", request))

    async def remove_volume(self, name: str) -> None:
        """Removes a volume."""
        await self._call("DELETE", f"/v1/volumes/{check_name(name)}")

    async def images(self) -> builtins.list[ImageHandle]:
        """The images of the store, newest first."""
        return decode(list[ImageHandle], (await self._call("GET", "/v1/images")).get("images"))

    async def image(self, reference: str) -> ImageDetail:
        """Everything about one image."""
        return await self._get(ImageDetail, "/v1/image" + _query([("reference", reference)]))

    async def remove_image(self, reference: str, force: bool = False) -> None:
        """Removes an image; `force` untags it even where sandboxes use it."""
        await self._call("DELETE", "/v1/image" + _query([("reference", reference), ("force", force)]))

    async def tag_image(self, reference: str, name: str) -> ImageHandle:
        """Gives an image another name."""
        return decode(ImageHandle, await self._call("POST", "/v1/images/tag", {"reference": reference, "name": name}))

    async def pin_image(self, reference: str, pinned: bool = True) -> ImageHandle:
        """Keeps prune from an image, or no more."""
        return decode(ImageHandle, await self._call("POST", "/v1/images/pin", {"reference": reference, "pinned": pinned}))

    async def prune_images(self, request: Mapping[str, Any]) -> ImagePruneReport:
        """Removes the images that the request allows and nothing needs."""
        return decode(ImagePruneReport, await self._call("POST", "/v1/images/prune", dict(request)))

    async def pull_image(self, request: Mapping[str, Any]) -> AsyncIterator[tuple[PullProgress, ImageHandle | None]]:
        """Fetches an image; the last step has it. What has come when the iteration is given up is kept for the next pull."""
        async for event in self._lines("POST", "/v1/images/pull", body=dict(request)):
            done = _finished(event)
            yield decode(PullProgress, event), decode(ImageHandle, done.get("image")) if done is not None else None

    async def save_images(self, references: Iterable[str], archive_format: str = "docker") -> AsyncIterator[bytes]:
        """Images as one archive; it is whole only when the iteration has ended by itself."""
        request = json.dumps({"references": builtins.list(references), "format": archive_format}).encode()
        connection = await self._connection()
        try:
            headers = await _http.send(connection, "POST", "/v1/images/save", request)
            async for piece in connection.body(headers):
                yield piece
        finally:
            connection.abort()

    async def load_image(self, archive: AsyncIterable[bytes], tag: str | None = None) -> builtins.list[ImageHandle]:
        """Loads an archive (docker or OCI, also compressed) into the store."""
        target = "/v1/images/load" + _query([("tag", tag)])
        async for event in self._lines("POST", target, archive, "application/x-tar"):
            done = _finished(event)
            if done is not None:
                return decode(list[ImageHandle], done.get("images"))
        raise DaemonUnavailableError("the load ended without an answer")


def _finished(event: Any) -> dict[str, Any] | None:
    """The last event of a progress stream; raises the error it tells."""
    kind = event.get("type") if isinstance(event, dict) else None
    if kind == "error":
        raise error_from_value(event.get("error"), "it failed")
    return dict(event) if kind == "done" else None


def _stop_request(grace_ms: int | None, force: bool) -> dict[str, Any]:
    return {"force": force} if grace_ms is None else {"force": force, "grace_ms": grace_ms}


__all__ = ["API_VERSION", "Client", "MsbError"]
