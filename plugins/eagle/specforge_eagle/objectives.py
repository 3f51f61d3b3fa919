"""The training loss that HASS adds to EAGLE-1's."""

from __future__ import annotations

from torch import Tensor

from specforge.training.losses.objectives import Distributions

# Tokens of the verifier's distribution that are distilled (arXiv 2408.15766, section 3.1: K = 10).
TOP_K = 10


def top_k_distillation(rows: Distributions) -> Tensor:
    """Cross-entropy over the verifier's K most probable tokens, -sum_{v in top K of p} p log q, [n].

    p is not renormalised over them (arXiv 2408.15766, equation 3).
    """
    top = rows.log_p.topk(min(TOP_K, rows.log_p.shape[-1]), dim=-1)
    return -(top.values.exp() * rows.log_q.gather(-1, top.indices)).sum(-1)
