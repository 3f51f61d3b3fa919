"""EAGLE-3 at work: committed rows from the verifier's features, drafted rows from the draft's own states.

Row t of the cache reads token x_{t+1} at position t + 1 beside the feature of token t, as step 0 of training does (see
``specforge.models.alignment``). A drafted node reads its own token beside its parent's output, one position further,
as later steps do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specforge.models.drafter import Drafter
from specforge.models.tree_cache import TreeCache
from specforge.verifier.features import Features

if TYPE_CHECKING:
    from specforge_eagle3.model import Eagle3DraftModel


class Eagle3Drafter(Drafter):
    """Drafts with an EAGLE-3 network.

    Args:
        model: The network, attached to its verifier.
        batch_size: Number B of sequences.
    """

    def __init__(self, model: Eagle3DraftModel, batch_size: int) -> None:
        self._model = model
        self._cache = TreeCache(batch_size, model.fc.weight.device)
        self._states = torch.empty(batch_size, 0)
        self.draft_ids = model.draft_ids

    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        """Rebuild the rows of decided tokens from the verifier's features."""
        self._cache.drop()
        index = self._cache.extend(tokens.shape[1])
        states = self._model.advance(tokens, self._model.fuse(features.aux), index + 1, self._cache)
        self._cache.keep_first(counts)
        last = states[torch.arange(len(states), device=states.device), counts - 1]
        self._states = last[:, None]
        self.root = self._model.logits(self._model.norm(last))

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Draft on behind some nodes, from the states that the draft itself computed there."""
        index = self._cache.append(parents)
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        # The root's state stands before those of the nodes.
        behind = self._model.fed_back(self._states[rows, parents + 1])
        states = self._model.advance(tokens, behind, index + 1, self._cache)
        self._states = torch.cat([self._states, states], dim=1)
        return self._model.logits(self._model.norm(states))

    def select(self, rows: Tensor) -> None:
        """Go on with some of the sequences."""
        self._cache.drop()
        self._cache.select(rows)
