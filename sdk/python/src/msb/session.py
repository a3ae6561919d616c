"""A running command: its output as a stream, its stdin within the service's credit, its signals.

A caller that stops reading stops the command's output; nothing grows. Closing the handle ends an exec, never a main workload.
"""

from __future__ import annotations

import asyncio
import json
import signal as signals
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ._failure import error_from_value
from ._http import WebSocket, protocol_error
from .errors import CommandFailedError, ExecLostError, ExecTimeoutError, InvalidConfigError, LimitExceededError
from .models import ProcessEnd, decode

#: Bytes of stdin that may be sent before the service grants more.
STDIN_WINDOW = 256 << 10
#: Most credit that is ever kept, in bytes.
WINDOW_MAX = 64 << 20
#: Most stdin in one message, in bytes.
PIECE_LEN = 64 << 10
#: Most output that `exec` keeps unless the caller says otherwise, in bytes. A stream has no limit.
OUTPUT_LEN_MAX = 64 << 20

_STDOUT, _STDERR = 1, 2


@dataclass(frozen=True)
class Started:
    """The process exists."""

    pid: int


@dataclass(frozen=True)
class Stdout:
    """Standard output; with a terminal, all output."""

    data: bytes


@dataclass(frozen=True)
class Stderr:
    """Standard error."""

    data: bytes


@dataclass(frozen=True)
class OutputLost:
    """This watcher of a main workload was too slow for this many bytes."""

    bytes: int


@dataclass(frozen=True)
class Exited:
    """It ended; nothing follows."""

    end: ProcessEnd


ExecEvent = Started | Stdout | Stderr | OutputLost | Exited


