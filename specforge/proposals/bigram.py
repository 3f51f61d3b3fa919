"""A bigram table without a draft: for each token, the one that most often followed it in the training data.

The second baseline: a draft that sees only one token of context.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specforge.config import TokenProposalConfig
from specforge.errors import UsageError
from specforge.models.drafter import Drafter
from specforge.proposals.proposal import Proposal, Proposer, follow

SUCCESSORS = "successors"


class BigramTokenProposalConfig(TokenProposalConfig):
    """Settings of the bigram table.

    Attributes:
        proposal_type: Always ``"bigram"``.
        speculative_tokens: Number of proposed tokens.
        table: A safetensors file with ``successors``, int64 [V]: the token that follows each; -1 for none.
    """

    proposal_type: Literal["bigram"] = "bigram"
    speculative_tokens: int = Field(default=5, ge=1)
    table: str


class BigramProposer(Proposer[BigramTokenProposalConfig]):
    """Follows the table from token to token."""

    needs_draft = False

    @property
    def depth(self) -> int:
        """The chain's length."""
        return self.config.speculative_tokens

    def check(self, vocabulary_size: int) -> None:
        """Reject a table that was counted for another vocabulary.

        Raises:
            UsageError: It has another size, contains unknown tokens, or cannot be read.
        """
        size, largest = len(self._successors), max(self._successors, default=-1)
        if size != vocabulary_size or largest >= vocabulary_size:
            raise UsageError(
                f"bigram: {self.config.table} was counted for another vocabulary: it has {size:,} tokens, the verifier "
                f"{vocabulary_size:,}; count it again from rows of this verifier"
            )

    @property
    def _successors(self) -> list[int]:
        return read_table(self.config.table)

    def propose(self, sequences: Sequence[Tensor], drafter: Drafter | None) -> Proposal:
        """Follow the table from the last token, as long as it has a successor."""
        return follow(sequences, self._chain)

    def _chain(self, tokens: Tensor) -> Tensor:
        chain: list[int] = []
        token = self._successors[int(tokens[-1])]
        while token >= 0 and len(chain) < self.config.speculative_tokens:
            chain.append(token)
            token = self._successors[token]
        return torch.tensor(chain, dtype=torch.int64, device=tokens.device)


@lru_cache(maxsize=4)
def read_table(path: str) -> list[int]:
    """Read the successor of each token, -1 for none; cached per process.

    Raises:
        UsageError: The file is missing, damaged or not such a table.
    """
    try:
        return [int(token) for token in load_file(path)[SUCCESSORS].tolist()]
    except (OSError, SafetensorError, KeyError) as error:
        raise UsageError(f"bigram: {path} holds no table {SUCCESSORS!r}: {error}") from None
