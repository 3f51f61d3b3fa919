"""Weights along a chain: factors of each step's loss, given the results of the same row's other steps.

A weighting maps a statistic of every row and step, and a mask of those that count, [S, R] each, to factors [S, R]. The
statistic is a number for each pair of draft and verifier distributions. No gradient flows through either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specforge.training.losses.objectives import PairSums

# arXiv 2605.18810: the constant a, added to each confidence.
DPACE_SMOOTHING = 0.5
# arXiv 2608.30135: decay of the weight per step after the first rejected one.
VAT_DECAY = 0.8


@dataclass(frozen=True)
class ChainWeighting:
    """A weighting, ready to be computed.

    Attributes:
        function: Maps a statistic, [S, R], and which rows and steps count, bool [S, R], to factors, [S, R].
        statistic: Maps ``Distributions`` of n rows to n numbers.
        uses_text: Whether the statistic reads ``Distributions.text``.
        closed_form: Whether the statistic reads only ``PairSums``.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    statistic: Callable[[Any], Tensor]
    uses_text: bool = False
    closed_form: bool = False


def confidence(rows: PairSums) -> Tensor:
    """Return the draft's probability of the text's token, q(y), [n]; 0 if it is not a draft token."""
    assert rows.text is not None
    return rows.log_q_text.exp().masked_fill(rows.text < 0, 0)


def agreement(rows: PairSums) -> Tensor:
    """Return 1 if the most probable tokens of draft and verifier are the same, else 0, [n]."""
    assert rows.verifier_top is not None
    return (rows.top == rows.verifier_top).float()


def dpace(confidences: Tensor, supervised: Tensor) -> Tensor:
    """Weigh each step by the expected number of tokens that are accepted only if it is (D-PACE, arXiv 2605.18810).

    w_k = sum_{m >= k} prod_{i <= m} c_i, with c_i = (1 - a) q_i(y_i) + a and a = 0.5. Sum and product omit steps that
    do not count.

    Args:
        confidences: The draft's probability q_i(y_i) of the text's token, [S, R].
        supervised: Which rows and steps count, bool [S, R].
    """
    smoothed = (1 - DPACE_SMOOTHING) * confidences + DPACE_SMOOTHING
    reached = smoothed.masked_fill(~supervised, 1).cumprod(0) * supervised
    return reached.flip(0).cumsum(0).flip(0)


def vat(agreements: Tensor, supervised: Tensor) -> Tensor:
    """Weigh a step less the further it is after the first rejected one (VAT, arXiv 2608.30135).

    w_k = 1 up to the first rejected step k*, and 0.8^(k - k*) from there. A step that does not count rejects nothing.

    Args:
        agreements: Whether the most probable tokens agree, 1 or 0, [S, R].
        supervised: Which rows and steps count, bool [S, R].
    """
    rejected = ((agreements == 0) & supervised).cumsum(0) > 0
    return torch.full_like(agreements, VAT_DECAY) ** (rejected.cumsum(0) - 1).clamp(min=0)
