"""Asking serving engines for the states of a row, and again if they are wrong or lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from specforge.data.features.served import WrongStates, require_states
from specforge.data.features.transports import Transport
from specforge.engines.client import Engine, Refused, Unanswered, Unreachable, request_id
from specforge.engines.pool import EnginePool
from specforge.errors import SpecforgeError

TRIES = 4
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowAsker:
    """Asks engines for the states of rows, many at the same time, in one event loop.

    Attributes:
        pool: The engines.
        model: Their name for the verifier.
        transport: How the states come here.
        layers: Ids of the layers, ascending.
        width: Width H of a state.
        timeout: Seconds allowed for the states after the answer.
    """

    pool: EnginePool
    model: str
    transport: Transport
    layers: Sequence[int]
    width: int
    timeout: float

    async def ask(self, tokens: Tokens, tag: str, note: Callable[[dict[str, Any]], None] | None = None) -> Tensor:
        """Return the states [T, L, H] of a row.

        Args:
            tokens: Its tokens, int64 [T].
            tag: Begins the ids of its requests.
            note: Called with each answer, before the states are read, by a caller that deletes them later. By default
                they are deleted here, and whatever failed requests have left.

        Raises:
            SpecforgeError: The engines do not answer, or not with the states of the row.
        """

        async def send(engine: Engine) -> Tensor:
            parameters = await engine.extract(self.model, tokens.tolist(), request_id(tag))
            if note is not None:
                note(parameters)
            try:
                states = await self.receive(parameters, tokens)
            except WrongStates as error:
                raise Unanswered(str(error)) from error
            if note is None:
                self.transport.delete(parameters)
            return states

        what = f"the row of {len(tokens):,} tokens that begins with {tokens[:4].tolist()}"
        failures = tries = 0
        while True:
            try:
                states = await self.pool.ask(send)
            except Unreachable:
                failures += 1
                continue  # the pool waits for the engines to come back, as long as its patience lasts
            except Refused as error:
                raise SpecforgeError(f"the engine refuses {what}: {error}; {self.pool.advice}") from error
            except Unanswered as error:
                failures += 1
                tries += 1
                if tries == TRIES:
                    raise SpecforgeError(
                        f"no engine gave the states of {what} in {TRIES} tries, the last: {error}; {self.pool.advice}"
                    ) from error
                continue
            if failures and note is None:
                self.transport.sweep(tag)
            return states

    async def receive(self, parameters: Mapping[str, Any], tokens: Tokens) -> Tensor:
        """Return the states that a request was answered with; delete them if they are wrong.

        Raises:
            WrongStates: They are not those of the row, or cannot be had.
        """
        try:
            async with asyncio.timeout(self.timeout):
                found = await self.transport.receive(parameters)
            await asyncio.to_thread(require_states, found, tokens, self.layers, self.width)
            return found.states
        except TimeoutError:
            self.transport.delete(parameters)
            raise WrongStates(f"the states were not written within {self.timeout:g} seconds") from None
        except WrongStates:
            self.transport.delete(parameters)
            raise
