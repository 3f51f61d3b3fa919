"""Operators over rows of logits whose implementation is a Triton kernel (``triton_rows``).

To torch each is one operator, so they also run on tensors without values. Each moves little more than its arguments and
results once: rows are read again from the cache, and logits are never copied.

Letters in shapes: M pairs of a draft's and a verifier's distribution, R of the latter, D draft tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("specforge::row_statistics", mutates_args=())
def row_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each row, float32 [R], and its first maximum, int64 [R].

    Args:
        logits: [R, W], rows contiguous.
    """
    from specforge.training.losses import triton_rows

    return triton_rows.row_statistics(logits)


@row_statistics.register_fake
def _row_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    rows = len(logits)
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.int64)


@torch.library.custom_op("specforge::pair_sums", mutates_args=())
def pair_sums(
    logits: Tensor, verifier: Tensor, normaliser: Tensor, of_draft: Tensor, target_of: Tensor
) -> tuple[Tensor, Tensor]:
    """Return sums over the draft vocabulary for each pair, float32 [8, M], and the draft's first maximum, int64 [M].

    The sums: log-sum-exp of the logits, KL(p || q), cross-entropy, KL(q || p), Jensen-Shannon divergence, logarithm of
    the acceptance probability a; then for the gradient, KL(q || m) and the share of a where q is the smaller one.

    Args:
        logits: The draft's, [M, D], rows contiguous.
        verifier: The verifier's logits at the draft tokens, [R, D], rows contiguous.
        normaliser: Log-sum-exp of its logits over the whole vocabulary, float32 [R].
        of_draft: The same over the draft tokens, float32 [R].
        target_of: Index of each pair's target, int64 [M].
    """
    from specforge.training.losses import triton_rows

    return triton_rows.pair_sums(logits, verifier, normaliser, of_draft, target_of)


@pair_sums.register_fake
def _pair_sums(
    logits: Tensor, verifier: Tensor, normaliser: Tensor, of_draft: Tensor, target_of: Tensor
) -> tuple[Tensor, Tensor]:
    pairs = len(logits)
    return logits.new_empty(8, pairs, dtype=torch.float32), logits.new_empty(pairs, dtype=torch.int64)


@torch.library.custom_op("specforge::pair_gradient_", mutates_args=("logits",))
def pair_gradient_(
    logits: Tensor,
    verifier: Tensor,
    normaliser: Tensor,
    of_draft: Tensor,
    target_of: Tensor,
    sums: Tensor,
    tokens: Tensor,
    factors: Tensor,
    used: Sequence[bool],
) -> None:
    """Replace the draft's logits by the gradient of a loss.

    Args:
        logits: As for ``pair_sums``; changed in place.
        verifier: As for ``pair_sums``.
        normaliser: As for ``pair_sums``.
        of_draft: As for ``pair_sums``.
        target_of: As for ``pair_sums``.
        sums: Its result.
        tokens: The text's token, the verifier's most probable draft token, and k further ones, int64 [2 + k, M]; -1 for
            none.
        factors: Derivatives of the loss by KL(p || q), KL(q || p), the Jensen-Shannon divergence, log a and
            the log-probabilities of the tokens, float32 [6 + k, M].
        used: Which of the first six rows are read.
    """
    from specforge.training.losses import triton_rows

    triton_rows.pair_gradient_(logits, verifier, normaliser, of_draft, target_of, sums, tokens, factors, used)


@pair_gradient_.register_fake
def _pair_gradient(
    logits: Tensor,
    verifier: Tensor,
    normaliser: Tensor,
    of_draft: Tensor,
    target_of: Tensor,
    sums: Tensor,
    tokens: Tensor,
    factors: Tensor,
    used: Sequence[bool],
) -> None:
    return None
