"""The published tree of MLP speculators: all paths of a broad tree are scored, and the best are verified."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from specforge.config import TokenProposalConfig
from specforge.models.drafter import Drafter
from specforge.proposals.proposal import Proposal, Proposer


class CandidateTreeTokenProposalConfig(TokenProposalConfig):
    """Settings of the published tree.

    Attributes:
        proposal_type: Always ``"candidate_tree"``.
        top_k_tokens_per_head: Number of children of each node, level by level.
        n_candidates: Number of paths, from the root to a leaf, that are proposed.
    """

    proposal_type: Literal["candidate_tree"] = "candidate_tree"
    top_k_tokens_per_head: list[Annotated[int, Field(ge=1)]] = Field(default=[5, 4, 3], min_length=1)
    n_candidates: int = Field(default=5, ge=1)


class CandidateTreeProposer(Proposer[CandidateTreeTokenProposalConfig]):
    """Proposes the published tree."""

    @property
    def depth(self) -> int:
        """Number of tokens from the root to a leaf."""
        return len(self.config.top_k_tokens_per_head)

    def propose(self, sequences: Sequence[Tensor], drafter: Drafter | None) -> Proposal:
        """Grow the whole tree, then keep the most probable paths."""
        assert drafter is not None
        widths = [min(width, drafter.root.shape[-1]) for width in self.config.top_k_tokens_per_head]
        logits = drafter.root[:, None]
        scores = torch.zeros(len(logits), 1, device=logits.device)
        frontier = torch.full((1,), -1, device=logits.device)
        tokens: list[Tensor] = []
        parents: list[Tensor] = []
        stepped = 0
        for level, width in enumerate(widths):
            best = logits.float().log_softmax(-1).topk(width, dim=-1)
            scores = (scores[..., None] + best.values).flatten(1)
            tokens.append(drafter.to_verifier(best.indices).flatten(1))
            parents.append(frontier.repeat_interleave(width).expand(len(scores), -1))
            frontier = torch.arange(scores.shape[1], device=scores.device) + stepped
            stepped += len(frontier)
            if level + 1 < len(widths):
                logits = drafter.step(tokens[-1], parents[-1])
        leaves = scores.topk(min(self.config.n_candidates, scores.shape[1]), dim=1).indices
        return _paths(torch.cat(tokens, 1), torch.cat(parents, 1), leaves, widths)


def _paths(tokens: Tensor, parents: Tensor, leaves: Tensor, widths: Sequence[int]) -> Proposal:
    """Keep the nodes on the paths to some leaves, [B, n]."""
    kept = torch.zeros_like(tokens, dtype=torch.bool)
    first = 0
    for level in range(len(widths)):
        # All nodes of a level have the same number of leaves below them.
        kept.scatter_(1, first + leaves // math.prod(widths[level + 1 :]), True)
        first += math.prod(widths[: level + 1])
    counts = kept.sum(1)
    new_index = kept.cumsum(1) - 1
    parents = torch.where(parents >= 0, new_index.gather(1, parents.clamp(min=0)), -1)
    order = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, : int(counts.max())]
    return Proposal(tokens.gather(1, order), parents.gather(1, order), counts)
