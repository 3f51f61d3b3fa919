"""States asked of serving engines, which run the verifier; rows of several shards are in flight at the same time.

Where a server has put the states of a row is noted next to the shard until the shard is written; only then are the
server's files deleted. So a killed run loses no states that a server has finished. What lost answers have left is found
by the ids of their requests.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, as_completed
from contextlib import ExitStack, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from anyio.from_thread import start_blocking_portal
from torch import Tensor

from specforge.data.features.manifest import Manifest
from specforge.data.features.plan import ShardPlan
from specforge.data.features.row_asker import RowAsker, Tokens
from specforge.data.features.served import WrongStates
from specforge.data.features.transports import Transport
from specforge.engines.pool import EndpointSettings, EnginePool, engines_of, served_model

_KEPT = "finished rows are kept: fix this and run the same command again to resume"


class AskedStates:
    """States computed by serving engines; a context manager that holds the connections.

    Args:
        settings: The endpoints and how they are used.
        transport: How the states come here.
        manifest: Contents of the store.
        output: Folder of the store.
    """

    def __init__(self, settings: EndpointSettings, transport: Transport, manifest: Manifest, output: Path) -> None:
        self.settings = settings
        self._transport = transport
        self._manifest = manifest
        self._output = output
        self._open = ExitStack()

    def __enter__(self) -> Self:
        """Connect to the endpoints.

        Raises:
            UsageError: A URL is not that of a server, or the name of the model is not known.
            SpecforgeError: An endpoint cannot be reached.
        """
        with ExitStack() as stack:
            # Requests run in the event loop of a thread, while this one encodes and writes.
            portal = stack.enter_context(start_blocking_portal())
            self._loop = portal.call(asyncio.get_running_loop)
            engines = stack.enter_context(portal.wrap_async_context_manager(engines_of(self.settings)))
            model = self.settings.model or portal.call(served_model, engines)
            pool = EnginePool(engines, self.settings, _KEPT)
            kind, seconds = self._manifest, self.settings.timeout
            self._asker = RowAsker(pool, model, self._transport, kind.layers, kind.width, seconds)
            self._free = asyncio.Semaphore(self.settings.concurrency)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def __call__(self, plan: ShardPlan, shard: range) -> Iterator[tuple[int, Tensor]]:
        """Begin to ask for the rows of a shard; yield the number and states [T, L, H] of each as they come.

        Raises:
            SpecforgeError: The engines do not answer, or not with the states of a row.
        """
        notes = _Notes(self._notes_path(shard))
        futures = {
            asyncio.run_coroutine_threadsafe(self._row(tokens, number, notes, self._tag(shard)), self._loop): number
            for number, tokens in enumerate(plan.tokens(shard))
        }
        return self._as_they_come(futures, notes)

    def forget(self, shard: range) -> None:
        """Delete the servers' files of a shard that is written, now or by an earlier run, also those of lost answers.

        Raises:
            SpecforgeError: One cannot be deleted.
        """
        path = self._notes_path(shard)
        if path.exists():
            with _Notes(path) as notes:
                for parameters in notes.all():
                    self._transport.delete(parameters)
            self._transport.sweep(self._tag(shard))
            path.unlink(missing_ok=True)

    def _tag(self, shard: range) -> str:
        """Return what begins the ids of a shard's requests, the same for each run that writes the store."""
        store = sha256(f"{self._output.absolute()} {self._manifest.name}".encode()).hexdigest()[:12]
        return f"specforge-{store}-{shard.start}"

    def _notes_path(self, shard: range) -> Path:
        return self._output / f".rows-{shard.start}-{shard.stop}.asked"

    def _as_they_come(self, futures: dict[Future[Tensor], int], notes: _Notes) -> Iterator[tuple[int, Tensor]]:
        with notes:
            for future in as_completed(list(futures)):
                yield futures.pop(future), future.result()

    async def _row(self, tokens: Tokens, number: int, notes: _Notes, tag: str) -> Tensor:
        """Return the states of a row: those that an earlier run was answered with, or else newly asked ones."""
        async with self._free:
            for parameters in notes.of(number):
                with suppress(WrongStates):
                    return await self._asker.receive(parameters, tokens)
            return await self._asker.ask(tokens, f"{tag}-{number}", partial(notes.add, number))


class _Notes:
    """Where servers have put the states of a shard's rows: one line for each answer."""

    def __init__(self, path: Path) -> None:
        # Unbuffered: an answer that is noted survives the end of the process.
        self._file = path.open("a+b", buffering=0)
        self._noted: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        self._file.seek(0)
        for line in self._file.read().splitlines():
            with suppress(ValueError):  # a line that was cut off
                number, parameters = json.loads(line)
                self._noted[number].append(parameters)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, number: int, parameters: dict[str, Any]) -> None:
        """Note an answer for a row."""
        # The line break comes first: it ends a line that was cut off.
        self._file.write(b"\n" + json.dumps([number, parameters]).encode())

    def of(self, number: int) -> list[dict[str, Any]]:
        """Return the answers for a row that earlier runs noted, the last first."""
        return self._noted[number][::-1]

    def all(self) -> Iterator[dict[str, Any]]:
        """Yield all noted answers."""
        for parameters in self._noted.values():
            yield from parameters
