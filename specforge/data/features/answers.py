"""States that an engine keeps while it answers, stored next to the answers: text and features in one pass.

A conversation counts as finished when the shard with its states is on disk, so an interrupted run has either both or
neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from specforge.data.features.growing import GrowingStore
from specforge.data.features.row_asker import RowAsker
from specforge.data.features.served import WrongStates
from specforge.data.features.transports import Transport
from specforge.data.rows.reading import row_digest
from specforge.engines.answering import AnswerKeeper
from specforge.engines.client import request_id
from specforge.engines.generation import Keep, Prompt, Reply, row_ends
from specforge.engines.pool import EnginePool

MOST_WAITING = 256  # conversations of a shard: what a killed run loses


@dataclass
class AnswerRecorder(AnswerKeeper):
    """Keeps answered conversations together with their states.

    Attributes:
        store: The store.
        transport: How the states come here.
        tag: Begins the ids of all requests.
        max_length: Longest row in tokens that is trained on; longer ones are cut off there.
        timeout: Seconds allowed for states after an answer.
    """

    store: GrowingStore
    transport: Transport
    tag: str
    max_length: int
    timeout: float
    _waiting: list[tuple[Prompt, list[Reply]]] = field(default_factory=list, init=False)
    _asker: RowAsker | None = field(default=None, init=False)

    def begin(self, pool: EnginePool, model: str) -> None:
        """Set the engines that are asked for states which do not come with an answer."""
        layers, width = self.store.manifest.layers, self.store.manifest.width
        self._asker = RowAsker(pool, model, self.transport, layers, width, self.timeout)

    def request_id(self, prompt: Prompt | None) -> str:
        """Return a new id of a request, by which its files are found."""
        return request_id(self.tag if prompt is None else self._tag_of(prompt))

    async def take(self, prompt: Prompt, replies: list[Reply], keep: Keep) -> None:
        """Collect the states of an answered conversation, and write those that are collected if they fill a shard.

        Args:
            prompt: The conversation.
            replies: Its replies, with token ids.
            keep: Called with conversations whose states are written.

        Raises:
            SpecforgeError: The engines do not give the states of a row, or they cannot be written.
        """
        for end in row_ends(replies):
            await self._add(prompt, replies[end])
        for reply in replies:
            if reply.states is not None:
                self.transport.delete(reply.states)
        self.forget(prompt)
        self._waiting.append((prompt, replies))
        if self.store.is_full or len(self._waiting) == MOST_WAITING:
            self._flush(keep)

    def forget(self, prompt: Prompt) -> None:
        """Delete what the requests of a conversation have left."""
        self.transport.sweep(self._tag_of(prompt))

    def end(self, keep: Keep) -> None:
        """Write and keep what is collected, and delete what lost answers have left."""
        self._flush(keep)
        self.transport.sweep(self.tag)

    def _tag_of(self, prompt: Prompt) -> str:
        return f"{self.tag}-{prompt.index}"

    def _flush(self, keep: Keep) -> None:
        written, self._waiting = self._waiting, []
        self.store.flush()
        for one in written:
            keep([one])

    async def _add(self, prompt: Prompt, reply: Reply) -> None:
        """Collect the states of the row that ends with a reply, of its first ``max_length`` tokens."""
        assert self._asker is not None and reply.prompt_ids is not None and reply.token_ids is not None
        whole = np.array(reply.prompt_ids + reply.token_ids)
        row = whole[: self.max_length]
        try:
            # The last token is the engine's output only, so it has no state.
            states = await self._asker.receive(reply.states or {}, whole[:-1])
        except WrongStates:
            states = await self._asker.ask(row, self._tag_of(prompt))
        self.store.add(row_digest(row), torch.stack(states[: len(row)].unbind(1)))
