"""A tree of a fixed shape: all nodes of a level have the same number of children."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from specforge.config import TokenProposalConfig
from specforge.models.drafter import Drafter
from specforge.proposals.proposal import Proposal, Proposer, grow


class StaticTreeTokenProposalConfig(TokenProposalConfig):
    """Settings of the static tree.

    Attributes:
        proposal_type: Always ``"static_tree"``.
        initial_branching_factor: Number of candidates for the first token.
        branching_factor: Number of candidates after each later token.
        depth: Number of tokens from the root to a leaf.
        sampled: Above temperature 0, sample candidates from the draft's distribution, without replacement, instead of
            taking the most probable ones.
    """

    proposal_type: Literal["static_tree"] = "static_tree"
    initial_branching_factor: int = Field(default=4, ge=1)
    branching_factor: int = Field(default=2, ge=1)
    depth: int = Field(default=4, ge=1)
    sampled: bool = False


class StaticTreeProposer(Proposer[StaticTreeTokenProposalConfig]):
    """Proposes the static tree."""

    @property
    def depth(self) -> int:
        """Number of tokens from the root to a leaf."""
        return self.config.depth

    def propose(self, sequences: Sequence[Tensor], drafter: Drafter | None) -> Proposal:
        """Grow the tree level by level."""
        assert drafter is not None
        widths = [self.config.initial_branching_factor] + [self.config.branching_factor] * (self.config.depth - 1)
        samples = self.config.sampled and not self.sampling.is_greedy
        return grow(drafter, widths, self.sampling if samples else None, self.rng)
