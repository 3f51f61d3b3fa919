"""Answering many conversations concurrently through one or several endpoints."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from specforge.engines.client import Engine, Refused, Unanswered
from specforge.engines.generation import GenerationSettings, Keep, Prompt, Refuse, Reply
from specforge.errors import SpecforgeError, UsageError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EndpointSettings:
    """Settings for the use of endpoints.

    Attributes:
        urls: Base URLs of the endpoints.
        model: The endpoints' name for the verifier; None for the only model that they serve.
        concurrency: Number of conversations in flight.
        max_failures: Number of consecutive failed requests after which an endpoint is dropped.
        retries: Number of retries before a request counts as failed.
        timeout: Seconds allowed for a response.
        vocabulary: Vocabulary size V of the verifier, to check token ids in responses; None if unknown.
    """

    urls: Sequence[str] = field(repr=False)
    model: str | None = None
    concurrency: int = 64
    max_failures: int = 8
    retries: int = 4
    timeout: float = 600.0
    vocabulary: int | None = None


class EndpointAnswerer:
    """Answers conversations turn by turn; each request goes to the engine with the fewest requests in flight.

    Args:
        settings: The endpoints and how they are used.
        generation: Settings of the generation.
    """

    def __init__(self, settings: EndpointSettings, generation: GenerationSettings) -> None:
        self.settings = settings
        self.generation = generation

    @cached_property
    def model(self) -> str:
        """The engines' name for the verifier: the given name, or the only one that they list.

        Raises:
            UsageError: They serve several models or none.
            SpecforgeError: An endpoint cannot be reached.
        """
        return self.settings.model or asyncio.run(self._listed_model())

    async def _listed_model(self) -> str:
        async with self._engines() as engines:
            listed = [await engine.models() for engine in engines]
        names = sorted({name for one in listed for name in one})
        if len(names) != 1:
            raise UsageError(f"--model: choose one, the endpoints serve {', '.join(names) or 'none'}")
        return names[0]

    def answer(self, prompts: Iterator[Prompt], keep: Keep, refuse: Refuse) -> None:
        """Answer conversations.

        Args:
            prompts: The conversations.
            keep: Called with finished conversations.
            refuse: Called with each conversation that the engine refuses, and the reason.

        Raises:
            SpecforgeError: The endpoints reject all requests, every endpoint has failed too often in a row, or some
                conversations were not answered.
        """
        asyncio.run(self._answer(self.model, prompts, keep, refuse))

    async def _answer(self, model: str, prompts: Iterator[Prompt], keep: Keep, refuse: Refuse) -> None:
        unanswered: list[str] = []

        async def work() -> None:
            for prompt in prompts:
                try:
                    keep([(prompt, await pool.converse(prompt))])
                except Refused as error:
                    refuse(prompt, str(error))
                except Unanswered as error:
                    unanswered.append(f"{prompt.conversation.location}: {error}")

        async with self._engines() as engines:
            await asyncio.gather(*(engine.probe(model, self.generation) for engine in engines))
            pool = _EnginePool(engines, model, self.generation, self.settings.max_failures)
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.settings.concurrency):
                        group.create_task(work())
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        if unanswered:
            raise SpecforgeError(
                f"{len(unanswered):,} conversations were not answered, the first: {unanswered[0]}; all others are "
                "kept: run the same command again to request the missing ones"
            )

    @asynccontextmanager
    async def _engines(self) -> AsyncIterator[list[Engine]]:
        how = self.settings
        engines = [Engine.at(url, how.retries, how.timeout, how.vocabulary) for url in how.urls]
        try:
            yield engines
        finally:
            await asyncio.gather(*(engine.client.close() for engine in engines))


@dataclass
class _EnginePool:
    """The engines that have not been dropped."""

    engines: list[Engine]
    model: str
    generation: GenerationSettings
    max_failures: int

    async def converse(self, prompt: Prompt) -> list[Reply]:
        """Return the replies of one conversation.

        Raises:
            Refused: It cannot be answered, or the exact tokens of its replies cannot be known.
            Unanswered: No engine answered.
        """
        if isinstance(prompt.conversation.turns[0][0], int):
            raise Refused("the row holds only tokens, but an endpoint takes messages; answer it in process")
        replies: list[Reply] = []
        for turn in range(len(prompt.conversation.turns)):
            chat = prompt.conversation.chat(turn, [reply.text for reply in replies])
            reply = await self._ask(chat, prompt.conversation.tools, self.generation.seed_of(prompt.index, turn))
            if reply.token_ids is None:
                _require_whole(reply)
            replies.append(reply)
        return replies

    async def _ask(self, chat: list[object], tools: list[Any] | None, seed: int) -> Reply:
        """Ask the least busy engine; if it fails, ask the others."""
        error: Unanswered | None = None
        for engine in sorted(self.engines, key=lambda one: one.in_flight):
            try:
                reply = await engine.reply(self.model, chat, self.generation, seed, tools)
            except Unanswered as failure:
                error = failure
                self._count_failure(engine, failure)
                continue
            engine.failures = 0
            return reply
        raise error or Unanswered("no endpoint is left")

    def _count_failure(self, engine: Engine, failure: Unanswered) -> None:
        engine.failures += 1
        if engine.failures < self.max_failures or engine not in self.engines:
            return
        if self.engines == [engine]:
            raise SpecforgeError(
                f"{engine.url}: {engine.failures} requests in a row have failed, the last: {failure}; finished "
                "conversations are kept: run the same command again when the engine is back"
            ) from failure
        self.engines.remove(engine)
        _log.warning("%s is dropped: %s requests in a row have failed: %s", engine.url, engine.failures, failure)


def _require_whole(reply: Reply) -> None:
    """Refuse a reply without token ids if its text does not determine its tokens."""
    if reply.finish != "stop":
        raise Refused(
            f"the reply ended by {reply.finish}: without token ids, a row of its text would get an end token that the "
            "verifier did not generate; raise --max_new_tokens, or use an engine that returns token ids (vLLM)"
        )
    if not reply.text.strip():
        raise Refused("the reply is empty, and the engine returns no token ids")
