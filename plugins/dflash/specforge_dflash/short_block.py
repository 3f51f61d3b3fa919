"""The chain that a server drafts if it is asked for fewer tokens than a block was trained to propose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from specforge.config import TokenProposalConfig
from specforge.models.block.drafter import BlockDrafter
from specforge.models.drafter import Drafter
from specforge.proposals.proposal import Proposal, Proposer, grow


class ShortBlockTokenProposalConfig(TokenProposalConfig):
    """Settings of the chain.

    Attributes:
        proposal_type: Always ``"short_block"``.
        speculative_tokens: Number of tokens that a round's block proposes.
    """

    proposal_type: Literal["short_block"] = "short_block"
    speculative_tokens: int = Field(default=3, ge=1)


class ShortBlockProposer(Proposer[ShortBlockTokenProposalConfig]):
    """Proposes a chain as the verifier samples, most probable tokens at temperature 0, from a block of its length."""

    @property
    def depth(self) -> int:
        """The chain's length."""
        return self.config.speculative_tokens

    def propose(self, sequences: Sequence[Tensor], drafter: Drafter | None) -> Proposal:
        """Draft the chain from a block with only the slots that it takes."""
        assert isinstance(drafter, BlockDrafter)
        drafter.shorten(self.depth)
        return grow(drafter, [1] * self.depth, None if self.sampling.is_greedy else self.sampling, self.rng)
