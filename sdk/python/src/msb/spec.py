"""What a sandbox or a command is made of, checked as far as it can be without a service: pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .errors import InvalidConfigError, InvalidLabelError, InvalidNameError

if TYPE_CHECKING:
    from .volume import Mount

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_RESERVED = ("sandbox.", "microsandbox.", "service.")

_PORT = re.compile(r"(?:(?P<bind>[0-9.]+|\[[0-9a-fA-F:.]+\]):)?(?P<host>[0-9]{1,5}):(?P<guest>[0-9]{1,5})(?:/(?P<transport>tcp|udp))?\Z")

#: Which addresses a sandbox reaches where no rule decides.
NetworkProfile = Literal["public", "private", "host", "all", "none"]
#: What its workloads may do.
Security = Literal["default", "restricted", "strict"]
#: When to fetch its image from its registry.
PullPolicy = Literal["always", "if_missing", "never"]


@dataclass(frozen=True)
class Network:
    """The network of a sandbox: a profile, and rules before it of which the first that fits decides (`deny@example.com:tcp:443`)."""

    profile: NetworkProfile = "public"
    rules: Sequence[str] = ()
    enabled: bool = True
    """Whether there is a network device at all."""
    default_egress: Literal["allow", "deny"] | None = None
    default_ingress: Literal["allow", "deny"] | None = None
    nameservers: Sequence[str] = ()
    """Upstream name servers in place of the host's own, each `ADDRESS:PORT`."""


@dataclass(frozen=True)
class Rootfs:
    """What a sandbox's root is made of; `Image.oci`, `Image.bind` and `Image.disk` make one."""

    kind: Literal["oci", "bind", "disk"]
    source: str


#: What follows the end of the main workload.
Restart = Literal["default", "no", "on_failure", "always", "unless_stopped"]


def check_name(name: str) -> str:
    """A name that is one; raises `InvalidNameError`."""
    if not isinstance(name, str) or not _NAME.match(name):
        raise InvalidNameError(f"sandbox name {name!r} breaks the rule for names")
    return name


def check_env(env: Mapping[str, str]) -> dict[str, str]:
    """An environment that execve(2) can take; an error never shows a value."""
    for name, value in env.items():
        if not name or "=" in name or "\0" in name:
            raise InvalidConfigError(f"environment variable name {name!r} is empty or has '=' or a zero byte")
        if "\0" in value:
            raise InvalidConfigError(f"environment variable {name} has a zero byte in its value")
    return dict(env)


def milliseconds(seconds: float, what: str) -> int:
    """A duration as the API has it; raises `InvalidConfigError` for a negative one."""
    if seconds < 0:
        raise InvalidConfigError(f"{what} must not be negative")
    return round(seconds * 1000)


def words_of(command: Sequence[str], what: str = "a command") -> list[str]:
    """The words of a command: a list, so that a whole shell line is not taken for a program's name letter by letter."""
    if isinstance(command, str):
        raise InvalidConfigError(f"{what} is a list of words; for a shell line use shell()")
    if any("\0" in word for word in command):
        raise InvalidConfigError("a word of the command has a zero byte")
    return list(command)


def root_of(image: str | Rootfs) -> dict[str, str]:
    """What a sandbox's root is made of, as the API has it."""
    if isinstance(image, str):
        return {"image": image}
    kinds = {"oci": "image", "bind": "directory", "disk": "disk"}
    return {"image": image.source, "root": kinds[image.kind]}


def port_of(text: str) -> dict[str, Any]:
    """A published port written `[BIND:]HOST:GUEST[/tcp|/udp]`; host port 0 is any free one."""
    found = _PORT.match(text)
    if found is None or not 0 < int(found["guest"]) < 1 << 16 or int(found["host"]) >= 1 << 16:
        raise InvalidConfigError(f"published port {text!r}; write [BIND:]HOST:GUEST[/tcp|/udp]")
    return {
        "bind": (found["bind"] or "127.0.0.1").strip("[]"),
        "host_port": int(found["host"]),
        "guest_port": int(found["guest"]),
        "transport": found["transport"] or "tcp",
    }


def _network(network: Network | NetworkProfile | None, ports: Sequence[str]) -> dict[str, Any] | None:
    if network is None and not ports:
        return None
    wanted = network if isinstance(network, Network) else Network(profile=network or "public")
    value: dict[str, Any] = {
        "profile": wanted.profile,
        "enabled": wanted.enabled,
        "rules": list(wanted.rules),
        "default_egress": wanted.default_egress,
        "default_ingress": wanted.default_ingress,
        "ports": [port_of(port) for port in ports],
    }
    if wanted.nameservers:
        value["dns"] = {"nameservers": list(wanted.nameservers)}
    return value


