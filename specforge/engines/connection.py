"""Asking servers over HTTP: a deadline for the whole of an answer, its shape checked, and no password shown."""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import unquote, urlsplit

try:
    import httpx2 as httpx
except ImportError:  # what openai was built on before its release 3
    import httpx  # type: ignore[no-redef, import-not-found, unused-ignore]
from openai import DefaultAsyncHttpxClient
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specforge.errors import UsageError, describe_invalid

# No answer of a language model is longer; one that unpacks to more is not read on.
LONGEST = 64 * 2**20
RequestError = httpx.RequestError


class WrongAnswer(httpx.DecodingError):
    """An answer came, and is not of the shape that was asked for; the client tries again, as after a lost one."""


class Strict(BaseModel):
    """Base of what is expected of an answer: values of other types are refused, fields that nobody reads are not."""

    model_config = ConfigDict(strict=True, frozen=True)


class Model(Strict):
    """A model that a server lists."""

    id: str = Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")


class Models(Strict):
    """The models that a server lists."""

    data: list[Model]


@dataclass(frozen=True)
class Address:
    """Where a server is.

    Attributes:
        url: Its address without a name and password; what is shown and stored.
        credentials: Name and password of the URL, sent with each request; None if it has none.
    """

    url: str
    credentials: tuple[str, str] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, url: str, flag: str = "--endpoint") -> Self:
        """Take a URL apart.

        Args:
            url: Such as ``http://localhost:8000/v1``; a name and password may be in it.
            flag: What to name in error messages.

        Raises:
            UsageError: It is no address of a server.
        """
        shown = url.strip().rpartition("@")[2].partition("?")[0]
        try:
            parts = urlsplit(url.strip())
            is_server = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is no number, brackets that do not close
            is_server = False
        if not is_server or parts.query or parts.fragment or not url.isprintable():
            raise UsageError(
                f"{flag}: {shown!r} is no address of a server; give one like http://localhost:8000/v1, without a query"
            )
        host = parts.netloc.rpartition("@")[2]
        named = None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))
        return cls(f"{parts.scheme}://{host}{parts.path.rstrip('/')}", named)


class Connection(DefaultAsyncHttpxClient):
    """The HTTP client below openai's: every answer is read whole, in time, and checked before it is handed over.

    Args:
        address: The server, whose name and password it sends.
        seconds: What an answer may take, from the request to its last byte.
        check: Gets the path and the body of each successful answer; raises ``ValueError`` if it is of a wrong shape.
    """

    def __init__(self, address: Address, seconds: float, check: Callable[[str, bytes], object] | None = None) -> None:
        # Timeouts of the library count from byte to byte, and never end if a server drips.
        super().__init__(auth=address.credentials, timeout=seconds, verify=_certificates())
        self._seconds = seconds
        self._check = check

    async def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        """Send a request, and return its answer with the whole body.

        Raises:
            WrongAnswer: It is too long, or of a wrong shape.
            httpx.ReadTimeout: It is not whole in time.
            httpx.RequestError: There is none.
        """
        try:
            async with asyncio.timeout(self._seconds):
                answer = await super().send(request, stream=True, **options)
                try:
                    body = await _whole(answer)
                finally:
                    await answer.aclose()
        except TimeoutError:
            raise httpx.ReadTimeout(f"no whole answer in {self._seconds:g} s", request=request) from None
        if answer.is_success and self._check is not None:
            try:
                self._check(request.url.path, body)
            except ValueError as error:
                raise WrongAnswer(_described(error), request=request) from None
        # The body is unpacked already.
        kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in _OF_THE_TRANSFER]
        return httpx.Response(answer.status_code, headers=kept, content=body, request=answer.request)


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Return what connections trust; it takes longer to read than anything else about one."""
    return httpx.create_ssl_context()


_OF_THE_TRANSFER = ("content-encoding", "content-length", "transfer-encoding")


async def _whole(answer: httpx.Response) -> bytes:
    parts, size = [], 0
    async for part in answer.aiter_bytes():
        size += len(part)
        if size > LONGEST:
            raise WrongAnswer(f"the answer is longer than {LONGEST // 2**20} MiB", request=answer.request)
        parts.append(part)
    return b"".join(parts)


def on_one_line(text: object) -> str:
    """Return what a server says in one short line, without what a terminal would take for commands."""
    words = "".join(one if one.isprintable() else " " for one in str(text)).split()
    return " ".join(words)[:300]


def _described(error: ValueError) -> str:
    return on_one_line(describe_invalid(error) if isinstance(error, ValidationError) else error)
