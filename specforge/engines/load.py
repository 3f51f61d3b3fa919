"""A closed load on one endpoint: a fixed number of requests in flight, their times, and the counters around them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from specforge.data.text.prompts import Conversation
from specforge.engines.counters import Counters, read_counters
from specforge.engines.generation import GenerationSettings
from specforge.engines.timed import TimedEngine, TimedReply

WARM_UP_TOKENS = 16
# vLLM updates its counters after a step, so possibly after the last response of a run.
SETTLING_SECONDS = 0.2


@dataclass(frozen=True)
class Load:
    """What a run gave.

    Attributes:
        seconds: From the first request to the last response.
        replies: All replies.
        before: The engine's counters before it.
        after: The counters after it.
    """

    seconds: float
    replies: list[TimedReply]
    before: Counters
    after: Counters


async def warm_up(
    engine: TimedEngine, conversations: Sequence[Conversation], concurrency: int, generation: GenerationSettings
) -> None:
    """Send short requests, as many at a time as will be measured, so that nothing is compiled or allocated later.

    Raises:
        SpecforgeError: Requests do not work.
    """
    few = GenerationSettings(generation.sampling, WARM_UP_TOKENS, generation.seed, generation.template_arguments)
    await engine.warm_up(_asked(conversations[0], 0, []), few)
    asked = [_asked(conversations[number % len(conversations)], 0, []) for number in range(concurrency)]
    await _together(engine.reply(one, few, 0, f"warm-up {number}") for number, one in enumerate(asked))


async def run_load(
    engine: TimedEngine,
    conversations: Sequence[Conversation],
    concurrency: int,
    generation: GenerationSettings,
    salt: str,
    report: Callable[[int], object],
) -> Load:
    """Answer conversations turn by turn, always ``concurrency`` at a time until fewer are left.

    Args:
        engine: The endpoint.
        conversations: The conversations; each continues with its own replies.
        concurrency: Number of requests in flight.
        generation: Settings of the generation.
        salt: Different for each run, so that no run reads prefixes that an earlier one has cached.
        report: Called with the number of new responses.

    Raises:
        SpecforgeError: A request failed, or the counters cannot be read.
    """
    before = await _settled_counters(engine)
    replies: list[TimedReply] = []
    waiting = iter(enumerate(conversations))

    async def work() -> None:
        for index, conversation in waiting:
            texts: list[str] = []
            for turn in range(len(conversation.turns)):
                prompt, seed = _asked(conversation, turn, texts), generation.seed_of(index, turn)
                reply = await engine.reply(prompt, generation, seed, f"{salt} {index}")
                replies.append(reply)
                texts.append(reply.text)
                report(1)

    begin = perf_counter()
    await _together(work() for _ in range(min(concurrency, len(conversations))))
    return Load(perf_counter() - begin, replies, before, await _settled_counters(engine))


async def _settled_counters(engine: TimedEngine) -> Counters:
    await asyncio.sleep(SETTLING_SECONDS)
    return await read_counters(engine.address.root)


def _asked(conversation: Conversation, turn: int, replies: list[str]) -> list[Any]:
    current = conversation.turns[turn]
    return list(current) if current and isinstance(current[0], int) else conversation.chat(turn, replies)


async def _together(tasks: Iterator[Any]) -> None:
    """Run tasks concurrently; the first error ends them all."""
    try:
        async with asyncio.TaskGroup() as group:
            for task in tasks:
                group.create_task(task)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