def _rlimits(rlimits: Mapping[str, int | tuple[int, int]]) -> list[dict[str, Any]]:
    pairs = {name: (limit, limit) if isinstance(limit, int) else limit for name, limit in rlimits.items()}
    return [{"resource": name, "soft": soft, "hard": hard} for name, (soft, hard) in pairs.items()]


def create_request(
    name: str | None,
    image: str | Rootfs,
    *,
    cpus: int | None = None,
    memory_mib: int | None = None,
    root_size_mib: int | None = None,
    env: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    workdir: str | None = None,
    user: str | None = None,
    hostname: str | None = None,
    entrypoint: Sequence[str] | None = None,
    command: Sequence[str] | None = None,
    main: bool = False,
    stop_signal: str | None = None,
    stop_grace: float | None = None,
    detached: bool = False,
    ephemeral: bool = False,
    engine: Literal["auto", "kvm", "qemu"] | None = None,
    restart: Restart | None = None,
    max_retries: int | None = None,
    idle_timeout: float | None = None,
    on_idle: Literal["stop", "restart", "suspend"] | None = None,
    max_duration: float | None = None,
    mounts: Sequence[Mount] = (),
    ports: Sequence[str] = (),
    network: Network | NetworkProfile | None = None,
    security: Security | None = None,
    rlimits: Mapping[str, int | tuple[int, int]] | None = None,
    pull: PullPolicy | None = None,
    replace: bool = False,
    replace_grace: float | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The request that creates a sandbox; raises before any connection is made."""
    if not image:
        raise InvalidConfigError("image is required")
    # Each with the message the service has for it.
    if cpus is not None and cpus <= 0:
        raise InvalidConfigError("cpus must be greater than 0")
    if memory_mib is not None and memory_mib <= 0:
        raise InvalidConfigError("memory must be greater than 0")
    for key in labels or {}:
        if not key:
            raise InvalidLabelError("label key must not be empty")
        if prefix := next((prefix for prefix in _RESERVED if key.startswith(prefix)), None):
            raise InvalidLabelError(f"label key '{key}' uses reserved prefix '{prefix}'")
    spec: dict[str, Any] = {
        "name": None if name is None else check_name(name),
        **root_of(image),
        "cpus": cpus,
        "memory_mib": memory_mib,
        "root_size_mib": root_size_mib,
        "env": check_env(env or {}) or None,
        "labels": dict(labels or {}) or None,
        "workdir": workdir,
        "user": user,
        "hostname": hostname,
        "entrypoint": None if entrypoint is None else words_of(entrypoint, "an entrypoint"),
        "command": None if command is None else words_of(command),
        "workload": "main" if main or command is not None else None,
        "stop_signal": stop_signal,
        "stop_grace_ms": None if stop_grace is None else milliseconds(stop_grace, "stop_grace"),
        "detached": detached or None,
        "ephemeral": ephemeral or None,
        "engine": engine,
        "restart": _restart(restart, max_retries),
        "idle_timeout_ms": None if idle_timeout is None else milliseconds(idle_timeout, "idle_timeout"),
        "on_idle": on_idle,
        "max_duration_ms": None if max_duration is None else milliseconds(max_duration, "max_duration"),
        "mounts": [mount.value() for mount in mounts] or None,
        "network": _network(network, ports),
        "security": security,
        "rlimits": _rlimits(rlimits or {}) or None,
    }
    request: dict[str, Any] = {"spec": {key: value for key, value in spec.items() if value is not None}}
    request["spec"].update(extra or {})
    if pull is not None:
        request["pull"] = pull
    if replace or replace_grace is not None:
        request["replace_grace_ms"] = milliseconds(10 if replace_grace is None else replace_grace, "replace_grace")
    return request


def _restart(policy: Restart | None, max_retries: int | None) -> dict[str, Any] | None:
    if policy is None:
        return None
    if policy == "on_failure":
        return {"policy": policy, "max_retries": max_retries}
    return {"policy": policy}


def exec_request(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    workdir: str | None = None,
    user: str | None = None,
    stdin: bool = False,
    terminal: tuple[int, int] | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """The request that runs a command."""
    words = words_of(command)
    if not words:
        raise InvalidConfigError("a command is required")
    request: dict[str, Any] = {
        "command": words,
        "env": check_env(env or {}),
        "workdir": workdir,
        "user": user,
        "stdin": stdin,
        "terminal": None if terminal is None else {"rows": terminal[0], "columns": terminal[1]},
        "timeout_ms": None if timeout is None else milliseconds(timeout, "timeout"),
    }
    return {key: value for key, value in request.items() if value is not None}
