"""What a verifier is asked, and what it replies."""

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
class Asking:
    """How a verifier is asked.

    Attributes:
        sampling: How it chooses its tokens.
        max_new_tokens: Most tokens of a reply.
        seed: Seed of everything random.
        template_arguments: What the chat template is given besides the chat.
    """

    sampling: Sampling
    max_new_tokens: int
    seed: int
    template_arguments: dict[str, Any] = field(default_factory=dict)

    def seed_of(self, index: int, turn: int) -> int:
        """Return the seed of one reply, 31 bits: it hangs on its place alone, not on when or beside what it is made."""
        digest = hashlib.blake2b(f"{self.seed} {index} {turn}".encode(), digest_size=4).digest()
        return int.from_bytes(digest) >> 1


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for its replies.

    Attributes:
        index: Its place among all, from 0.
        conversation: What is asked.
    """

    index: int
    conversation: Conversation


@dataclass(frozen=True)
class Reply:
    """What the verifier says in one turn.

    Attributes:
        text: The reply, without special tokens.
        finish: Why it ended: ``stop`` at a token that ends the turn, ``length`` at the longest that is allowed.
        tokens: Number of tokens that the verifier produced.
        prompt_ids: The tokens that it read; None where the engine does not return them.
        token_ids: The tokens that it produced, the one that ended the turn included; None likewise.
    """

    text: str
    finish: str
    tokens: int
    prompt_ids: list[int] | None = None
    token_ids: list[int] | None = None


# Takes conversations that are finished together.
Keep = Callable[[Sequence[tuple[Prompt, list[Reply]]]], None]
# Takes one that cannot be answered, and why.
Refuse = Callable[[Prompt, str], None]
# Answers conversations in any order, and hands each over to one of the two.
Answer = Callable[[Iterator[Prompt], Keep, Refuse], None]


def read_asked(sources: Sequence[str], limit: int | None = None) -> Iterator[Prompt | BadRow]:
    """Yield the prompts of some sources, one after the other, or why a row holds none.

    A row that holds both messages and tokens is asked its messages, all turns of them.

    Args:
        sources: Paths or hub names.
        limit: Only so many; None for all.

    Raises:
        UsageError: A source cannot be read.
    """
    for index, raw in enumerate(islice(chain.from_iterable(map(read_raw_records, sources)), limit)):
        try:
            yield Prompt(index, read_conversation(_as_chat(raw.parse())))
        except BadRow as error:
            yield error


def rows_of(conversation: Conversation, replies: Sequence[Reply]) -> list[dict[str, Any]]:
    """Put a conversation into the form of rows.

    Where the tokens are known, a row holds ``input_ids`` and ``loss_mask``, which is 1 on the tokens that the verifier
    produced. A later turn goes on with the row while its prompt begins with the very tokens of the row; where it does
    not (a template that leaves out earlier thinking, a text that is tokenised in another way than it was written), it
    begins a row of its own, in which earlier replies are only read. Otherwise there is one row of ``messages``.
    """
    said = [reply.text for reply in replies]
    if any(reply.token_ids is None for reply in replies):
        return [_messages(conversation, said)]
    rows: list[dict[str, Any]] = []
    ids: list[int] = []
    mask: list[int] = []
    for turn, reply in enumerate(replies):
        prompt, produced = reply.prompt_ids or [], reply.token_ids or []
        if prompt[: len(ids)] != ids:
            rows.append({**_messages(conversation, said[:turn]), "input_ids": ids, "loss_mask": mask})
            ids, mask = [], []
        mask = mask + [0] * (len(prompt) - len(ids)) + [1] * len(produced)
        ids = prompt + produced
    return [*rows, {**_messages(conversation, said), "input_ids": ids, "loss_mask": mask}]


def _messages(conversation: Conversation, said: list[str]) -> dict[str, Any]:
    if isinstance(conversation.turns[0][0], int):
        return {}
    last = {"role": "assistant", "content": said[-1]}
    tools = {"tools": conversation.tools} if conversation.tools else {}
    return {"messages": [*conversation.chat(len(said) - 1, said), last], **tools}


def _as_chat(record: Record) -> Record:
    if not record.value.get("messages"):
        return record
    tokens = ("input_ids", "loss_mask")
    return Record({key: value for key, value in record.value.items() if key not in tokens}, record.location)
