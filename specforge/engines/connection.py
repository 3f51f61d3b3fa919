"""HTTP connections to servers: a deadline for the whole response, a check of its form, and hidden credentials."""

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
except ImportError:  # used by openai before release 3
    import httpx  # type: ignore[no-redef, import-not-found, unused-ignore]
from openai import DefaultAsyncHttpxClient
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specforge.errors import UsageError, describe_invalid

# More than any response of a language model; reading stops there.
LONGEST = 64 * 2**20
# A machine that is gone does not refuse connections.
CONNECT_SECONDS = 10.0
RequestError = httpx.RequestError


class WrongAnswer(httpx.DecodingError):
    """A response has the wrong form; the client retries as after a lost one."""


class Strict(BaseModel):
    """Base of response schemas: values of other types are refused, unknown fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)


class Model(Strict):
    """A model listed by a server."""

    id: str = Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")


class Models(Strict):
    """The models listed by a server."""

    data: list[Model]


@dataclass(frozen=True)
class Address:
    """Address of a server.

    Attributes:
        url: URL without credentials; the form that is shown and stored.
        credentials: User name and password of the URL, sent with each request; None if it has none.
    """

    url: str
    credentials: tuple[str, str] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, url: str, flag: str = "--endpoint") -> Self:
        """Parse a URL.

        Args:
            url: URL such as ``http://localhost:8000/v1``, with or without credentials.
            flag: Flag to name in error messages.

        Raises:
            UsageError: It is not the URL of a server.
        """
        shown = url.strip().rpartition("@")[2].partition("?")[0]
        try:
            parts = urlsplit(url.strip())
            is_server = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is not a number, unclosed brackets
            is_server = False
        if not is_server or parts.query or parts.fragment or not url.isprintable():
            raise UsageError(
                f"{flag}: {shown!r} is not the URL of a server; give one like http://localhost:8000/v1, without a query"
            )
        host = parts.netloc.rpartition("@")[2]
        named = None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))
        return cls(f"{parts.scheme}://{host}{parts.path.rstrip('/')}", named)

    @property
    def root(self) -> Address:
        """The server's root, where paths outside OpenAI's ``/v1`` begin."""
        return Address(self.url.removesuffix("/v1"), self.credentials)


class Connection(DefaultAsyncHttpxClient):
    """HTTP client for the openai client: responses are read completely, within a deadline, and checked.

    Args:
        address: The server and the credentials to send.
        seconds: Time allowed from the request to the last byte of the response.
        check: Called with path and body of each successful response; raises ``ValueError`` if its form is wrong.
    """

    def __init__(self, address: Address, seconds: float, check: Callable[[str, bytes], object] | None = None) -> None:
        # The library's timeouts apply to each read, so they never fire if a server sends byte by byte.
        allowed = httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
        super().__init__(auth=address.credentials, timeout=allowed, verify=certificates())
        self._seconds = seconds
        self._check = check

    async def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        """Send a request and return its response with the whole body.

        Raises:
            WrongAnswer: The response is too long or has the wrong form.
            httpx.ReadTimeout: The response is not complete in time.
            httpx.RequestError: There is no response.
        """
        try:
            async with asyncio.timeout(self._seconds):
                answer = await super().send(request, stream=True, **options)
                try:
                    body = await _whole(answer)
                finally:
                    await answer.aclose()
        except TimeoutError:
            raise httpx.ReadTimeout(f"no complete response in {self._seconds:g} s", request=request) from None
        if answer.is_success and self._check is not None:
            try:
                self._check(request.url.path, body)
            except ValueError as error:
                raise WrongAnswer(_described(error), request=request) from None
        # The body is already decoded.
        kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in _TRANSFER_HEADERS]
        return httpx.Response(answer.status_code, headers=kept, content=body, request=answer.request)


@functools.cache
def certificates() -> ssl.SSLContext:
    """Return the trusted certificates, cached because loading them is slow."""
    return httpx.create_ssl_context()


_TRANSFER_HEADERS = ("content-encoding", "content-length", "transfer-encoding")


async def _whole(answer: httpx.Response) -> bytes:
    parts, size = [], 0
    async for part in answer.aiter_bytes():
        size += len(part)
        if size > LONGEST:
            raise WrongAnswer(f"the response is longer than {LONGEST // 2**20} MiB", request=answer.request)
        parts.append(part)
    return b"".join(parts)


def on_one_line(text: object) -> str:
    """Return a server's text as one short line without control characters."""
    words = "".join(one if one.isprintable() else " " for one in str(text)).split()
    return " ".join(words)[:300]


def _described(error: ValueError) -> str:
    return on_one_line(describe_invalid(error) if isinstance(error, ValidationError) else error)
