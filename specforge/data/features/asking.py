"""States asked of serving engines, which run the verifier; rows of several shards are in flight at the same time.

Where a server has put the states of a row is noted next to the shard until the shard is written; only then are the
server's files deleted. So a killed run loses no states that a server has finished, and no file is forgotten.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, as_completed
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from anyio.from_thread import start_blocking_portal
from torch import Tensor

from specforge.data.features.manifest import Manifest
from specforge.data.features.plan import ShardPlan
from specforge.data.features.served import WrongStates, require_states
from specforge.data.features.transports import Transport
from specforge.engines.client import Engine, Refused, Unanswered, Unreachable
from specforge.engines.pool import EndpointSettings, EnginePool, engines_of, served_model
from specforge.errors import SpecforgeError

TRIES = 4
_KEPT = "finished rows are kept"
_Tokens = npt.NDArray[np.int64]


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
            self._model = self.settings.model or portal.call(served_model, engines)
            self._pool = EnginePool(engines, self.settings, _KEPT)
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
            asyncio.run_coroutine_threadsafe(self._row(tokens, number, notes), self._loop): number
            for number, tokens in enumerate(plan.tokens(shard))
        }
        return self._as_they_come(futures, notes)

    def forget(self, shard: range) -> None:
        """Delete the server's files of a shard that is written, now or by an earlier run.

        Raises:
            SpecforgeError: One cannot be deleted.
        """
        path = self._notes_path(shard)
        if path.exists():
            with _Notes(path) as notes:
                for parameters in notes.all():
                    self._transport.delete(parameters)
            path.unlink(missing_ok=True)

    def _notes_path(self, shard: range) -> Path:
        return self._output / f".rows-{shard.start}-{shard.stop}.asked"

    def _as_they_come(self, futures: dict[Future[Tensor], int], notes: _Notes) -> Iterator[tuple[int, Tensor]]:
        with notes:
            for future in as_completed(list(futures)):
                yield futures.pop(future), future.result()

    async def _row(self, tokens: _Tokens, number: int, notes: _Notes) -> Tensor:
        """Return the states of a row: those that an earlier run was answered with, or else newly asked ones."""
        async with self._free:
            for parameters in notes.of(number):
                with suppress(WrongStates):
                    return await self._received(parameters, tokens)
            return await self._asked(tokens, number, notes)

    async def _asked(self, tokens: _Tokens, number: int, notes: _Notes) -> Tensor:
        async def send(engine: Engine) -> Tensor:
            parameters = await engine.extract(self._model, tokens.tolist())
            notes.add(number, parameters)
            try:
                return await self._received(parameters, tokens)
            except WrongStates as error:
                raise Unanswered(str(error)) from error

        what = f"the row of {len(tokens):,} tokens that begins with {tokens[:4].tolist()}"
        tries = 0
        while True:
            try:
                return await self._pool.ask(send)
            except Unreachable:
                continue  # the pool waits for the engines to come back, as long as its patience lasts
            except Refused as error:
                raise SpecforgeError(f"the engine refuses {what}: {error}; {_KEPT}") from error
            except Unanswered as error:
                tries += 1
                if tries == TRIES:
                    raise SpecforgeError(
                        f"no engine gave the states of {what} in {TRIES} tries, the last: {error}; {_KEPT}: fix this "
                        "and run the same command again to resume"
                    ) from error

    async def _received(self, parameters: Mapping[str, Any], tokens: _Tokens) -> Tensor:
        """Return states that were answered with; delete them if they are wrong."""
        try:
            async with asyncio.timeout(self.settings.timeout):
                found = await self._transport.receive(parameters)
            await asyncio.to_thread(require_states, found, tokens, self._manifest.layers, self._manifest.width)
            return found.states
        except TimeoutError:
            self._transport.delete(parameters)
            raise WrongStates(f"the states were not written within {self.settings.timeout:g} seconds") from None
        except WrongStates:
            self._transport.delete(parameters)
            raise


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
