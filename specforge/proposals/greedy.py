"""The greedy chain: the draft proposes its most probable token, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from specforge.config import TokenProposalConfig
from specforge.models.drafter import Drafter
from specforge.proposals.proposal import Proposal, Proposer, grow


class GreedyTokenProposalConfig(TokenProposalConfig):
    """Settings of the greedy chain.

    Attributes:
        proposal_type: Always ``"greedy"``.
        speculative_tokens: Number of tokens that the draft proposes in a round.
        verifier_accept_k: A proposed token is accepted if it is among the verifier's k most probable ones; lossy
            above 1.
        accept_tolerance: A proposed token is accepted if its log-probability is at most this far below that of the
            verifier's best token; lossy above 0.
    """

    proposal_type: Literal["greedy"] = "greedy"
    speculative_tokens: int = Field(default=5, ge=1)
    verifier_accept_k: int = Field(default=1, ge=1)
    accept_tolerance: float = Field(default=0.0, ge=0.0)


class GreedyProposer(Proposer[GreedyTokenProposalConfig]):
    """Proposes the greedy chain."""

    @property
    def depth(self) -> int:
        """The chain's length."""
        return self.config.speculative_tokens

    def propose(self, sequences: Sequence[Tensor], drafter: Drafter | None) -> Proposal:
        """Take the draft's most probable token at each step of the chain."""
        assert drafter is not None
        chain = grow(drafter, [1] * self.depth, sampling=None, rng=self.rng)
        return replace(chain, accept_k=self.config.verifier_accept_k, accept_tolerance=self.config.accept_tolerance)
