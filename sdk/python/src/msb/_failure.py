"""The base of every error of this package, and how an answer becomes one. The classes themselves are generated: `errors`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, ClassVar


class MsbError(Exception):
    """Why a call failed. Decide on the class (or `code`); read `message` and `hint`."""

    #: The stable code of this class; empty for a code that only a newer service knows.
    CODE: ClassVar[str] = ""
    #: What to do when the place that raised the error had nothing better to say.
    HINT: ClassVar[str] = ""
    #: Whether the same call can succeed later without a change.
    RETRYABLE: ClassVar[bool] = False

    _by_code: ClassVar[dict[str, type[MsbError]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        MsbError._by_code.setdefault(cls.CODE, cls)

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        retryable: bool | None = None,
        details: Iterable[str] = (),
        code: str | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.CODE
        self.hint = self.HINT if hint is None else hint
        self.retryable = self.RETRYABLE if retryable is None else retryable
        #: What belongs to the error beyond its text, such as the names of sandboxes that use an image.
        self.details: tuple[str, ...] = tuple(details)
        #: What the sandbox's system answered, for a file operation.
        self.errno = errno

    def detail(self, key: str) -> str | None:
        """The value of a detail written `key=value`."""
        found = (detail.removeprefix(f"{key}=") for detail in self.details if detail.startswith(f"{key}="))
        return next(found, None)


def error_from_value(value: Any, fallback: str) -> MsbError:
    """The error that a JSON value tells."""
    if not isinstance(value, dict) or not isinstance(value.get("message"), str):
        return MsbError._by_code["internal"](fallback)
    code = value.get("code")
    hint, retryable, details, errno = (value.get(key) for key in ("hint", "retryable", "details", "errno"))
    return MsbError._by_code.get(str(code), MsbError)(
        value["message"],
        hint=hint if isinstance(hint, str) else None,
        retryable=retryable if isinstance(retryable, bool) else None,
        details=[detail for detail in details if isinstance(detail, str)] if isinstance(details, list) else (),
        code=str(code),
        errno=errno if isinstance(errno, int) else None,
    )


def error_from_body(status: int, body: bytes) -> MsbError:
    """The error of an answer that is no success."""
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    return error_from_value(value, f"the service answered with status {status}")
