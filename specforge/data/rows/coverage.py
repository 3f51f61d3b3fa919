"""How much of what is supervised a draft vocabulary covers, by its size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

_SIZES = 8


@dataclass(frozen=True)
class Coverage:
    """What a draft vocabulary of the most frequent training tokens covers.

    Attributes:
        draft_vocab_size: its number of tokens.
        train: share of the supervised tokens of the training rows that are in it.
        validation: the same of the validation rows, which had no say in the choice; None without any.
    """

    draft_vocab_size: int
    train: float
    validation: float | None


def coverage_by_size(train: Tensor, validation: Tensor | None) -> list[Coverage]:
    """Return the coverage of draft vocabularies of the eight largest powers of two below V.

    Args:
        train: int64 [V], how often each id is supervised in the training rows.
        validation: the same of the validation rows.
    """
    # Of equally frequent tokens the lowest ids come first, as where a draft vocabulary is chosen.
    order = np.argsort(-train.numpy(), kind="stable")
    powers = range((len(order) - 1).bit_length())
    covered = _cumulative_share(train.numpy()[order])
    held_out = None if validation is None else _cumulative_share(validation.numpy()[order])
    return [
        Coverage(2**power, float(covered[2**power - 1]), None if held_out is None else float(held_out[2**power - 1]))
        for power in powers[-_SIZES:]
    ]


def _cumulative_share(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return counts.cumsum() / max(counts.sum(), 1)
