"""A language model at work as a draft: it reads the text itself, with a cache of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from specforge.decoding.verifier import CachedModel
from specforge.models.drafter import Drafter
from specforge.verifier.features import Features
from specforge.verifier.parts import decoder

if TYPE_CHECKING:
    from specforge_draft_model.model import DraftModel


class CachedDraft(CachedModel[Tensor]):
    """Runs a draft's language model over sequences that grow by trees."""

    def states(self, tokens: Tensor, position_ids: Tensor, **options: Any) -> Tensor:
        """Return what the head reads, [B, Q, H]."""
        output = decoder(self.model)(input_ids=tokens, position_ids=position_ids, **options)
        return cast(Tensor, output.last_hidden_state)


class ModelDrafter(Drafter):
    """Drafts with a language model; the verifier's states are not looked at.

    Args:
        network: The draft.
        batch_size: Number B of sequences.
    """

    _first: Tensor

    def __init__(self, network: DraftModel, batch_size: int) -> None:
        self._network = network
        self._passes = CachedDraft(network.language_model, batch_size)
        self.draft_ids = network.draft_ids

    def begin(self, tokens: Tensor) -> None:
        """Keep the first token of each sequence, to be read with those that the first ``commit`` brings."""
        self._first = tokens[:, None]

    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        """Read the decided tokens."""
        first, self._first = self._first, self._first[:, :0]
        self.read(torch.cat([first, tokens], dim=1), counts + first.shape[1])

    def read(self, tokens: Tensor, counts: Tensor) -> None:
        """Read tokens that follow those read before, and forget all nodes.

        Args:
            tokens: The verifier's ids, int64 [B, Q].
            counts: Number of real tokens in each row, which come first, int64 [B].
        """
        self._passes.cache.drop()
        states = self._passes.begin(self._network.known(tokens))
        self._passes.cache.keep_first(counts)
        self.root = self._network.logits(states[torch.arange(len(states), device=states.device), counts - 1])

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Read the tokens of some nodes, each after those on its path."""
        return self._network.logits(self._passes.run(self._network.known(tokens), parents))

    def select(self, rows: Tensor) -> None:
        """Continue with some of the sequences."""
        self._first = self._first[rows]
        self._passes.cache.drop()
        self._passes.cache.select(rows)
