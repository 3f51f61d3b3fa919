"""Prompts for a verifier, its replies, and the rows made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from specforge.data.text.bad_rows import BadRow
from specforge.data.text.prompts import Conversation, read_conversation
from specforge.data.text.records import Record
from specforge.data.text.sources import read_raw_records
from specforge.sampling import Sampling


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of a verifier's generation.

    Attributes:
        sampling: Sampling settings.
        max_new_tokens: Maximum number of tokens of a reply.
        seed: Seed of everything random.
        template_arguments: Extra arguments of the chat template.
    """

    sampling: Sampling
    max_new_tokens: int
    seed: int
    template_arguments: dict[str, Any] = field(default_factory=dict)

    def seed_of(self, index: int, turn: int) -> int:
        """Return the 31-bit seed of one reply; it depends only on (index, turn), not on batching or order."""
        digest = hashlib.blake2b(f"{self.seed} {index} {turn}".encode(), digest_size=4).digest()
        return int.from_bytes(digest) >> 1


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered.

    Attributes:
        index: Index among all prompts, from 0.
        conversation: The conversation.
    """

    index: int
    conversation: Conversation


@dataclass(frozen=True)
class Reply:
    """The verifier's reply in one turn.

    Attributes:
        text: The reply, without special tokens.
        finish: Why it ended: ``stop`` at an end token, ``length`` at the maximum length.
        tokens: Number of generated tokens.
        prompt_ids: Token ids of the prompt; None if the engine does not return them.
        token_ids: Generated token ids, including the end token; None if the engine does not return them.
        states: Where the engine has put its states of all these tokens but the last; None if it keeps none.
    """

    text: str
    finish: str
    tokens: int
    prompt_ids: list[int] | None = None
    token_ids: list[int] | None = None
    states: dict[str, Any] | None = None


# Called with conversations that are finished together.
Keep = Callable[[Sequence[tuple[Prompt, list[Reply]]]], None]
# Called with a conversation that cannot be answered, and the reason.
Refuse = Callable[[Prompt, str], None]
# Answers conversations in any order and passes each to one of the two.
Answer = Callable[[Iterator[Prompt], Keep, Refuse], None]


def iter_prompts(sources: Sequence[str], limit: int | None = None) -> Iterator[Prompt | BadRow]:
    """Yield the prompts of some sources in order, or the error of a row without a prompt.

    If a row holds both messages and tokens, all turns of its messages are asked.

    Args:
        sources: Paths or hub names.
        limit: Maximum number of prompts; None for all.

    Raises:
        UsageError: A source cannot be read.
    """
    for index, raw in enumerate(islice(chain.from_iterable(map(read_raw_records, sources)), limit)):
        try:
            yield Prompt(index, read_conversation(_as_chat(raw.parse())))
        except BadRow as error:
            yield error


def rows_of(conversation: Conversation, replies: Sequence[Reply]) -> list[dict[str, Any]]:
    """Convert an answered conversation to rows.

    If all token ids are known, a row holds ``input_ids`` and ``loss_mask``, which is 1 on the tokens that the verifier
    generated. A later turn continues the row if its prompt begins with exactly the row's tokens. Otherwise (a template
    that drops earlier thinking, text that is tokenised differently from its generation) it begins a new row, in which
    earlier replies are context only. If token ids are unknown, there is one row of ``messages``.
    """
    texts = [reply.text for reply in replies]
    if any(reply.token_ids is None for reply in replies):
        return [_messages(conversation, texts)]
    rows: list[dict[str, Any]] = []
    begin = 0
    for end in row_ends(replies):
        ids: list[int] = []
        mask: list[int] = []
        for reply in replies[begin : end + 1]:
            prompt, generated = reply.prompt_ids or [], reply.token_ids or []
            mask = mask + [0] * (len(prompt) - len(ids)) + [1] * len(generated)
            ids = prompt + generated
        rows.append({**_messages(conversation, texts[: end + 1]), "input_ids": ids, "loss_mask": mask})
        begin = end + 1
    return rows


def row_ends(replies: Sequence[Reply]) -> list[int]:
    """Return the turn that each row of a conversation ends with (see ``rows_of``); its tokens are those of the row."""
    ends, ids = [], list[int]()
    for turn, reply in enumerate(replies):
        prompt = reply.prompt_ids or []
        if prompt[: len(ids)] != ids:
            ends.append(turn - 1)
        ids = prompt + (reply.token_ids or [])
    return [*ends, len(replies) - 1]


def _messages(conversation: Conversation, replies: list[str]) -> dict[str, Any]:
    if isinstance(conversation.turns[0][0], int):
        return {}
    last = {"role": "assistant", "content": replies[-1]}
    tools = {"tools": conversation.tools} if conversation.tools else {}
    return {"messages": [*conversation.chat(len(replies) - 1, replies), last], **tools}


def _as_chat(record: Record) -> Record:
    if not record.value.get("messages"):
        return record
    tokens = ("input_ids", "loss_mask")
    return Record({key: value for key, value in record.value.items() if key not in tokens}, record.location)
