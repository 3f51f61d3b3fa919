"""Drafting with Medusa heads: all heads run once per round, and a node uses the head of its depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specforge.models.drafter import Drafter
from specforge.verifier.features import Features

if TYPE_CHECKING:
    from specforge_medusa.model import MedusaModel


class MedusaDrafter(Drafter):
    """Drafts with independent heads.

    Args:
        network: The network, attached to its verifier.
    """

    reads_weights_once = True

    def __init__(self, network: MedusaModel) -> None:
        self._network = network
        self.max_depth = network.config.num_heads

    @torch.no_grad()
    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        """Run every head once, at the verifier's state before the last decided token."""
        rows = torch.arange(len(tokens), device=tokens.device)
        last = Features(features.aux[rows, counts - 1, None], features.last[rows, counts - 1, None])
        states = self._network.first_state(last)[:, 0]
        heads = range(self._network.config.num_heads)
        by_head = [self._network.logits(self._network.advance(states, head), head) for head in heads]
        self.by_head = torch.stack(by_head, dim=1)
        # Of the root, then of the nodes.
        self._depths = torch.zeros_like(tokens[:, :1])
        self.root = self.by_head[:, 0]

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Return the logits of the heads of the nodes' depths."""
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        depths = self._depths[rows, parents + 1] + 1
        self._depths = torch.cat([self._depths, depths], dim=1)
        return self.by_head[rows, depths]

    def select(self, rows: Tensor) -> None:
        """Continue with some of the sequences; the next ``commit`` replaces their state."""
