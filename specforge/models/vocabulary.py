"""The draft vocabulary: the verifier's most frequent tokens, and the maps between the two vocabularies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from specforge.errors import UsageError


@dataclass(frozen=True)
class DraftVocabulary:
    """Which of the verifier's V tokens a draft can propose.

    Attributes:
        t2d: bool [V], True where the verifier's token is in the draft vocabulary.
        d2t: int64 [D], offsets: draft token j is the verifier's token ``j + d2t[j]``.
    """

    t2d: Tensor
    d2t: Tensor

    @classmethod
    def most_frequent(cls, counts: Tensor, size: int) -> Self:
        """Choose the most frequent tokens; ties, and places that no counted token fills, go to the lowest ids.

        Args:
            counts: int64 [V], how often the verifier says each token (counts over supervised tokens).
            size: Number D of draft tokens.

        Raises:
            UsageError: ``size`` exceeds the verifier's vocabulary.
        """
        if size > counts.numel():
            raise UsageError(f"draft_vocab_size {size} exceeds the verifier's vocabulary of {counts.numel()} tokens")
        chosen = torch.sort(counts, descending=True, stable=True).indices[:size]
        t2d = torch.zeros(counts.numel(), dtype=torch.bool)
        t2d[chosen] = True
        return cls.from_t2d(t2d)

    @classmethod
    def from_t2d(cls, t2d: Tensor) -> Self:
        """Build both maps from a bool [V] mask; draft tokens keep the order of the verifier's ids."""
        ids = t2d.nonzero().squeeze(1)
        return cls(t2d, ids - torch.arange(ids.numel()))

    @property
    def size(self) -> int:
        """Number D of draft tokens."""
        return self.d2t.numel()

    def coverage(self, counts: Tensor) -> float:
        """Return the share of counted tokens, int64 [V], that lie in the draft vocabulary."""
        return float(counts[self.t2d].sum() / counts.sum().clamp(min=1))