@dataclass(frozen=True)
class ExecOutput:
    """What came out of a command."""

    end: ProcessEnd
    stdout: bytes
    stderr: bytes

    @property
    def exit_code(self) -> int | None:
        """Its exit code; `None` when a signal killed it."""
        return self.end.code

    @property
    def signal(self) -> int | None:
        """The signal that killed it, if one did."""
        return self.end.signal

    @property
    def timed_out(self) -> bool:
        """Whether it was killed at its timeout."""
        return self.end.timed_out

    @property
    def success(self) -> bool:
        """Whether it ended with code 0."""
        return self.end.code == 0 and not self.end.timed_out

    @property
    def stdout_text(self) -> str:
        """Its standard output as text; bytes that are no UTF-8 are replaced."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def stderr_text(self) -> str:
        """Its standard error as text; bytes that are no UTF-8 are replaced."""
        return self.stderr.decode("utf-8", "replace")

    def check(self) -> ExecOutput:
        """Itself if it ended well; else raises `ExecTimeoutError` or `CommandFailedError`."""
        if self.end.timed_out:
            raise ExecTimeoutError("the command ran longer than its timeout and was killed")
        if not self.success:
            how = f"signal {self.end.signal}" if self.end.code is None else f"code {self.end.code}"
            tail = self.stderr_text.splitlines()[-20:]
            raise CommandFailedError(f"the command ended with {how}", details=tail)
        return self


def signal_number(which: int | str) -> int:
    """The number of a signal given as number or name (`TERM`, `SIGTERM`)."""
    if isinstance(which, int):
        return int(which)
    name = which.upper().removeprefix("SIG")
    try:
        return int(signals.Signals[f"SIG{name}"])
    except KeyError:
        raise InvalidConfigError(f"{which!r} is no signal") from None


class ExecHandle:
    """A running command: iterate over its events, or `wait` for its end."""

    def __init__(self, socket: WebSocket, stdin: bool) -> None:
        self._socket = socket
        self._stdin = stdin
        self._credit = STDIN_WINDOW
        self._credited = asyncio.Condition()
        self._over = False

    @classmethod
    async def begin(cls, socket: WebSocket, first: dict[str, Any], stdin: bool) -> ExecHandle:
        """Sends the first message on a fresh socket."""
        handle = cls(socket, stdin)
        await handle._send(first)
        return handle

    async def _send(self, message: dict[str, Any]) -> None:
        await self._write(WebSocket.TEXT, json.dumps(message).encode())

    async def _write(self, opcode: int, data: bytes) -> None:
        try:
            await self._socket.send(opcode, data)
        except OSError as error:
            raise ExecLostError(f"the connection to the running command was lost: {error}") from error

    def __aiter__(self) -> AsyncIterator[ExecEvent]:
        return self

    async def __anext__(self) -> ExecEvent:
        while not self._over:
            try:
                message = await self._socket.receive()
            except OSError as error:
                await self._end()
                raise ExecLostError(f"the connection to the running command was lost: {error}") from error
            if message is None:
                await self._end()
                raise ExecLostError("the connection to the running command was lost: the service closed it")
            event = await self._event(*message)
            if event is not None:
                return event
        raise StopAsyncIteration

    async def _event(self, opcode: int, data: bytes) -> ExecEvent | None:
        if opcode == WebSocket.BINARY:
            if data[:1] == bytes([_STDOUT]):
                return Stdout(data[1:])
            if data[:1] == bytes([_STDERR]):
                return Stderr(data[1:])
            await self._end()
            raise protocol_error("output of an unknown kind")
        try:
            message = json.loads(data)
            kind = message["type"]
            if kind == "started":
                return Started(int(message["pid"]))
            if kind == "stdin_credit":
                async with self._credited:
                    self._credit = min(self._credit + int(message["bytes"]), WINDOW_MAX)
                    self._credited.notify_all()
                return None
            if kind == "output_lost":
                return OutputLost(int(message["bytes"]))
            if kind == "exited":
                end = decode(ProcessEnd, message["end"])
                await self._end()
                return Exited(end)
            failure = error_from_value(message.get("error"), "the command failed") if kind == "error" else None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            await self._end()
            raise protocol_error(str(error)) from error
        if failure is not None:
            await self._end()
            raise failure
        # What a newer service says beyond this is not for us.
        return None

    async def _end(self) -> None:
        self._over = True
        self._socket.abort()
        async with self._credited:
            self._credited.notify_all()

    async def write(self, data: bytes | str) -> None:
        """Writes to the command's stdin, waiting while it does not read. Somebody must iterate meanwhile."""
        if not self._stdin:
            raise InvalidConfigError("the command was started without stdin")
        rest = memoryview(data.encode() if isinstance(data, str) else data)
        while rest:
            async with self._credited:
                await self._credited.wait_for(lambda: self._credit > 0 or self._over)
                if self._over:
                    raise ExecLostError("the command has ended")
                now = min(len(rest), self._credit, PIECE_LEN)
                self._credit -= now
            await self._write(WebSocket.BINARY, bytes(rest[:now]))
            rest = rest[now:]

    async def close_stdin(self) -> None:
        """Ends stdin: the command reads end of file."""
        await self._send({"type": "stdin_eof"})

    async def signal(self, which: int | str) -> None:
        """Sends a signal to the command's process group."""
        await self._send({"type": "signal", "number": signal_number(which)})

    async def kill(self) -> None:
        """Sends SIGKILL."""
        await self.signal(signals.SIGKILL)

    async def resize(self, rows: int, columns: int) -> None:
        """Tells the command its terminal's size."""
        await self._send({"type": "resize", "size": {"rows": rows, "columns": columns}})

    async def wait(self) -> ProcessEnd:
        """Waits for its end; output is read and thrown away."""
        async for event in self:
            if isinstance(event, Exited):
                return event.end
        raise ExecLostError("the command has ended before")

    async def collect(self, stdin: bytes | None = None, output_len_max: int = OUTPUT_LEN_MAX) -> ExecOutput:
        """Writes `stdin`, reads to the end and gives back everything."""
        writer = asyncio.create_task(self._feed(stdin or b"")) if self._stdin else None
        output: dict[type[Stdout] | type[Stderr], list[bytes]] = {Stdout: [], Stderr: []}
        length = 0
        try:
            async for event in self:
                if isinstance(event, (Stdout, Stderr)):
                    output[type(event)].append(event.data)
                    length += len(event.data)
                    if length > output_len_max:
                        hint = "read it as a stream, or raise output_len_max"
                        raise LimitExceededError(f"the command wrote more than {output_len_max} bytes", hint=hint)
                elif isinstance(event, Exited):
                    return ExecOutput(event.end, b"".join(output[Stdout]), b"".join(output[Stderr]))
            raise ExecLostError("the command has ended before")
        finally:
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
            await self.aclose()

    async def _feed(self, data: bytes) -> None:
        # A command may end without reading its stdin: that is its right, and its end is what counts.
        try:
            await self.write(data)
            await self.close_stdin()
        except ExecLostError:
            pass

    async def aclose(self) -> None:
        """Ends the stream, and with it an exec that still runs."""
        await self._end()

    async def __aenter__(self) -> ExecHandle:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
