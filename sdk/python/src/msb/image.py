"""Images of the store, as functions of a type."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable

from .client import Client
from .errors import DaemonUnavailableError, PathNotFoundError, PermissionDeniedError
from .models import ImageDetail, ImageHandle, ImagePruneReport, PullEvent

#: Bytes of an archive that are read and sent at a time.
CHUNK_LEN = 256 << 10


class Image:
    """The images of a service."""

    @staticmethod
    async def load(
        archive: str | os.PathLike[str], *, tag: str | None = None, client: Client | None = None
    ) -> list[ImageHandle]:
        """Loads a docker or OCI archive; raises `InvalidArchiveError`, `DigestMismatchError`, `DiskFullError` and others."""
        try:
            file = open(archive, "rb")
        except PermissionError as error:
            raise PermissionDeniedError(f"{os.fspath(archive)}: {error.strerror}") from error
        except OSError as error:
            raise PathNotFoundError(f"{os.fspath(archive)}: {error.strerror}") from error

        async def pieces() -> AsyncIterator[bytes]:
            while piece := await asyncio.to_thread(file.read, CHUNK_LEN):
                yield piece

        with file:
            return await (client or await Client.connect()).load_image(pieces(), tag)

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
    async def pull(reference: str, *, platform: str | None = None, client: Client | None = None) -> ImageHandle:
        """Pulls an image from its registry; raises `RegistryDeniedError`, `RegistryFailedError` and others."""
        async for event in Image.pull_stream(reference, platform=platform, client=client):
            if event.image is not None:
                return event.image
        raise DaemonUnavailableError("the pull ended without an answer")

    @staticmethod
    async def pull_stream(
        reference: str, *, platform: str | None = None, client: Client | None = None
    ) -> AsyncIterator[PullEvent]:
        """Pulls an image and tells how far each layer is; the last event has the image, a failure is raised."""
        async for event in (client or await Client.connect()).pull_image(reference, platform):
            yield event

    @staticmethod
    async def save(
        references: str | Iterable[str],
        path: str | os.PathLike[str],
        *,
        format: str = "docker",
        client: Client | None = None,
    ) -> None:
        """Writes an archive (`docker` or `oci`) of one or several images. One that breaks off leaves no file."""
        wanted = [references] if isinstance(references, str) else [*references]
        pieces = (client or await Client.connect()).save_images(wanted, format)
        unfinished = f"{os.fspath(path)}.part"
        try:
            with open(unfinished, "wb") as file:
                async for piece in pieces:
                    await asyncio.to_thread(file.write, piece)
            os.replace(unfinished, path)
        except BaseException:
            if os.path.exists(unfinished):
                os.unlink(unfinished)
            raise

    @staticmethod
    async def prune(
        *,
        dry_run: bool = False,
        all: bool = False,
        older_than: float | None = None,
        keep_bytes: int | None = None,
        labels: Iterable[str] = (),
        client: Client | None = None,
    ) -> ImagePruneReport:
        """Removes what no sandbox, snapshot, pin or pull needs; `all` takes pinned images too, `older_than` is in seconds."""
        return await (client or await Client.connect()).prune_images(
            dry_run=dry_run, all=all, older_than=older_than, keep_bytes=keep_bytes, labels=labels
        )
