"""Drafting with an MLP speculator: a state for each node, and of committed tokens only the last state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specforge.models.drafter import Drafter
from specforge.verifier.features import Features

if TYPE_CHECKING:
    from specforge_mlp.model import MLPSpeculator


class MLPDrafter(Drafter):
    """Drafts with one head after another.

    Args:
        network: The network, attached to its verifier.
    """

    reads_weights_once = True

    def __init__(self, network: MLPSpeculator) -> None:
        self._network = network
        self.max_depth = network.config.num_layers

    @torch.no_grad()
    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        """Restart from the last decided token and the verifier's state before it."""
        rows = torch.arange(len(tokens), device=tokens.device)
        last = Features(features.aux[rows, counts - 1, None], features.last[rows, counts - 1, None])
        # States of the root, then of the nodes, with the index of each one's head.
        self._states = self._network.advance(self._network.first_state(last), tokens[rows, counts - 1, None], step=0)
        self._depths = torch.zeros_like(tokens[:, :1])
        self.root = self._network.logits(self._states[:, 0], step=0)

    @torch.no_grad()
    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Extend some nodes, each with the head of its depth."""
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        parent_states = self._states[rows, parents + 1]
        depths = self._depths[rows, parents + 1] + 1
        states = torch.empty_like(parent_states)
        logits = self.root.new_empty(*tokens.shape, self.root.shape[-1])
        for depth in depths.unique().tolist():
            here = depths == depth
            states[here] = self._network.advance(parent_states[here], tokens[here], depth)
            logits[here] = self._network.logits(states[here], depth)
        self._states = torch.cat([self._states, states], dim=1)
        self._depths = torch.cat([self._depths, depths], dim=1)
        return logits

    def select(self, rows: Tensor) -> None:
        """Continue with some of the sequences; the next ``commit`` replaces their state."""
