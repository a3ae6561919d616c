"""Which service a client uses, and starting one when none answers: the same rules as `msb` itself has.

`MSB_HOST` names a socket, which must answer. Otherwise the user's own socket is used; when nobody answers there, `msbd` is
started in a session of its own: `MSB_DAEMON`, else `msbd` in `MSB_PATH` or in `PATH`.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ._failure import MsbError
from .errors import DaemonUnavailableError, HomeUnusableError, PermissionDeniedError, RuntimeNotFoundError

START_TIMEOUT_S = 20.0
SOCKET_PATH_LEN_MAX = 107
LOG_LEN_MAX = 16 << 20
LOG_TAIL_LINES = 20
INSTALL_HINT = "install msb (`cargo xtask install --prefix ~/.local` in its repository), or set MSB_PATH to where it is"

#: What a daemon keeps of our environment, beside MSB_*: it lives for months, so secrets stay out of it.
KEPT_VARIABLES = frozenset(
    "HOME PATH USER LOGNAME LANG LC_ALL LC_CTYPE TZ TMPDIR XDG_RUNTIME_DIR RUST_BACKTRACE HTTP_PROXY HTTPS_PROXY NO_PROXY"
    " http_proxy https_proxy no_proxy SSL_CERT_FILE SSL_CERT_DIR".split()
)


@dataclass(frozen=True)
class Surroundings:
    """What decides about paths."""

    environment: Mapping[str, str]
    uid: int

    @classmethod
    def of_process(cls) -> Surroundings:
        """Those of this process."""
        return cls(dict(os.environ), os.getuid())

    def variable(self, name: str) -> str | None:
        """A variable; an empty one counts as absent."""
        return self.environment.get(name) or None

    @property
    def home(self) -> str:
        """`MSB_HOME`, else `~/.msb`."""
        home = self.variable("HOME")
        return self.variable("MSB_HOME") or (os.path.join(home, ".msb") if home else f"/tmp/msb-home-{self.uid}")

    @property
    def socket(self) -> str:
        """The socket of the control API."""
        named = self.variable("MSB_HOST")
        if named:
            return named
        xdg = self.variable("XDG_RUNTIME_DIR")
        base = os.path.join(xdg, "msb") if xdg else f"/tmp/msb-{self.uid}"
        own, home = self.variable("MSB_HOME"), self.variable("HOME")
        # A home that is not the default one has a directory of its own, so that two services never share a socket.
        if own and (home is None or Path(own) != Path(home, ".msb")):
            base = os.path.join(base, f"h{_fnv1a(os.fsencode(own)):016x}")
        return os.path.join(base, "msbd.sock")

    def daemon_program(self) -> str:
        """The program to start; raises `RuntimeNotFoundError`."""
        named = self.variable("MSB_DAEMON")
        if named:
            if os.path.isfile(named):
                return os.path.abspath(named)
            raise RuntimeNotFoundError(f"MSB_DAEMON names {named}, which is no file", hint=INSTALL_HINT)
        path = self.variable("MSB_PATH")
        if path:
            program = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "msbd")
            if os.path.isfile(program):
                return os.path.abspath(program)
            raise RuntimeNotFoundError(f"MSB_PATH names {path}, where there is no msbd", hint=INSTALL_HINT)
        found = shutil.which("msbd", path=self.environment.get("PATH", ""))
        if found is None:
            raise RuntimeNotFoundError("the program msbd is not in PATH", hint=INSTALL_HINT)
        return os.path.abspath(found)


def _fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def cannot_connect(path: str, error: OSError) -> MsbError:
    """The error of a socket that cannot be connected to."""
    message = f"cannot connect to {path}: {error.strerror or error}"
    if isinstance(error, PermissionError):
        return PermissionDeniedError(message)
    return DaemonUnavailableError(message)


#: Connects to a socket and checks who answers: an `OSError` means that nobody does.
Open = Callable[[str, int | None], Awaitable[None]]


async def find(surroundings: Surroundings, open_socket: Open) -> bool:
    """Whether a service answers now. Starts nothing."""
    path = surroundings.socket
    if len(os.fsencode(path)) > SOCKET_PATH_LEN_MAX:
        raise DaemonUnavailableError(f"the path of the socket is too long: {path} (max {SOCKET_PATH_LEN_MAX} bytes)")
    named = surroundings.variable("MSB_HOST") is not None
    try:
        await open_socket(path, None if named else surroundings.uid)
    except OSError as error:
        failure = cannot_connect(path, error)
        if named:
            failure.hint = "MSB_HOST names this socket: start the service behind it, or unset MSB_HOST"
            raise failure from error
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError, NotADirectoryError)):
            return False
        raise failure from error
    return True


async def find_or_start(surroundings: Surroundings, open_socket: Open, timeout_s: float = START_TIMEOUT_S) -> None:
    """Returns once a service answers, starting one if there is none."""
    if await find(surroundings, open_socket):
        return
    program = surroundings.daemon_program()
    home = surroundings.home
    deadline = time.monotonic() + timeout_s
    try:
        os.makedirs(home, mode=0o700, exist_ok=True)
        lock = open(os.open(os.path.join(home, "start.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "rb+")
    except OSError as error:
        raise HomeUnusableError(f"{home}: {error.strerror}") from error
    with lock:
        # Whoever holds the lock is starting a daemon.
        while not _locked(lock):
            if time.monotonic() >= deadline:
                raise DaemonUnavailableError("another client has been starting msbd for too long")
            await asyncio.sleep(0.02)
            if await find(surroundings, open_socket):
                return
        if not await find(surroundings, open_socket):
            await _start(program, surroundings, open_socket, deadline)


def _locked(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def _start(program: str, surroundings: Surroundings, open_socket: Open, deadline: float) -> None:
    log_path = os.path.join(surroundings.home, "msbd.log")
    if os.path.exists(log_path) and os.path.getsize(log_path) >= LOG_LEN_MAX:
        os.replace(log_path, log_path + ".1")
    kept = {
        name: value
        for name, value in surroundings.environment.items()
        if name in KEPT_VARIABLES or (name.startswith("MSB_") and name != "MSB_HOST")
    }
    with open(os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), "ab") as log:
        began = os.path.getsize(log_path)
        try:
            child = subprocess.Popen(
                [program],
                env=kept,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            raise DaemonUnavailableError(f"cannot start {program}: {error.strerror}") from error
    while True:
        await asyncio.sleep(0.005)
        # The look at the process comes first: one that ended because another serves this home leaves that one answering.
        code = child.poll()
        try:
            if await find(surroundings, open_socket):
                # It outlives us on purpose; this keeps Python from complaining that nobody waited for it.
                child.returncode = child.returncode or 0
                return
        except MsbError:
            if code is not None:
                raise
        how = f"msbd ended with code {code} while it was starting" if code is not None else None
        if how is None and time.monotonic() >= deadline:
            how = "msbd did not answer in time"
        if how is not None:
            with open(log_path, "rb") as written:
                written.seek(began)
                tail = written.read(LOG_LEN_MAX).decode("utf-8", "replace").splitlines()[-LOG_TAIL_LINES:]
            hint = f"see the end of {log_path}, or run `msbd` in a terminal"
            raise DaemonUnavailableError(how, hint=hint, details=tail)
