"""DFlash2's candidate selector: scores of the most probable tokens of a slot, given the token before.

Letters in shapes: H width, r rank, V vocabulary, K candidates.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class CandidateSelector(nn.Module):
    """score(c | y) = logit(c) + sum_i predecessor[y, i] (hidden_projection h)_i successor[c, i].

    Args:
        tokens: Number V of tokens.
        width: Width H of a slot's state.
        rank: Width r of the codebooks.
        candidates: Number K of the most probable tokens that are scored.
    """

    def __init__(self, tokens: int, width: int, rank: int, candidates: int) -> None:
        super().__init__()
        self.candidates = candidates
        self.predecessor_codebook = nn.Parameter(torch.empty(tokens, rank))
        self.successor_codebook = nn.Parameter(torch.empty(tokens, rank))
        self.hidden_projection = nn.Linear(width, rank, bias=False)

    def transitions(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return what the successors are multiplied with, [..., r].

        Args:
            states: Of the slots, [..., H].
            tokens: The tokens before, int64 [...].
        """
        before = nn.functional.embedding(tokens, self.predecessor_codebook)
        return cast(Tensor, before * self.hidden_projection(states))

    def selected(self, logits: Tensor, transitions: Tensor) -> Tensor:
        """Score the most probable tokens of each slot; all others get minus infinity.

        Args:
            logits: Of the slots, [..., V].
            transitions: See ``transitions``, [..., r].

        Returns:
            [..., V].
        """
        best = logits.topk(self.candidates, dim=-1)
        successors = self.successor_codebook[best.indices]
        scores = best.values + (successors @ transitions[..., None]).squeeze(-1).to(logits.dtype)
        return torch.full_like(logits, -torch.inf).scatter(-1, best.indices, scores)
