"""Serving engines that are asked for states during training, by each process that loads batches."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.context import BaseContext
from threading import Thread
from typing import Any, TypeVar
from uuid import uuid4

from torch import Tensor

from specforge.data.features.manifest import FeatureNeeds, describe_layers
from specforge.data.features.row_asker import RowAsker, Tokens
from specforge.data.features.transports import transport_named
from specforge.engines.client import Engine, request_id
from specforge.engines.connection import Address
from specforge.engines.pool import EndpointSettings, EnginePool, engines_of
from specforge.errors import SpecforgeError, UsageError

# A dead server must not hold up batches: a request is repeated once, and then goes to another server.
RETRIES, MAX_FAILURES = 1, 2
# For an answer and its states, and for the servers to come back when none is running.
TIMEOUT, PATIENCE = 300.0, 600.0
FLAG = "data.feature_servers"
_CHECK = "check it with specforge doctor --endpoint URL --config FILE"
_RESUME = "start the servers again, and resume the run with --ckpt_path last"
_Result = TypeVar("_Result")


def check_urls(urls: Sequence[str]) -> None:
    """Check the URLs of servers in a configuration.

    Raises:
        UsageError: There are none, one is not the URL of a server, or one holds a password.
    """
    if not urls:
        raise UsageError(f"{FLAG}: is required with data.features: server; give a list such as [http://host:8000/v1]")
    for url in urls:
        address = Address.of(url, FLAG)
        if address.credentials:
            raise UsageError(
                f"{FLAG}: {address.url} is given with a user's name, but configurations are stored; give the key in "
                "OPENAI_API_KEY"
            )


class StateServers:
    """Servers that any process of a run asks for states; each opens its own connections on first use.

    Args:
        urls: Base URLs.
        transport: Name of the transport by which states come here.
        needs: Which states are read.
    """

    def __init__(self, urls: Sequence[str], transport: str, needs: FeatureNeeds) -> None:
        self.settings = EndpointSettings(
            urls, retries=RETRIES, max_failures=MAX_FAILURES, timeout=TIMEOUT, patience=PATIENCE
        )
        self.needs = needs
        self.transport = transport
        self._survives_fork = transport_named(transport).survives_fork
        self._tag = f"specforge-{uuid4().hex[:12]}"  # begins the ids of all requests of this run
        self._opened: _Connections | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Drop the connections: each process opens its own."""
        return {**self.__dict__, "_opened": None}

    def summary_text(self) -> str:
        """Return a one-line summary."""
        number = len(self.settings.urls)
        return f"asked of {number} server{'s' * (number > 1)}, {describe_layers(self.needs.layers)}"

    def check(self, tokens: Tokens) -> None:
        """Ask each server for the states of a row, and find out the servers' name for the verifier.

        Args:
            tokens: Tokens of the row, int64 [T].

        Raises:
            UsageError: The servers serve several models, and none by the verifier's name.
            SpecforgeError: A server cannot be reached, or does not give the states that are needed.
        """
        self._connections.run(self._check(tokens))

    def states(self, rows: Sequence[Tokens]) -> list[Tensor]:
        """Return the states [T, L, H] of rows, which are asked for at the same time.

        Args:
            rows: Tokens of each, int64 [T].

        Raises:
            SpecforgeError: No server gives them.
        """
        connections = self._connections
        return connections.run(_together([connections.asker.ask(row, request_id(self._tag)) for row in rows]))

    @property
    def process_context(self) -> BaseContext | None:
        """How processes that ask the servers are started; None for torch's default."""
        if self._survives_fork:
            return None
        # They are forked by a process that has imported everything and asked for nothing.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        return context

    def sweep(self) -> None:
        """Delete what lost answers of this run have left, when no process asks any longer."""
        with suppress(SpecforgeError):
            self._connections.asker.transport.sweep(self._tag)

    @property
    def _connections(self) -> _Connections:
        """The connections of this process: a forked process has no thread that runs those of its parent."""
        if self._opened is None or self._opened.process != os.getpid():
            self._opened = _Connections(self)
        return self._opened

    async def _check(self, tokens: Tokens) -> None:
        connections = self._connections
        async with engines_of(replace(self.settings, retries=0)) as engines:
            model = await self._served_model(engines)
            for engine in engines:
                pool = EnginePool([engine], replace(self.settings, patience=0.0), _CHECK)
                await replace(connections.asker, pool=pool, model=model).ask(tokens, request_id(self._tag))
        self.settings = replace(self.settings, model=model)
        connections.asker = replace(connections.asker, model=model)

    async def _served_model(self, engines: Sequence[Engine]) -> str:
        served = [set(await engine.models()) for engine in engines]
        names = set.intersection(*served)
        name = self.needs.verifier if self.needs.verifier in names else min(names, default="")
        if not names or (len(names) > 1 and name != self.needs.verifier):
            listed = ", ".join(sorted(set.union(*served))) or "none"
            raise UsageError(
                f"{FLAG}: all servers must serve the verifier by one name, as the only model or as "
                f"{self.needs.verifier!r}; they serve {listed}"
            )
        return name


class _Connections:
    """The connections of one process, and the thread with the event loop that they belong to."""

    def __init__(self, servers: StateServers) -> None:
        self.process = os.getpid()
        self._loop = asyncio.new_event_loop()
        # A daemon, so that a process ends without waiting for it.
        Thread(target=self._loop.run_forever, name="servers", daemon=True).start()
        settings, needs = servers.settings, servers.needs
        # Processes begin with different servers.
        first = self.process % len(settings.urls)
        urls = [*settings.urls[first:], *settings.urls[:first]]
        engines = [Engine.at(url, settings.retries, settings.timeout) for url in urls]
        pool = EnginePool(engines, settings, _RESUME)
        transport = transport_named(servers.transport)
        self.asker = RowAsker(pool, settings.model or "", transport, needs.layers, needs.width, settings.timeout)

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run work in the event loop, and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _together(work: Sequence[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """Return the results of work that is done at the same time; the first error ends all of it."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
