"""Many conversations at once, through one or several endpoints."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from specforge.engines.asking import Asking, Keep, Prompt, Refuse, Reply
from specforge.engines.client import Engine, Refused, Unanswered
from specforge.errors import SpecforgeError, UsageError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EndpointSettings:
    """How endpoints are used.

    Attributes:
        urls: Their bases.
        model: What they call the verifier; None for the one that they serve.
        concurrency: Conversations in flight.
        max_failures: An endpoint that fails so often in a row is given up.
        retries: How often the client tries a request again before it counts as failed.
        timeout: Seconds that an answer may take.
        vocabulary: Number of the verifier's tokens, which no token id of an answer may exceed; None if not known.
    """

    urls: Sequence[str] = field(repr=False)
    model: str | None = None
    concurrency: int = 64
    max_failures: int = 8
    retries: int = 4
    timeout: float = 600.0
    vocabulary: int | None = None


class EndpointAnswerer:
    """Lets engines answer, each conversation turn by turn; a request goes to the engine that has the fewest in flight.

    Args:
        settings: Which engines, and how they are used.
        asking: How they are asked.
    """

    def __init__(self, settings: EndpointSettings, asking: Asking) -> None:
        self.settings = settings
        self.asking = asking

    @cached_property
    def model(self) -> str:
        """What the engines call the verifier: the name that is given, or else the only one that they list.

        Raises:
            UsageError: They serve several.
            SpecforgeError: One cannot be reached.
        """
        return self.settings.model or asyncio.run(self._listed_model())

    async def _listed_model(self) -> str:
        async with self._engines() as engines:
            listed = [await engine.models() for engine in engines]
        names = sorted({name for one in listed for name in one})
        if len(names) != 1:
            raise UsageError(f"--model: which one? the endpoints serve {', '.join(names) or 'none'}")
        return names[0]

    def answer(self, prompts: Iterator[Prompt], keep: Keep, refuse: Refuse) -> None:
        """Answer conversations.

        Args:
            prompts: The conversations.
            keep: Takes those that are finished.
            refuse: Takes those that the engine will not answer, and why.

        Raises:
            SpecforgeError: Requests will not do at all, every endpoint has failed too often in a row, or some
                conversations were not answered.
        """
        asyncio.run(self._answer(self.model, prompts, keep, refuse))

    async def _answer(self, model: str, prompts: Iterator[Prompt], keep: Keep, refuse: Refuse) -> None:
        unanswered: list[str] = []

        async def work() -> None:
            for prompt in prompts:
                try:
                    keep([(prompt, await crowd.converse(prompt))])
                except Refused as error:
                    refuse(prompt, str(error))
                except Unanswered as error:
                    unanswered.append(f"{prompt.conversation.location}: {error}")

        async with self._engines() as engines:
            await asyncio.gather(*(engine.probe(model, self.asking) for engine in engines))
            crowd = _Crowd(engines, model, self.asking, self.settings.max_failures)
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.settings.concurrency):
                        group.create_task(work())
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        if unanswered:
            raise SpecforgeError(
                f"{len(unanswered):,} conversations were not answered, the first one {unanswered[0]}; all others are "
                "kept: the same command asks again for those that are missing"
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
class _Crowd:
    """The engines that still answer."""

    engines: list[Engine]
    model: str
    asking: Asking
    max_failures: int

    async def converse(self, prompt: Prompt) -> list[Reply]:
        """Return the replies of one conversation.

        Raises:
            Refused: It cannot be answered, or not so that the tokens of the replies would be known.
            Unanswered: No engine answers this time.
        """
        if isinstance(prompt.conversation.turns[0][0], int):
            raise Refused("the row holds tokens alone, and an endpoint takes messages; answer it in process")
        replies: list[Reply] = []
        for turn in range(len(prompt.conversation.turns)):
            chat = prompt.conversation.chat(turn, [reply.text for reply in replies])
            reply = await self._ask(chat, prompt.conversation.tools, self.asking.seed_of(prompt.index, turn))
            if reply.token_ids is None:
                _require_whole(reply)
            replies.append(reply)
        return replies

    async def _ask(self, chat: list[object], tools: list[Any] | None, seed: int) -> Reply:
        """Ask the least busy engine, and the others where it fails."""
        error: Unanswered | None = None
        for engine in sorted(self.engines, key=lambda one: one.in_flight):
            try:
                reply = await engine.reply(self.model, chat, self.asking, seed, tools)
            except Unanswered as failure:
                error = failure
                self._note_failure(engine, failure)
                continue
            engine.failures = 0
            return reply
        raise error or Unanswered("no endpoint is left")

    def _note_failure(self, engine: Engine, failure: Unanswered) -> None:
        engine.failures += 1
        if engine.failures < self.max_failures or engine not in self.engines:
            return
        if self.engines == [engine]:
            raise SpecforgeError(
                f"{engine.url}: {engine.failures} requests in a row have failed, the last one: {failure}; what is "
                "answered is kept: run the same command when the engine is back"
            ) from failure
        self.engines.remove(engine)
        _log.warning("%s is left out: %s requests in a row have failed: %s", engine.url, engine.failures, failure)


def _require_whole(reply: Reply) -> None:
    """Refuse a reply whose text does not stand for its tokens, where the engine does not return these."""
    if reply.finish != "stop":
        raise Refused(
            f"the reply ended by {reply.finish}: without token ids, a row of its text would have an end that the "
            "verifier did not write; raise --max_new_tokens, or serve it with an engine that returns token ids (vLLM)"
        )
    if not reply.text.strip():
        raise Refused("the reply is empty, and the engine returns no token ids")
