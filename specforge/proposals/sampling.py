"""The sampled chain: the draft samples its tokens with the verifier's temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from specforge.config import TokenProposalConfig
from specforge.models.drafter import Drafter
from specforge.proposals.proposal import Proposal, Proposer, grow


class SamplingTokenProposalConfig(TokenProposalConfig):
    """Settings of the sampled chain.

    Attributes:
        proposal_type: Always ``"sampling"``.
        speculative_tokens: Number of tokens that the draft proposes in a round.
    """

    proposal_type: Literal["sampling"] = "sampling"
    speculative_tokens: int = Field(default=5, ge=1)


class SamplingProposer(Proposer[SamplingTokenProposalConfig]):
    """Proposes a sampled chain; at temperature 0 it is the greedy one."""

    @property
    def depth(self) -> int:
        """The chain's length."""
        return self.config.speculative_tokens

    def propose(self, sequences: Sequence[Tensor], drafter: Drafter | None) -> Proposal:
        """Sample one token per step."""
        assert drafter is not None
        sampling = None if self.sampling.is_greedy else self.sampling
        return grow(drafter, [1] * self.depth, sampling, self.rng)
