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
from .errors import *  # noqa: F403 (the table decides which there are)
from .image import Image
from .models import (
    EventRecord,
    ImageConfigDetail,
    ImageDetail,
    ImageHandle,
    ImageLayerDetail,
    LogRecord,
    MetricsSnapshot,
    ProcessEnd,
    SandboxDetail,
    SandboxNetwork,
    SandboxMetrics,
    SandboxSummary,
    VersionInfo,
)
from .sandbox import Sandbox
from .session import ExecEvent, ExecHandle, ExecOutput, Exited, OutputLost, Started, Stderr, Stdout

__version__ = "0.1.0"

__all__ = [
    "API_VERSION",
    "Client",
    "EventRecord",
    "ExecEvent",
    "ExecHandle",
    "ExecOutput",
    "Exited",
    "Image",
    "ImageConfigDetail",
    "ImageDetail",
    "ImageHandle",
    "ImageLayerDetail",
    "LogRecord",
    "MetricsSnapshot",
    "MsbError",
    "OutputLost",
    "ProcessEnd",
    "Sandbox",
    "SandboxDetail",
    "SandboxNetwork",
    "SandboxMetrics",
    "SandboxSummary",
    "Started",
    "Stderr",
    "Stdout",
    "VersionInfo",
    "errors",
    *errors.__all__,
]
