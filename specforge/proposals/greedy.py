"""The greedy chain: the draft proposes its most probable token, step by step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from specforge.config import TokenProposalConfig


class GreedyTokenProposalConfig(TokenProposalConfig):
    """Settings of the greedy chain.

    Attributes:
        proposal_type: Always ``"greedy"``.
        speculative_tokens: Tokens that the draft proposes in a round.
        verifier_accept_k: A proposed token is accepted when it is among the verifier's k most probable ones.
        accept_tolerance: How much less probable than the verifier's best an accepted token may be, as a difference
            of log-probabilities; 0 for lossless decoding.
    """

    proposal_type: Literal["greedy"] = "greedy"
    speculative_tokens: int = Field(default=5, ge=1)
    verifier_accept_k: int = Field(default=1, ge=1)
    accept_tolerance: float = Field(default=0.0, ge=0.0)
