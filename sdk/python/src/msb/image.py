"""Images of the store, as functions of a type."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

from .client import Client
from .errors import PathNotFoundError, PermissionDeniedError
from .models import ImageDetail, ImageHandle

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
