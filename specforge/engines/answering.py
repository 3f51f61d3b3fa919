"""Answering many conversations concurrently through one or several endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

from specforge.engines.client import Engine, Refused, Unanswered
from specforge.engines.generation import GenerationSettings, Keep, Prompt, Refuse, Reply
from specforge.engines.pool import EndpointSettings, EnginePool, engines_of, served_model
from specforge.errors import SpecforgeError

_KEPT = "finished conversations are kept: run the same command again when the engine is back"


class AnswerKeeper:
    """Keeps answered conversations; this one at once, and without the states that engines could keep."""

    def begin(self, pool: EnginePool, model: str) -> None:
        """Called first, with the engines and their name for the verifier."""

    def request_id(self, prompt: Prompt | None) -> str | None:
        """Return a new id of a request whose states the engine keeps, or None if it keeps none.

        Args:
            prompt: The conversation; None for a request that belongs to none.
        """
        return None

    async def take(self, prompt: Prompt, replies: list[Reply], keep: Keep) -> None:
        """Take an answered conversation, and keep it now or later."""
        keep([(prompt, replies)])

    def forget(self, prompt: Prompt) -> None:
        """Called with a conversation that is not answered."""

    def end(self, keep: Keep) -> None:
        """Keep what was taken; called last, also after an error."""


class EndpointAnswerer:
    """Answers conversations turn by turn; each request goes to the engine with the fewest requests in flight.

    Args:
        settings: The endpoints and how they are used.
        generation: Settings of the generation.
        keeper: Keeps the answers; None keeps them at once, without states.
    """

    def __init__(
        self, settings: EndpointSettings, generation: GenerationSettings, keeper: AnswerKeeper | None = None
    ) -> None:
        self.settings = settings
        self.generation = generation
        self.keeper = keeper or AnswerKeeper()

    @cached_property
    def model(self) -> str:
        """The engines' name for the verifier: the given name, or the only one that they list.

        Raises:
            UsageError: They serve several models or none.
            SpecforgeError: An endpoint cannot be reached.
        """
        return self.settings.model or asyncio.run(self._listed_model())

    async def _listed_model(self) -> str:
        async with engines_of(self.settings) as engines:
            return await served_model(engines)

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
                    replies = await self._converse(pool, model, prompt)
                except Refused as error:
                    self.keeper.forget(prompt)
                    refuse(prompt, str(error))
                except Unanswered as error:
                    self.keeper.forget(prompt)
                    unanswered.append(f"{prompt.conversation.location}: {error}")
                else:
                    await self.keeper.take(prompt, replies, keep)

        async with engines_of(self.settings) as engines:
            probe = self.keeper.request_id(None)
            await asyncio.gather(*(engine.probe(model, self.generation, probe) for engine in engines))
            pool = EnginePool(engines, self.settings, _KEPT)
            self.keeper.begin(pool, model)
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.settings.concurrency):
                        group.create_task(work())
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            finally:
                self.keeper.end(keep)
        if unanswered:
            raise SpecforgeError(
                f"{len(unanswered):,} conversations were not answered, the first: {unanswered[0]}; all others are "
                "kept: run the same command again to request the missing ones"
            )

    async def _converse(self, pool: EnginePool, model: str, prompt: Prompt) -> list[Reply]:
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
            seed, tools = self.generation.seed_of(prompt.index, turn), prompt.conversation.tools
            reply = await pool.ask(partial(self._reply, model, chat, seed, tools, prompt))
            if reply.token_ids is None:
                _require_whole(reply)
            replies.append(reply)
        return replies

    async def _reply(
        self, model: str, chat: list[object], seed: int, tools: list[Any] | None, prompt: Prompt, engine: Engine
    ) -> Reply:
        return await engine.reply(model, chat, self.generation, seed, tools, self.keeper.request_id(prompt))


def _require_whole(reply: Reply) -> None:
    """Refuse a reply without token ids if its text does not determine its tokens."""
    if reply.finish != "stop":
        raise Refused(
            f"the reply ended by {reply.finish}: without token ids, a row of its text would get an end token that the "
            "verifier did not generate; raise --max_new_tokens, or use an engine that returns token ids (vLLM)"
        )
    if not reply.text.strip():
        raise Refused("the reply is empty, and the engine returns no token ids")
