"""The share of supervised tokens that a draft vocabulary covers, by its size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

_SIZES = 8


@dataclass(frozen=True)
class Coverage:
    """Coverage of a draft vocabulary of the most frequent training tokens.

    Attributes:
        draft_vocab_size: Size of the draft vocabulary.
        train: Share of the training rows' supervised tokens that it contains.
        validation: The same for the validation rows, which did not influence the choice; None without validation rows.
    """

    draft_vocab_size: int
    train: float
    validation: float | None


def coverage_by_size(train: Tensor, validation: Tensor | None) -> list[Coverage]:
    """Return the coverage of draft vocabularies whose sizes are the eight largest powers of two below V.

    Args:
        train: How often each id is supervised in the training rows, int64 [V].
        validation: The same for the validation rows.
    """
    # Ties go to the lowest ids, as in the choice of a draft vocabulary.
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
