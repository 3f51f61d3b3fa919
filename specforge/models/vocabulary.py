"""The draft vocabulary: the verifier's most frequent tokens, and the maps between the two vocabularies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from specforge.errors import UsageError


@dataclass(frozen=True)
class DraftVocabulary:
    """The subset of the verifier's V tokens that a draft can propose.

    Attributes:
        t2d: Whether each verifier token is in the draft vocabulary, bool [V].
        d2t: Offsets, int64 [D]: draft token j is the verifier's token ``j + d2t[j]``.
    """

    t2d: Tensor
    d2t: Tensor

    @classmethod
    def most_frequent(cls, counts: Tensor, size: int) -> Self:
        """Choose the most frequent tokens; ties and remaining entries go to the lowest ids.

        Args:
            counts: Number of occurrences of each verifier token among supervised tokens, int64 [V].
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
        """Return the share of counted tokens, int64 [V], that are in the draft vocabulary."""
        return float(counts[self.t2d].sum() / counts.sum().clamp(min=1))


def map_faults(d2t: Tensor, t2d: Tensor | None, size: int) -> Iterator[str]:
    """Yield the faults of maps that were read from a file.

    Args:
        d2t: Offsets [D], integers.
        t2d: Mask [V]; None if the file has none.
        size: Number V of the verifier's tokens.
    """
    ids = d2t.long() + torch.arange(d2t.numel())
    if bool((ids.diff() <= 0).any()) or int(ids[0]) < 0 or int(ids[-1]) >= size:
        absolute = bool((d2t.diff() > 0).all()) and int(d2t[0]) >= 0 and int(d2t[-1]) < size
        hint = "; it looks like the ids themselves, but must hold id - index" if absolute else ""
        yield f"d2t[i] + i are not ascending ids below {size}{hint}"
    elif t2d is not None and not torch.equal(marked := t2d.nonzero().squeeze(-1), ids):
        zeros = "" if bool(d2t.any()) else ", which is all zeros"
        yield (
            f"t2d marks {marked.numel()} tokens, which are not the {ids.numel()} that d2t maps to{zeros}; d2t must "
            "hold id - index"
        )


def token_map_faults(tensors: Mapping[str, Tensor], draft_size: int | None, verifier_size: int | None) -> Iterator[str]:
    """Yield what is wrong with the maps among a draft's tensors, for readers of ``d2t`` and ``t2d``.

    Args:
        tensors: All tensors by name.
        draft_size: Size D of the draft vocabulary, as ``config.json`` says.
        verifier_size: Size V of the verifier's.
    """
    d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
    if draft_size is None or verifier_size is None:
        return
    if draft_size == verifier_size:
        if d2t is not None:
            yield "d2t is there, though both vocabularies are the same; it has to be left out"
        return
    if d2t is None:
        yield (
            f"d2t is missing, though the draft has {draft_size} of {verifier_size} tokens: engines would take "
            "draft ids for the verifier's, and accept nothing"
        )
        return
    if d2t.dtype != torch.int64:
        yield f"d2t is {d2t.dtype}, not torch.int64"
    if t2d is not None and t2d.dtype != torch.bool:
        yield f"t2d is {t2d.dtype}, not torch.bool"
    if d2t.ndim == 1 and d2t.numel() and not d2t.is_floating_point():
        yield from map_faults(d2t, t2d, verifier_size)
