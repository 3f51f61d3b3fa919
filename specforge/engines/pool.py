"""Endpoints that share requests: each goes to the engine with the fewest in flight, and failing engines rest."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import TypeVar

from specforge.engines.client import Engine, Unanswered
from specforge.errors import SpecforgeError, UsageError

REST_SECONDS = 15.0
_Answer = TypeVar("_Answer")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EndpointSettings:
    """Settings for the use of endpoints.

    Attributes:
        urls: Base URLs of the endpoints.
        model: The endpoints' name for the verifier; None for the only model that they serve.
        concurrency: Number of requests in flight.
        max_failures: Number of consecutive failed requests after which an endpoint is dropped for a while.
        retries: Number of retries before a request counts as failed.
        timeout: Seconds allowed for a response.
        vocabulary: Vocabulary size V of the verifier, to check token ids in responses; None if unknown.
        patience: Seconds of failures, without an answer between them, before requests are given up when all endpoints
            are dropped.
    """

    urls: Sequence[str] = field(repr=False)
    model: str | None = None
    concurrency: int = 64
    max_failures: int = 8
    retries: int = 4
    timeout: float = 600.0
    vocabulary: int | None = None
    patience: float = 0.0


@asynccontextmanager
async def engines_of(settings: EndpointSettings) -> AsyncIterator[list[Engine]]:
    """Yield the engines of some endpoints, and close their connections at the end.

    Raises:
        UsageError: A URL is not that of a server.
    """
    how = settings
    engines = [Engine.at(url, how.retries, how.timeout, how.vocabulary) for url in how.urls]
    try:
        yield engines
    finally:
        await asyncio.gather(*(engine.client.close() for engine in engines))


async def served_model(engines: Sequence[Engine]) -> str:
    """Return the only model that the engines list.

    Raises:
        UsageError: They serve several models or none.
        SpecforgeError: An endpoint cannot be reached.
    """
    names = sorted({name for engine in engines for name in await engine.models()})
    if len(names) != 1:
        raise UsageError(f"--model: choose one, the endpoints serve {', '.join(names) or 'none'}")
    return names[0]


class EnginePool:
    """The engines of some endpoints.

    Args:
        engines: The engines.
        settings: How they are used.
        advice: The end of error messages: what is kept, and what to do.
    """

    def __init__(self, engines: Sequence[Engine], settings: EndpointSettings, advice: str) -> None:
        self.advice = advice
        self._engines = engines
        self._settings = settings
        self._failing_since: float | None = None

    async def ask(self, send: Callable[[Engine], Awaitable[_Answer]]) -> _Answer:
        """Send a request to the least busy engine, of equally busy ones to each in turn; if it fails, to the others.

        Args:
            send: Sends the request to an engine and returns the answer.

        Raises:
            Unanswered: No engine answered.
            SpecforgeError: All engines have failed too often in a row.
        """
        error = Unanswered("no endpoint is left")
        for engine in sorted(await self._present(), key=lambda one: (one.in_flight, one.last_asked)):
            engine.last_asked = monotonic()
            try:
                answer = await send(engine)
            except Unanswered as failure:
                error = failure
                self._count_failure(engine, failure)
                continue
            if engine.rests_until:
                _log.warning("%s is back", engine.url)
            engine.failures, engine.rests_until = 0, 0.0
            self._failing_since = None
            return answer
        raise error

    async def _present(self) -> list[Engine]:
        """Return the engines that do not rest, once there are any."""
        while not (present := [one for one in self._engines if one.rests_until <= monotonic()]):
            await asyncio.sleep(min(one.rests_until for one in self._engines) - monotonic())
        return present

    def _count_failure(self, engine: Engine, failure: Unanswered) -> None:
        engine.failures += 1
        now = monotonic()
        self._failing_since = now if self._failing_since is None else self._failing_since
        if engine.failures < self._settings.max_failures or engine.rests_until > now:
            return
        is_left = any(one.rests_until <= now for one in self._engines if one is not engine)
        if not is_left and now - self._failing_since >= self._settings.patience:
            raise SpecforgeError(
                f"{engine.url}: {engine.failures} requests in a row have failed, the last: {failure}; {self.advice}"
            ) from failure
        if not engine.rests_until:
            _log.warning(
                "%s is dropped: %s requests in a row have failed: %s; it is tried again every %g seconds",
                engine.url,
                engine.failures,
                failure,
                REST_SECONDS,
            )
        engine.rests_until = now + REST_SECONDS
