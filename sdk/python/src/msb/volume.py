"""Named volumes, and what a sandbox mounts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from .client import Client
from .models import VolumeDetail
from .spec import check_name

#: The kinds of named volumes: a shared directory, or a disk that one sandbox at a time has.
VolumeKind = Literal["dir", "disk"]


@dataclass(frozen=True)
class Mount:
    """One mount; made by `Volume.bind`, `Volume.named`, `Volume.tmpfs` and `Volume.disk`."""

    target: str
    """Where it is seen in the sandbox, an absolute path."""
    source: dict[str, Any]
    read_only: bool = False
    no_exec: bool = False
    no_suid: bool = False
    no_dev: bool = False

    def value(self) -> dict[str, Any]:
        """As the API has it."""
        options = {key: getattr(self, key) for key in ("read_only", "no_exec", "no_suid", "no_dev")}
        return {"target": self.target, "source": self.source, "options": options}


class Volume:
    """The named volumes of a service, and mounts of every kind."""

    @staticmethod
    async def create(
        name: str, *, kind: VolumeKind = "dir", size_mib: int | None = None, client: Client | None = None
    ) -> VolumeDetail:
        """Makes a volume; raises `VolumeAlreadyExistsError`."""
        return await (client or await Client.connect()).create_volume(name, kind, size_mib)

    @staticmethod
    async def get(name: str, *, client: Client | None = None) -> VolumeDetail:
        """One volume; raises `VolumeNotFoundError`."""
        return await (client or await Client.connect()).volume(name)

    @staticmethod
    async def list(*, client: Client | None = None) -> list[VolumeDetail]:
        """Every volume, by name."""
        return await (client or await Client.connect()).volumes()

    @staticmethod
    async def remove(name: str, *, client: Client | None = None) -> None:
        """Removes a volume; raises `VolumeInUseError` naming the sandboxes."""
        await (client or await Client.connect()).remove_volume(name)

    @staticmethod
    def bind(source: str | os.PathLike[str], target: str, *, read_only: bool = False, no_exec: bool = False) -> Mount:
        """A directory or file of this host."""
        path = os.path.abspath(source)
        kind = "file" if os.path.isfile(path) else "directory"
        return Mount(target, {"kind": kind, "path": path}, read_only, no_exec)

    @staticmethod
    def named(
        name: str,
        target: str,
        *,
        kind: VolumeKind | None = None,
        size_mib: int | None = None,
        quota_mib: int | None = None,
        read_only: bool = False,
    ) -> Mount:
        """A named volume, which is made if it does not exist; a disk has a size, a directory may have a quota."""
        source = {"kind": "named", "name": check_name(name), "volume": kind, "size_mib": size_mib, "quota_mib": quota_mib}
        return Mount(target, {key: value for key, value in source.items() if value is not None}, read_only)

    @staticmethod
    def tmpfs(target: str, *, size_mib: int | None = None, no_exec: bool = False) -> Mount:
        """Memory of the guest."""
        source: dict[str, Any] = {"kind": "tmpfs"}
        return Mount(target, source if size_mib is None else source | {"size_mib": size_mib}, no_exec=no_exec)

    @staticmethod
    def disk(path: str | os.PathLike[str], target: str, *, read_only: bool = False) -> Mount:
        """A disk image of this host: raw, with an ext4."""
        return Mount(target, {"kind": "disk", "path": os.path.abspath(path)}, read_only)


__all__ = ["Mount", "Volume", "VolumeKind"]
