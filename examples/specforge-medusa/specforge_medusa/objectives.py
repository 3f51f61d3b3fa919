"""The loss that the Medusa plugin adds."""

from __future__ import annotations

from torch import Tensor

from specforge.training.losses.objectives import Distributions


def top_token_cross_entropy(rows: Distributions) -> Tensor:
    """Cross-entropy with the verifier's most probable token, -log q(argmax p), which greedy verification accepts."""
    best = rows.log_p.argmax(-1, keepdim=True)
    return -rows.log_q.gather(1, best).squeeze(1)
