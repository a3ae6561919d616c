"""What the service answers with, as frozen dataclasses. Fields of a newer service that this version does not know are left out."""

from __future__ import annotations

import dataclasses
import stat
import types
import typing
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any, Literal, TypeVar

from ._http import protocol_error

T = TypeVar("T")

#: The states of a sandbox.
SandboxState = Literal[
    "created", "starting", "running", "draining", "stopping", "stopped", "asleep", "restarting", "crashed", "paused"
]


@dataclass(frozen=True)
class VersionInfo:
    """What a service is."""

    version: str
    api_version: int
    guest_generation: int
    pid: int
    started_at: datetime


@dataclass(frozen=True)
class ProcessEnd:
    """How a process ended: exactly one of `code` and `signal` is set."""

    code: int | None = None
    signal: int | None = None
    core_dumped: bool = False
    oom_killed: bool = False
    timed_out: bool = False


@dataclass(frozen=True)
class RunEnd:
    """How a run of a sandbox ended."""

    boot_id: str
    cause: str
    at: datetime
    process: ProcessEnd | None = None
    message: str = ""


@dataclass(frozen=True)
class SandboxSummary:
    """One sandbox in a list."""

    name: str
    id: str
    status: str
    image: str
    created_at: datetime
    command: list[str] = field(default_factory=list)
    started_at: datetime | None = None
    last_end: RunEnd | None = None
    restarts: int = 0
    ports: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    engine: str | None = None


@dataclass(frozen=True)
class Phase:
    """A phase of a boot and what it took, in nanoseconds."""

    name: str = ""
    duration_ns: int = 0


@dataclass(frozen=True)
class SandboxNetwork:
    """The network of one sandbox."""

    addresses: dict[str, Any] | None = None
    """Addresses of the guest and its gateway; none: there is no network but loopback."""
    policy: list[str] = field(default_factory=list)
    """The policy in the order it is tried, one line for each rule and default."""


@dataclass(frozen=True)
class SandboxDetail(SandboxSummary):
    """Everything about one sandbox."""

    spec: dict[str, Any] = field(default_factory=dict)
    image_digest: str = ""
    boot_id: str | None = None
    vmm_pid: int | None = None
    engine_reason: str | None = None
    network: SandboxNetwork = field(default_factory=SandboxNetwork)
    root_allocated_bytes: int = 0
    directory: str = ""
    heartbeat_file: str = ""
    next_try_at: datetime | None = None
    memory_allocated_bytes: int | None = None
    idle_for_ms: int | None = None
    stops_in_ms: int | None = None
    last_activity: str | None = None


@dataclass(frozen=True)
class LogRecord:
    """A line of a sandbox's log."""

    time: datetime
    boot_id: str
    source: str
    data: str


@dataclass(frozen=True)
class EventRecord:
    """Something that happened to a sandbox."""

    sequence: int
    time: datetime
    sandbox: str
    sandbox_id: str
    event: str
    state: str
    actor: str
    boot_id: str | None = None
    cause: str | None = None
    message: str = ""


@dataclass(frozen=True)
class GuestMetrics:
    """What a guest says of itself."""

    memory_used_bytes: int = 0
    memory_total_bytes: int = 0
    root_used_bytes: int = 0
    root_free_bytes: int = 0
    processes: int = 0


@dataclass(frozen=True)
class SandboxMetrics:
    """The newest sample of one sandbox."""

    name: str
    id: str
    boot_id: str
    vmm_pid: int
    status: str
    started_at: datetime
    last: bool
    cpu_utilization: float
    labels: dict[str, str] = field(default_factory=dict)
    restarts: int = 0
    sample: dict[str, Any] = field(default_factory=dict)
    guest: GuestMetrics | None = None


@dataclass(frozen=True)
class MetricsSnapshot:
    """The newest sample of every sandbox."""

    host_id: str
    host_name: str
    instance_id: str
    taken_at: datetime
    states: dict[str, int] = field(default_factory=dict)
    sandboxes: list[SandboxMetrics] = field(default_factory=list)


@dataclass(frozen=True)
class HistoryPoint:
    """One moment of a sandbox. Counters are cumulative since the boot of their run."""

    at: datetime
    boot_id: str
    cpu_utilization: float
    cpu_time_us: int
    memory_resident_bytes: int
    memory_limit_bytes: int
    disk_read_bytes: int
    disk_written_bytes: int
    disk_operations: int
    network_received_bytes: int
    network_sent_bytes: int
    network_packets: int
    root_allocated_bytes: int
    guest: GuestMetrics | None = None


@dataclass(frozen=True)
class MetricsHistory:
    """The last hour of one sandbox, oldest point first."""

    name: str
    id: str
    points: list[HistoryPoint]


@dataclass(frozen=True)
class PingReport:
    """A sandbox's agent has answered."""

    boot_id: str
    round_trip_us: int


@dataclass(frozen=True)
class SandboxPage:
    """A page of a list; `next` is the `after` of the next one, if there is one."""

    sandboxes: list[SandboxSummary]
    next: str | None = None


@dataclass(frozen=True)
class SshHost:
    """How an SSH client finds a sandbox."""

    sandbox: str
    user: str
    host_key: str
    fingerprint: str


