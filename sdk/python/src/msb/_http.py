"""HTTP/1.1 and WebSocket on a Unix socket, as much of them as the control API needs.

Used by `client` and `session`. It knows no route and starts no service. Everything that arrives is bounded.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import socket
import struct
from collections.abc import AsyncIterable, AsyncIterator, Mapping

from ._failure import MsbError, error_from_body
from .errors import DaemonUnavailableError, InternalError, PermissionDeniedError

#: Largest answer that is read into memory, in bytes.
ANSWER_LEN_MAX = 64 << 20
#: Longest line of a head or of a streamed answer, in bytes.
LINE_LEN_MAX = 8 << 20
#: Most lines of a head.
HEAD_LINES_MAX = 200
#: Largest message of a WebSocket, in bytes.
MESSAGE_LEN_MAX = 8 << 20
#: Bytes that may wait in a connection's buffer before the service is held back.
BUFFER_LEN = 256 << 10

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def protocol_error(what: str) -> MsbError:
    """An answer that breaks the protocol."""
    return InternalError(f"the service's answer cannot be understood: {what}")


def lost(error: BaseException | str) -> MsbError:
    """The connection failed under a request."""
    return DaemonUnavailableError(f"the connection to msbd was lost: {error}")


class Connection:
    """One connection, for one request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, path: str, owner: int | None) -> Connection:
        """Connects; raises the `OSError` of connect(2), and `PermissionDeniedError` when a stranger listens.

        `owner` is the user whose process must listen (root may, too): the default socket lives in a directory of a
        predictable name, where somebody else could be waiting for a request that holds secrets.
        """
        reader, writer = await asyncio.open_unix_connection(path, limit=BUFFER_LEN)
        if owner is not None:
            sock: socket.socket = writer.get_extra_info("socket")
            _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid not in (owner, 0):
                writer.close()
                raise PermissionDeniedError(f"{path} belongs to the user {uid}")
        return cls(reader, writer)

    async def close(self) -> None:
        """Closes it; never raises for a connection that is gone already."""
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            pass

    def abort(self) -> None:
        """Closes it at once, without waiting."""
        transport = self.writer.transport
        if transport is not None:
            transport.abort()

    async def send_head(self, method: str, target: str, headers: Mapping[str, str], body: bytes = b"") -> None:
        """Writes a request's head, and a body that is there already: together, so that a service that answers to the head and closes
        has read all of it."""
        lines = [f"{method} {target} HTTP/1.1", "host: msbd"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("ascii") + body)
        await self.writer.drain()

    async def _line(self) -> bytes:
        try:
            line = await self.reader.readuntil(b"\n")
        except asyncio.LimitOverrunError:
            raise protocol_error("a line without an end") from None
        except (asyncio.IncompleteReadError, OSError) as error:
            raise lost(error) from error
        return line.rstrip(b"\r\n")

    async def head(self) -> tuple[int, dict[str, str]]:
        """Reads an answer's status and headers (names in lower case)."""
        words = (await self._line()).split(b" ", 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise protocol_error("it is no HTTP/1.1")
        headers: dict[str, str] = {}
        for _ in range(HEAD_LINES_MAX):
            line = await self._line()
            if not line:
                return int(words[1]), headers
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        raise protocol_error("its head is too long")

    async def body(self, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """The pieces of an answer's body."""
        try:
            if "chunked" in headers.get("transfer-encoding", ""):
                while True:
                    size = int((await self._line()).split(b";")[0], 16)
                    if size == 0:
                        while await self._line():
                            pass
                        return
                    async for piece in self._exactly(size):
                        yield piece
                    await self._line()
            elif "content-length" in headers:
                async for piece in self._exactly(int(headers["content-length"])):
                    yield piece
            else:
                while piece := await self.reader.read(BUFFER_LEN):
                    yield piece
        except ValueError as error:
            raise protocol_error(str(error)) from error
        except OSError as error:
            raise lost(error) from error

    async def _exactly(self, size: int) -> AsyncIterator[bytes]:
        if size < 0:
            raise protocol_error("a negative length")
        while size > 0:
            piece = await self.reader.read(min(size, BUFFER_LEN))
            if not piece:
                raise lost("the answer broke off")
            size -= len(piece)
            yield piece

    async def collect(self, headers: Mapping[str, str]) -> bytes:
        """The whole body."""
        whole = bytearray()
        async for piece in self.body(headers):
            whole += piece
            if len(whole) > ANSWER_LEN_MAX:
                raise protocol_error("it is too long")
        return bytes(whole)

    async def lines(self, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """The lines of a streamed answer, without empty ones."""
        rest = bytearray()
        async for piece in self.body(headers):
            rest += piece
            *whole, last = rest.split(b"\n")
            for line in whole:
                if line.strip():
                    yield bytes(line)
            rest = last
            if len(rest) > LINE_LEN_MAX:
                raise protocol_error("a line without an end")
        if rest.strip():
            yield bytes(rest)

    async def checked_head(self) -> tuple[int, dict[str, str]]:
        """An answer's head; an answer of failure is raised as its error."""
        status, headers = await self.head()
        if not (200 <= status < 300 or status == 101):
            raise error_from_body(status, await self.collect(headers))
        return status, headers


async def send(
    connection: Connection,
    method: str,
    target: str,
    body: bytes | None = None,
    stream: AsyncIterable[bytes] | None = None,
    content_type: str = "application/json",
) -> dict[str, str]:
    """Sends one request and gives back the headers of its answer, which is a success."""
    headers = {"connection": "close"}
    if body is not None:
        headers |= {"content-type": content_type, "content-length": str(len(body))}
    elif stream is not None:
        headers |= {"content-type": content_type, "transfer-encoding": "chunked"}
    elif method != "GET":
        headers["content-length"] = "0"
    try:
        await connection.send_head(method, target, headers, body or b"")
        if stream is not None:
            await _send_stream(connection, stream)
    except OSError as error:
        # A service that refuses early closes its side while we still write; its answer says why, if there is one.
        try:
            return (await connection.checked_head())[1]
        except DaemonUnavailableError:
            raise lost(error) from error
    return (await connection.checked_head())[1]


async def _send_stream(connection: Connection, stream: AsyncIterable[bytes]) -> None:
    async for piece in stream:
        if piece:
            connection.writer.write(b"%x\r\n" % len(piece) + piece + b"\r\n")
            await connection.writer.drain()
    connection.writer.write(b"0\r\n\r\n")
    await connection.writer.drain()


class WebSocket:
    """The client's side of a WebSocket (RFC 6455)."""

    TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = asyncio.Lock()

    @classmethod
    async def upgrade(cls, connection: Connection, target: str) -> WebSocket:
        """Turns a fresh connection into a WebSocket."""
        key = base64.b64encode(os.urandom(16))
        headers = {
            "connection": "Upgrade",
            "upgrade": "websocket",
            "sec-websocket-version": "13",
            "sec-websocket-key": key.decode(),
        }
        try:
            await connection.send_head("GET", target, headers)
        except OSError as error:
            raise lost(error) from error
        status, answer = await connection.checked_head()
        expected = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest()).decode()
        if status != 101 or answer.get("sec-websocket-accept") != expected:
            raise protocol_error("it is no WebSocket")
        return cls(connection)

    async def send(self, opcode: int, data: bytes) -> None:
        """Sends one message; raises `OSError` when the connection is gone."""
        length = len(data)
        if length < 126:
            head = struct.pack("!BB", 0x80 | opcode, 0x80 | length)
        elif length < 1 << 16:
            head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, length)
        else:
            head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, length)
        key = os.urandom(4)
        async with self._lock:
            self._connection.writer.write(head + key + _masked(data, key))
            await self._connection.writer.drain()

    async def receive(self) -> tuple[int, bytes] | None:
        """The next message, text or binary; `None` once the service has closed. Raises `OSError` when it is lost."""
        kind, message = 0, bytearray()
        while True:
            try:
                first, second = await self._connection.reader.readexactly(2)
                length = second & 0x7F
                if length == 126:
                    (length,) = struct.unpack("!H", await self._connection.reader.readexactly(2))
                elif length == 127:
                    (length,) = struct.unpack("!Q", await self._connection.reader.readexactly(8))
                if length + len(message) > MESSAGE_LEN_MAX:
                    raise protocol_error("a message is too long")
                data = await self._connection.reader.readexactly(length)
            except asyncio.IncompleteReadError:
                raise ConnectionResetError("the service closed it") from None
            opcode = first & 0x0F
            if opcode == self.PING:
                await self.send(self.PONG, data)
            elif opcode == self.CLOSE:
                return None
            elif opcode in (0, self.TEXT, self.BINARY):
                kind = opcode or kind
                message += data
                if first & 0x80:
                    return kind, bytes(message)
            elif opcode != self.PONG:
                raise protocol_error("a frame of an unknown kind")

    async def close(self) -> None:
        """Says goodbye and closes the connection."""
        try:
            await self.send(self.CLOSE, struct.pack("!H", 1000))
        except OSError:
            pass
        await self._connection.close()

    def abort(self) -> None:
        """Closes the connection at once."""
        self._connection.abort()


def _masked(data: bytes, key: bytes) -> bytes:
    # One big number at a time is by far the fastest way to XOR without a library.
    length = len(data)
    pattern = (key * (length // 4 + 1))[:length]
    return (int.from_bytes(data, "big") ^ int.from_bytes(pattern, "big")).to_bytes(length, "big")
