"""The dynamic tree (arXiv 2406.16858, section 4), which grows where the draft is confident.

A node's score is the draft's log-probability of its path. Each level steps the ``expansion_factor`` best new nodes and
records ``expansion_factor`` children of each; in the end the best of *all* recorded nodes are proposed. A node never
scores above its parent, so the chosen nodes form a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from specforge.config import TokenProposalConfig
from specforge.models.drafter import Drafter
from specforge.proposals.proposal import Proposal, Proposer


class DynamicTreeTokenProposalConfig(TokenProposalConfig):
    """Settings of the dynamic tree.

    Attributes:
        proposal_type: Always ``"dynamic_tree"``.
        speculative_tokens: Number of proposed nodes.
        expansion_factor: Number of nodes stepped in each level, and of children recorded for each.
        depth: Number of tokens from the root to the deepest leaf.
    """

    proposal_type: Literal["dynamic_tree"] = "dynamic_tree"
    speculative_tokens: int = Field(default=59, ge=1)
    expansion_factor: int = Field(default=10, ge=1)
    depth: int = Field(default=6, ge=1)


class DynamicTreeProposer(Proposer[DynamicTreeTokenProposalConfig]):
    """Proposes the dynamic tree."""

    @property
    def depth(self) -> int:
        """Number of tokens from the root to the deepest leaf."""
        return self.config.depth

    def propose(self, sequences: Sequence[Tensor], drafter: Drafter | None) -> Proposal:
        """Expand the most probable nodes, then choose the best of all."""
        assert drafter is not None
        batch, device = len(drafter.root), drafter.root.device
        rows = torch.arange(batch, device=device)[:, None]
        # A frontier node has an index among the recorded nodes and, once stepped, one among the draft's.
        recorded = stepped = torch.full((batch, 1), -1, device=device)
        score = torch.zeros(batch, 1, device=device)
        logits = drafter.root[:, None]
        tokens: list[Tensor] = []
        parents: list[Tensor] = []
        scores: list[Tensor] = []
        for level in range(self.depth):
            width = min(self.config.expansion_factor, logits.shape[-1])
            best = logits.float().log_softmax(-1).topk(width, dim=-1)
            first = sum(one.shape[1] for one in tokens)
            tokens.append(drafter.to_verifier(best.indices).flatten(1))
            parents.append(recorded.repeat_interleave(width, dim=1))
            scores.append((score[..., None] + best.values).flatten(1))
            if level + 1 == self.depth:
                break
            score, chosen = scores[-1].topk(width, dim=1)
            parent = stepped[rows, chosen // width]
            logits = drafter.step(tokens[-1][rows, chosen], parent)
            stepped = torch.arange(width, device=device).expand(batch, -1) + level * width
            recorded = first + chosen
        return self._best(torch.cat(tokens, 1), torch.cat(parents, 1), torch.cat(scores, 1))

    def _best(self, tokens: Tensor, parents: Tensor, scores: Tensor) -> Proposal:
        size = min(self.config.speculative_tokens, tokens.shape[1])
        # Stable: a child of probability 1 has its parent's score, and must come after it.
        chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :size].sort(dim=1).values
        index = torch.full_like(tokens, -1).scatter(
            1, chosen, torch.arange(size, device=tokens.device).expand_as(chosen)
        )
        recorded = parents.gather(1, chosen)
        parents = torch.where(recorded >= 0, index.gather(1, recorded.clamp(min=0)), -1)
        return Proposal(tokens.gather(1, chosen), parents, torch.full((len(tokens),), size, device=tokens.device))