@dataclass(frozen=True)
class SshConfig:
    """What `ssh` needs: a block for `ssh_config`, and the host key as a line of `known_hosts`."""

    alias: str
    config: str
    known_hosts: str
    host: SshHost


@dataclass(frozen=True)
class FileTime:
    """A time of a file: seconds since 1970 and nanoseconds below a second."""

    seconds: int
    nanoseconds: int = 0


@dataclass(frozen=True)
class FileAttributes:
    """What stat(2) says of a path in a sandbox."""

    mode: int
    uid: int
    gid: int
    size: int
    accessed: FileTime
    modified: FileTime
    changed: FileTime
    links: int = 1
    device: int = 0
    inode: int = 0
    allocated: int = 0

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode)


@dataclass(frozen=True)
class DirectoryEntry:
    """One entry of a directory, with its own attributes; none if it vanished meanwhile."""

    name: str
    attributes: FileAttributes | None = None


@dataclass(frozen=True)
class FileChange:
    """A record of a watch: `watching` first, then `created`, `written`, `removed`, `attributes`, `overflow`."""

    kind: str
    path: str = ""
    directory: bool = False


@dataclass(frozen=True)
class VolumeUser:
    """A sandbox that mounts a volume, where and how."""

    sandbox: str
    target: str
    options: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class VolumeDetail:
    """A named volume."""

    name: str
    kind: str
    allocated_bytes: int
    created_at: datetime
    path: str
    size_bytes: int | None = None
    users: list[VolumeUser] = field(default_factory=list)


@dataclass(frozen=True)
class PrunedImage:
    """An image that a prune took, or would take."""

    digest: str
    references: list[str]


@dataclass(frozen=True)
class ImagePruneReport:
    """What a prune took, or would take."""

    image_refs_removed: int
    manifests_removed: int
    layers_removed: int
    fsmeta_removed: int
    bytes_reclaimed: int
    dry_run: bool = False
    partials_removed: int = 0
    images: list[PrunedImage] = field(default_factory=list)


@dataclass(frozen=True)
class PullLayer:
    """A layer of an image that is being pulled."""

    digest: str
    bytes: int


@dataclass(frozen=True)
class PullProgress:
    """A step of a pull: `resolved`, `layer`, `layer_done`, `retry`, `warning` or `done`, with what belongs to it."""

    type: str
    digest: str | None = None
    platform: str | None = None
    layers: list[PullLayer] = field(default_factory=list)
    bytes: int | None = None
    known: bool | None = None
    what: str | None = None
    reason: str | None = None
    wait_ms: int | None = None
    message: str | None = None
    was_present: bool | None = None


@dataclass(frozen=True)
class ImageHandle:
    """One image in a list."""

    digest: str
    references: list[str]
    platform: str
    compressed_bytes: int
    unpacked_bytes: int
    layers: int
    loaded_at: datetime
    created_at: datetime | None = None
    pinned: bool = False

    @property
    def reference(self) -> str:
        """Its first name, or its digest when it has none."""
        return self.references[0] if self.references else self.digest


@dataclass(frozen=True)
class ImageConfigDetail:
    """What an image says about running it."""

    digest: str
    env: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)
    working_dir: str = ""
    user: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    stop_signal: str | None = None
    exposed_ports: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ImageLayerDetail:
    """One layer of an image."""

    diff_id: str
    blob_digest: str
    media_type: str
    compressed_bytes: int
    data_bytes: int
    shared_by: int
    unpacked_bytes: int = 0


@dataclass(frozen=True)
class ImageDetail(ImageHandle):
    """Everything about one image."""

    config: ImageConfigDetail = field(default_factory=lambda: ImageConfigDetail(""))
    layer_details: list[ImageLayerDetail] = field(default_factory=list)
    used_by: list[str] = field(default_factory=list)
    used_by_snapshots: list[str] = field(default_factory=list)


def decode(kind: type[T], value: Any) -> T:
    """Makes a typed value of parsed JSON; raises `InternalError` when it does not fit."""
    try:
        return typing.cast(T, _decode(kind, value))
    except (TypeError, ValueError, KeyError) as error:
        raise protocol_error(f"{kind.__name__}: {error}") from error


@cache
def _fields(kind: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


def _decode(kind: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _decode(inner, value)
    if origin is list:
        return [_decode(arguments[0], item) for item in _as(list, value)]
    if origin is dict:
        return {str(key): _decode(arguments[1], item) for key, item in _as(dict, value).items()}
    if dataclasses.is_dataclass(kind):
        present = _as(dict, value)
        return typing.cast(Any, kind)(
            **{name: _decode(hint, present[name]) for name, hint in _fields(typing.cast(type, kind)).items() if name in present}
        )
    if kind is datetime:
        return _time(_as(str, value))
    if kind is float:
        return float(value)
    return _as(kind, value)


def _as(kind: type[T], value: Any) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def _time(text: str) -> datetime:
    # RFC 3339 with nanoseconds; datetime keeps microseconds.
    whole, dot, rest = text.partition(".")
    if dot:
        digits = rest.rstrip("Zz")
        text = f"{whole}.{digits[:6]}Z"
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
