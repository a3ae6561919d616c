"""Images of the store, as functions of a type."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Literal

from .client import Client
from .errors import DaemonUnavailableError
from .fs import open_local, write_whole
from .models import ImageDetail, ImageHandle, ImagePruneReport, PullProgress
from .spec import Rootfs, milliseconds

#: Bytes of an archive that are read and sent at a time.
CHUNK_LEN = 256 << 10


class Image:
    """The images of a service."""

    @staticmethod
    async def pull(
        reference: str,
        *,
        platform: str | None = None,
        credentials: tuple[str, str] | None = None,
        insecure: bool = False,
        progress: Callable[[PullProgress], object] | None = None,
        client: Client | None = None,
    ) -> ImageHandle:
        """Fetches an image from its registry; `progress` hears each step. A pull that is cancelled is taken up by the next one.

        Raises `RegistryFailedError`, `RegistryDeniedError`, `ImageNotFoundError`, `DigestMismatchError`, `DiskFullError`.
        """
        request: dict[str, Any] = {"reference": reference, "insecure": insecure}
        if platform is not None:
            request["platform"] = platform
        if credentials is not None:
            request["credentials"] = {"username": credentials[0], "password": credentials[1]}
        async for step, image in (client or await Client.connect()).pull_image(request):
            if progress is not None:
                progress(step)
            if image is not None:
                return image
        raise DaemonUnavailableError("the pull ended without an answer")

    @staticmethod
    async def load(
        archive: str | os.PathLike[str], *, tag: str | None = None, client: Client | None = None
    ) -> list[ImageHandle]:
        """Loads a docker or OCI archive; raises `InvalidArchiveError`, `DigestMismatchError`, `DiskFullError` and others."""
        with open_local(archive) as file:

            async def pieces() -> AsyncIterator[bytes]:
                while piece := await asyncio.to_thread(file.read, CHUNK_LEN):
                    yield piece

            return await (client or await Client.connect()).load_image(pieces(), tag)

    @staticmethod
    async def save(
        references: str | Iterable[str],
        path: str | os.PathLike[str],
        *,
        format: Literal["docker", "oci"] = "docker",
        client: Client | None = None,
    ) -> None:
        """Saves images as one archive. The file is there whole or not at all."""
        named = [references] if isinstance(references, str) else references
        await write_whole((client or await Client.connect()).save_images(named, format), path)

    @staticmethod
    async def list(*, client: Client | None = None) -> list[ImageHandle]:
        """Every image, newest first."""
        return await (client or await Client.connect()).images()

    @staticmethod
    async def get(reference: str, *, client: Client | None = None) -> ImageHandle:
        """One image; raises `ImageNotFoundError`."""
        return await Image.inspect(reference, client=client)

    @staticmethod
    async def inspect(reference: str, *, client: Client | None = None) -> ImageDetail:
        """Everything about one image; raises `ImageNotFoundError`."""
        return await (client or await Client.connect()).image(reference)

    @staticmethod
    async def remove(reference: str, *, force: bool = False, client: Client | None = None) -> None:
        """Removes an image; raises `ImageInUseError` when a sandbox uses it, unless forced."""
        await (client or await Client.connect()).remove_image(reference, force)

    @staticmethod
    async def tag(reference: str, name: str, *, client: Client | None = None) -> ImageHandle:
        """Gives an image another name."""
        return await (client or await Client.connect()).tag_image(reference, name)

    @staticmethod
    async def prune(
        *,
        all: bool = False,
        dry_run: bool = False,
        older_than: float | None = None,
        keep_bytes: int | None = None,
        labels: Iterable[str] = (),
        client: Client | None = None,
    ) -> ImagePruneReport:
        """Removes the images that this allows and nothing needs; `all` takes pinned ones too, `older_than` is in seconds."""
        request: dict[str, Any] = {"all": all, "dry_run": dry_run, "labels": [*labels]}
        if older_than is not None:
            request["older_than_ms"] = milliseconds(older_than, "older_than")
        if keep_bytes is not None:
            request["keep_bytes"] = keep_bytes
        return await (client or await Client.connect()).prune_images(request)

    @staticmethod
    async def gc(*, client: Client | None = None) -> ImagePruneReport:
        """Deprecated: `prune`."""
        warnings.warn("Image.gc is now called Image.prune", DeprecationWarning, stacklevel=2)
        return await Image.prune(client=client)

    @staticmethod
    async def gc_layers(*, client: Client | None = None) -> ImagePruneReport:
        """Deprecated: `prune`, which takes layers that nothing needs too."""
        warnings.warn("Image.gc_layers is now called Image.prune", DeprecationWarning, stacklevel=2)
        return await Image.prune(client=client)

    @staticmethod
    def oci(reference: str) -> Rootfs:
        """The root of an OCI image, for `Sandbox.create(image=…)`: the same as the reference alone."""
        return Rootfs("oci", reference)

    @staticmethod
    def bind(path: str | os.PathLike[str]) -> Rootfs:
        """A directory of this host as root, for `Sandbox.create(image=…)`; the sandbox changes nothing of it."""
        return Rootfs("bind", os.path.realpath(path))

    @staticmethod
    def disk(path: str | os.PathLike[str]) -> Rootfs:
        """A raw disk of this host with an ext4 or EROFS file system as root; the sandbox changes nothing of it."""
        return Rootfs("disk", os.path.realpath(path))
