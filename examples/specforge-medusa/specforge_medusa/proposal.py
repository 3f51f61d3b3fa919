"""Medusa's sparse tree: wide only where heads are likely to be right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from specforge.config import TokenProposalConfig
from specforge.models.drafter import Drafter
from specforge.proposals.proposal import Proposal, Proposer


class SparseTreeTokenProposalConfig(TokenProposalConfig):
    """Settings of the sparse tree.

    Attributes:
        proposal_type: Always ``"medusa_tree"``.
        breadth: Number of candidates for the first token.
        depth: Number of tokens from the root to a leaf.
    """

    proposal_type: Literal["medusa_tree"] = "medusa_tree"
    breadth: int = Field(default=4, ge=1)
    depth: int = Field(default=3, ge=1)


class SparseTreeProposer(Proposer[SparseTreeTokenProposalConfig]):
    """Proposes the nodes whose path's ranks, counted from 1, have a product of at most the breadth.

    Where a head's r-th token is right 1/r times as often as its first, these are the most probable nodes of each level.
    The paper measures how often each is right, and searches its tree by that.
    """

    @property
    def depth(self) -> int:
        """Number of tokens from the root to a leaf."""
        return self.config.depth

    def propose(self, sequences: Sequence[Tensor], drafter: Drafter | None) -> Proposal:
        """Grow the tree level by level; its shape is the same for all sequences."""
        assert drafter is not None
        logits = drafter.root[:, None]
        batch, device = len(logits), logits.device
        # For each node of the last level: its index among all nodes, and the breadth left below it.
        level, count = [(-1, min(self.config.breadth, logits.shape[-1]))], 0
        tokens, parents = [], []
        for depth in range(self.depth):
            nodes = [(row, node, rank, left) for row, (node, left) in enumerate(level) for rank in range(left)]
            ranked = logits.topk(level[0][1], dim=-1).indices
            row, rank = (torch.tensor([node[index] for node in nodes], device=device) for index in (0, 2))
            tokens.append(drafter.to_verifier(ranked[:, row, rank]))
            parents.append(torch.tensor([parent for _, parent, _, _ in nodes], device=device).expand(batch, -1))
            level = [(count + number, left // (rank + 1)) for number, (_, _, rank, left) in enumerate(nodes)]
            count += len(nodes)
            if depth + 1 < self.depth:
                logits = drafter.step(tokens[-1], parents[-1])
        counts = torch.full((batch,), count, device=device)
        return Proposal(torch.cat(tokens, dim=1), torch.cat(parents, dim=1), counts)
