"""EAGLE's drafting: committed rows read the verifier's features, drafted rows the network's own.

Row t of the cache reads token x_{t+1} and the feature of token t, like step 0 of training (see
``specforge.models.chain.alignment``). A drafted node reads its own token and its parent's state, one position further,
like later steps.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from specforge.models.draft_attention import DraftAttention
from specforge.models.drafter import Drafter
from specforge.models.tree_cache import TreeCache
from specforge.verifier.features import Features


class FeatureNetwork(Protocol):
    """A draft network that reads a token and a feature, and whose state is the next feature."""

    @property
    def draft_ids(self) -> Tensor | None:
        """The verifier's id of each draft token, int64 [D]; None if the vocabularies are the same."""

    def first_feature(self, features: Features) -> Tensor:
        """Return the first step's input from the verifier's states, [B, T, H]."""

    def advance(
        self,
        tokens: Tensor,
        feature: Tensor,
        position_ids: Tensor,
        attention: DraftAttention,
        wanted: int | None = None,
    ) -> Tensor:
        """Run the network once over [B, T] tokens; return its states [B, T, H], or only the first ``wanted`` rows'."""

    def fed_back(self, states: Tensor) -> Tensor:
        """Return the next step's input from states, [..., H]."""

    def state_logits(self, states: Tensor) -> Tensor:
        """Turn states [..., H] into logits over the draft vocabulary [..., D]."""


class FeatureDrafter(Drafter):
    """Drafts with a network that feeds its own states back.

    Args:
        network: The network, attached to its verifier.
        batch_size: Number B of sequences.
        device: Device of the network.
        first_position: Position of row 0, which reads x_1.
    """

    def __init__(self, network: FeatureNetwork, batch_size: int, device: torch.device, first_position: int) -> None:
        self._network = network
        self._first_position = first_position
        self._cache = TreeCache(batch_size, device)
        self._states = torch.empty(batch_size, 0)
        self.draft_ids = network.draft_ids

    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        """Recompute the rows of decided tokens from the verifier's features."""
        self._cache.drop()
        index = self._cache.extend(tokens.shape[1])
        states = self._advance(tokens, self._network.first_feature(features), index)
        self._cache.keep_first(counts)
        last = states[torch.arange(len(states), device=states.device), counts - 1]
        self._states = last[:, None]
        self.root = self._network.state_logits(last)

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Extend some nodes, reading the states that the network computed for their parents."""
        index = self._cache.append(parents)
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        # The root's state precedes those of the nodes.
        parent_states = self._network.fed_back(self._states[rows, parents + 1])
        states = self._advance(tokens, parent_states, index)
        self._states = torch.cat([self._states, states], dim=1)
        return self._network.state_logits(states)

    def select(self, rows: Tensor) -> None:
        """Continue with some of the sequences."""
        self._cache.drop()
        self._cache.select(rows)

    def _advance(self, tokens: Tensor, feature: Tensor, index: Tensor) -> Tensor:
        return self._network.advance(tokens, feature, index + self._first_position, self._cache)
