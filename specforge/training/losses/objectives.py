"""The training losses: functions of rows of draft and verifier distributions.

A loss maps ``Distributions`` of n rows to n values. p is the verifier, q the draft; v runs over the D draft tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Fading of lk_lambda's KL part, as recommended by the authors of LK losses (arXiv 2602.23881).
LK_DECAY = 3.0


@dataclass(frozen=True)
class Distributions:
    """Log-probabilities of n rows, float32.

    Attributes:
        log_q: The draft's, over the draft vocabulary, [n, D].
        log_p: The verifier's, normalised over the draft vocabulary, [n, D].
        log_p_full: The verifier's over its whole vocabulary, at the draft tokens, [n, D]; the same tensor as
            ``log_p`` if the vocabularies are the same.
        mean_acceptance: The mean acceptance probability of each row's TTT step over the batch, [n]; None for losses
            that are not registered as using it.
        text: The text's next token, an index into the draft vocabulary, int64 [n]; -1 if it is not a draft token. None
            for losses that are not registered as using it.
        verifier_top: The verifier's most probable token, likewise, int64 [n].
    """

    log_q: Tensor
    log_p: Tensor
    log_p_full: Tensor
    mean_acceptance: Tensor | None = None
    text: Tensor | None = None
    verifier_top: Tensor | None = None


def acceptance(rows: Distributions) -> Tensor:
    """Return the probability that a sampled draft token is accepted, sum_v min(p, q), [n].

    Token verification (Leviathan et al., arXiv 2211.17192, section 3.3). p is the verifier's full distribution:
    its probability of tokens outside the draft vocabulary is lost.
    """
    return torch.minimum(rows.log_p_full, rows.log_q).exp().sum(-1)


def forward_kl(rows: Distributions) -> Tensor:
    """Forward Kullback-Leibler divergence, sum_v p (log p - log q), over the draft vocabulary."""
    return (rows.log_p.exp() * (rows.log_p - rows.log_q)).sum(-1)


def reverse_kl(rows: Distributions) -> Tensor:
    """Reverse Kullback-Leibler divergence, sum_v q (log q - log p), over the draft vocabulary."""
    return (rows.log_q.exp() * (rows.log_q - rows.log_p)).sum(-1)


def cross_entropy(rows: Distributions) -> Tensor:
    """Soft cross-entropy, -sum_v p log q, over the draft vocabulary (arXiv 2503.01840)."""
    return -(rows.log_p.exp() * rows.log_q).sum(-1)


def text_cross_entropy(rows: Distributions) -> Tensor:
    """Cross-entropy with the text itself, -log q(y); 0 if the text's token y is not a draft token.

    The published loss of independent heads (arXiv 2404.19124, 2401.10774); it does not use the verifier.
    """
    assert rows.text is not None
    found = rows.log_q.gather(1, rows.text.clamp(min=0)[:, None]).squeeze(1)
    return -found.masked_fill(rows.text < 0, 0)


def argmax_cross_entropy(rows: Distributions) -> Tensor:
    """Cross-entropy with the verifier's most probable draft token, -log q(argmax p)."""
    return -rows.log_q.gather(1, rows.log_p.argmax(-1, keepdim=True)).squeeze(1)


def total_variation(rows: Distributions) -> Tensor:
    """Probability of rejection, 1 - sum_v min(p, q): total variation with the verifier's full distribution."""
    return 1 - acceptance(rows)


def jensen_shannon(rows: Distributions) -> Tensor:
    """Jensen-Shannon divergence, (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, over the draft vocabulary."""
    log_m = torch.logaddexp(rows.log_p, rows.log_q) - math.log(2)
    towards_p = rows.log_p.exp() * (rows.log_p - log_m)
    towards_q = rows.log_q.exp() * (rows.log_q - log_m)
    return (towards_p + towards_q).sum(-1) / 2


def lk_alpha(rows: Distributions) -> Tensor:
    """Minus the logarithm of the acceptance probability (LK-alpha, arXiv 2602.23881)."""
    # Log-sum-exp instead of log of a sum: acceptance may underflow at the start of training.
    return -torch.logsumexp(torch.minimum(rows.log_p_full, rows.log_q), dim=-1)


def lk_lambda(rows: Distributions) -> Tensor:
    """Forward KL fading into the probability of rejection (LK-lambda, arXiv 2602.23881).

    w KL(p || q) + (1 - w) (1 - a), with w = exp(-3 A) and A the mean acceptance of the step, without a gradient.
    """
    assert rows.mean_acceptance is not None
    weight = torch.exp(-LK_DECAY * rows.mean_acceptance)
    return weight * forward_kl(rows) + (1 - weight) * total_variation(rows)
