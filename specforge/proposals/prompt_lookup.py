"""Prompt lookup without a draft: copy what followed an earlier occurrence of the last few tokens.

A baseline without training cost, which a trained draft has to beat (github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from specforge.config import TokenProposalConfig
from specforge.models.drafter import Drafter
from specforge.proposals.proposal import Proposal, Proposer, follow


class PromptLookupTokenProposalConfig(TokenProposalConfig):
    """Settings of prompt lookup.

    Attributes:
        proposal_type: Always ``"prompt_lookup"``.
        speculative_tokens: Number of copied tokens.
        max_ngram: Length of the longest n-gram at the end of the text to look for; it is tried first.
        min_ngram: Length of the shortest n-gram to look for.
    """

    proposal_type: Literal["prompt_lookup"] = "prompt_lookup"
    speculative_tokens: int = Field(default=5, ge=1)
    max_ngram: int = Field(default=3, ge=1)
    min_ngram: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_ngram > self.max_ngram:
            raise ValueError(f"min_ngram {self.min_ngram} exceeds max_ngram {self.max_ngram}")
        return self


class PromptLookupProposer(Proposer[PromptLookupTokenProposalConfig]):
    """Copies from the text so far."""

    needs_draft = False

    @property
    def depth(self) -> int:
        """The chain's length."""
        return self.config.speculative_tokens

    def propose(self, sequences: Sequence[Tensor], drafter: Drafter | None) -> Proposal:
        """Copy what followed the latest earlier occurrence of the longest n-gram at the end of the text."""
        return follow(sequences, self._copied)

    def _copied(self, tokens: Tensor) -> Tensor:
        for length in range(min(self.config.max_ngram, len(tokens) - 1), self.config.min_ngram - 1, -1):
            # The last window is the n-gram itself.
            earlier = (tokens.unfold(0, length, 1)[:-1] == tokens[-length:]).all(1).nonzero()
            if len(earlier):
                begin = int(earlier[-1]) + length
                return tokens[begin : begin + self.config.speculative_tokens]
        return tokens[:0]
