"""The chain that ends where the draft no longer believes in it (DSpark): a proposal method of specforge's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from specforge.config import TokenProposalConfig
from specforge.models.drafter import Drafter
from specforge.proposals.proposal import Proposal, Proposer, grow
from specforge_dflash.dspark_drafter import DSparkDrafter


class ConfidentChainTokenProposalConfig(TokenProposalConfig):
    """Settings of the chain.

    Attributes:
        proposal_type: Always ``"confident_chain"``.
        speculative_tokens: Most tokens that the draft proposes in a round.
        threshold: Least probability, by the draft's confidence, that a token and all before it are accepted.
    """

    proposal_type: Literal["confident_chain"] = "confident_chain"
    speculative_tokens: int = Field(default=5, ge=1)
    threshold: float = Field(default=0.3, ge=0, le=1)


class ConfidentChainProposer(Proposer[ConfidentChainTokenProposalConfig]):
    """Proposes a chain as the verifier samples, most probable tokens at temperature 0, and cuts it."""

    @property
    def depth(self) -> int:
        """The chain's length, at most."""
        return self.config.speculative_tokens

    def propose(self, sequences: Sequence[Tensor], drafter: Drafter | None) -> Proposal:
        """Draft a chain and cut it; that a token is left out depends on those before it only, so nothing is lost."""
        assert isinstance(drafter, DSparkDrafter)
        sampling = None if self.sampling.is_greedy else self.sampling
        chain = grow(drafter, [1] * self.depth, sampling, self.chance)
        roots = torch.stack([sequence[-1] for sequence in sequences])[:, None]
        survival = drafter.survival(torch.cat([roots, chain.tokens[:, :-1]], dim=1))
        return chain.within((survival >= self.config.threshold).long().cumprod(1).sum(1))
