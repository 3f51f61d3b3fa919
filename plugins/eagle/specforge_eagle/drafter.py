"""EAGLE-1 at work: committed rows from the verifier's features, drafted rows from the draft's own ones.

Row t of the cache reads token x_{t+1} at position t beside the feature of token t, as step 0 of training does (see
``specforge.models.alignment``). A drafted node reads its own token beside its parent's prediction, one position
further, as later steps do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specforge.models.drafter import Drafter
from specforge.models.tree_cache import TreeCache
from specforge.verifier.features import Features

if TYPE_CHECKING:
    from specforge_eagle.model import EagleSpeculator


class EagleDrafter(Drafter):
    """Drafts with the network of EAGLE-1, EAGLE-2 or HASS.

    Args:
        model: The network, attached to its verifier.
        batch_size: Number B of sequences.
    """

    def __init__(self, model: EagleSpeculator, batch_size: int) -> None:
        self._model = model
        self._cache = TreeCache(batch_size, model.fusion_fc.weight.device)
        self._states = torch.empty(batch_size, 0)

    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        """Rebuild the rows of decided tokens from the verifier's features."""
        self._cache.drop()
        index = self._cache.extend(tokens.shape[1])
        states = self._model.advance(tokens, self._model.first_feature(features), index, self._cache)
        self._cache.keep_first(counts)
        last = states[torch.arange(len(states), device=states.device), counts - 1]
        self._states = last[:, None]
        self.root = self._model.logits(last)

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Draft on behind some nodes, from the features that the draft itself predicted there."""
        index = self._cache.append(parents)
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        # The root's prediction stands before those of the nodes.
        behind = self._model.fed_back(self._states[rows, parents + 1])
        states = self._model.advance(tokens, behind, index, self._cache)
        self._states = torch.cat([self._states, states], dim=1)
        return self._model.logits(states)

    def select(self, rows: Tensor) -> None:
        """Go on with some of the sequences."""
        self._cache.drop()
        self._cache.select(rows)
