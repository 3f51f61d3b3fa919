"""The training loss that HASS adds to EAGLE-1's."""

from __future__ import annotations

from torch import Tensor

from specforge.training.losses.objectives import PairSums

# Tokens of the verifier's distribution that are distilled (arXiv 2408.15766, section 3.1: K = 10).
TOP_K = 10


def top_k_distillation(rows: PairSums) -> Tensor:
    """Cross-entropy over the verifier's K most probable tokens, -sum_{v in top K of p} p log q, [n].

    p is not renormalised over them (arXiv 2408.15766, equation 3).
    """
    probabilities, log_q = rows.most_probable(TOP_K)
    return -(probabilities * log_q).sum(-1)
