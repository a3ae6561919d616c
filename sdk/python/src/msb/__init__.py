"""The Python client of msb: sandboxes in microVMs, over the service's Unix socket.

```python
async with Sandbox.create("box", image="busybox") as box:
    output = await box.exec(["echo", "hello"])
    assert output.stdout_text == "hello\\n"
```

`msb.sync` has the same without `async`. There is no native code here, and nothing beyond the standard library.
"""

from . import errors
from ._failure import MsbError
from .client import API_VERSION, Client
from .copy import CopyReport
from .errors import *  # noqa: F403 (the table decides which there are)
from .fs import Fs
from .image import Image
from .models import (
    DirectoryEntry,
    EventRecord,
    FileAttributes,
    FileChange,
    FileTime,
    HistoryPoint,
    ImageConfigDetail,
    ImageDetail,
    ImageHandle,
    ImageLayerDetail,
    ImagePruneReport,
    LogRecord,
    MetricsHistory,
    MetricsSnapshot,
    PingReport,
    ProcessEnd,
    PrunedImage,
    PullLayer,
    PullProgress,
    SandboxDetail,
    SandboxMetrics,
    SandboxNetwork,
    SandboxPage,
    SandboxSummary,
    SshConfig,
    SshHost,
    VersionInfo,
    VolumeDetail,
    VolumeUser,
)
from .sandbox import Sandbox
from .session import ExecEvent, ExecHandle, ExecOutput, Exited, OutputLost, Started, Stderr, Stdout
from .spec import Network, Rootfs
from .volume import Mount, Volume

__version__ = "0.1.0"

__all__ = [
    "API_VERSION",
    "Client",
    "CopyReport",
    "DirectoryEntry",
    "EventRecord",
    "ExecEvent",
    "ExecHandle",
    "ExecOutput",
    "Exited",
    "FileAttributes",
    "FileChange",
    "FileTime",
    "Fs",
    "HistoryPoint",
    "Image",
    "ImageConfigDetail",
    "ImageDetail",
    "ImageHandle",
    "ImageLayerDetail",
    "ImagePruneReport",
    "LogRecord",
    "MetricsHistory",
    "MetricsSnapshot",
    "Mount",
    "MsbError",
    "Network",
    "OutputLost",
    "PingReport",
    "ProcessEnd",
    "PrunedImage",
    "PullLayer",
    "PullProgress",
    "Rootfs",
    "Sandbox",
    "SandboxDetail",
    "SandboxMetrics",
    "SandboxNetwork",
    "SandboxPage",
    "SandboxSummary",
    "SshConfig",
    "SshHost",
    "Started",
    "Stderr",
    "Stdout",
    "VersionInfo",
    "Volume",
    "VolumeDetail",
    "VolumeUser",
    "errors",
    *errors.__all__,
]
