"""The training losses: functions of n pairs of a draft's and a verifier's distribution.

A loss maps ``Distributions`` of n pairs to n values. p is the verifier, q the draft; v runs over the D draft tokens.
Those of this file read only the sums of ``PairSums``, so that a kernel can compute them without storing distributions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specforge.training.losses.maximum import first_maximum

# Fading of lk_lambda's KL part, as recommended by the authors of LK losses (arXiv 2602.23881).
LK_DECAY = 3.0


class PairSums(Protocol):
    """Sums over the draft vocabulary, [n] each, of n pairs of a draft's and a verifier's distribution.

    ``Distributions`` computes them with torch, ``FusedSums`` has them from a kernel. See ``Distributions`` for the
    definitions.
    """

    @property
    def forward_kl(self) -> Tensor:
        """KL(p || q)."""

    @property
    def reverse_kl(self) -> Tensor:
        """KL(q || p)."""

    @property
    def cross_entropy(self) -> Tensor:
        """Cross-entropy of q under p."""

    @property
    def jensen_shannon(self) -> Tensor:
        """Jensen-Shannon divergence."""

    @property
    def acceptance(self) -> Tensor:
        """Probability that a sampled draft token is accepted."""

    @property
    def log_acceptance(self) -> Tensor:
        """Its logarithm."""

    @property
    def log_q_text(self) -> Tensor:
        """Log-probability of the text's token."""

    @property
    def log_q_best(self) -> Tensor:
        """Log-probability of the verifier's most probable draft token."""

    def most_probable(self, number: int) -> tuple[Tensor, Tensor]:
        """Probabilities p of the verifier's most probable draft tokens, and log q of these tokens, [n, number] each."""

    @property
    def top(self) -> Tensor:
        """The draft's most probable token."""

    @property
    def mean_acceptance(self) -> Tensor | None:
        """Mean acceptance probability of the pair's step."""

    @property
    def text(self) -> Tensor | None:
        """The text's token."""

    @property
    def verifier_top(self) -> Tensor | None:
        """The verifier's most probable token."""


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

    @property
    def forward_kl(self) -> Tensor:
        """Forward Kullback-Leibler divergence, sum_v p (log p - log q), [n]."""
        return (self.log_p.exp() * (self.log_p - self.log_q)).sum(-1)

    @property
    def reverse_kl(self) -> Tensor:
        """Reverse Kullback-Leibler divergence, sum_v q (log q - log p), [n]."""
        return (self.log_q.exp() * (self.log_q - self.log_p)).sum(-1)

    @property
    def cross_entropy(self) -> Tensor:
        """Soft cross-entropy, -sum_v p log q, [n]."""
        return -(self.log_p.exp() * self.log_q).sum(-1)

    @property
    def jensen_shannon(self) -> Tensor:
        """Jensen-Shannon divergence, (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, [n]."""
        log_m = torch.logaddexp(self.log_p, self.log_q) - math.log(2)
        towards_p = self.log_p.exp() * (self.log_p - log_m)
        towards_q = self.log_q.exp() * (self.log_q - log_m)
        return (towards_p + towards_q).sum(-1) / 2

    @property
    def acceptance(self) -> Tensor:
        """Probability that a sampled draft token is accepted, sum_v min(p, q), [n].

        Token verification (Leviathan et al., arXiv 2211.17192, section 3.3). p is the verifier's full distribution:
        its probability of tokens outside the draft vocabulary is lost.
        """
        return torch.minimum(self.log_p_full, self.log_q).exp().sum(-1)

    @property
    def log_acceptance(self) -> Tensor:
        """Logarithm of ``acceptance``, which itself may underflow at the start of training, [n]."""
        return torch.logsumexp(torch.minimum(self.log_p_full, self.log_q), dim=-1)

    @property
    def log_q_text(self) -> Tensor:
        """Log-probability of the text's token, log q(y), [n]; of any token if y is not a draft token."""
        assert self.text is not None
        return self.log_q.gather(1, self.text.clamp(min=0)[:, None]).squeeze(1)

    @property
    def log_q_best(self) -> Tensor:
        """Log-probability of the verifier's most probable draft token, log q(argmax p), [n]."""
        return self.log_q.gather(1, first_maximum(self.log_p)[:, None]).squeeze(1)

    def most_probable(self, number: int) -> tuple[Tensor, Tensor]:
        """Return p of the verifier's most probable draft tokens, and log q of these tokens.

        Args:
            number: Number of tokens; all if there are fewer.

        Returns:
            [n, number] each, by falling p.
        """
        top = self.log_p.topk(min(number, self.log_p.shape[-1]), dim=-1)
        return top.values.exp(), self.log_q.gather(-1, top.indices)

    @property
    def top(self) -> Tensor:
        """The draft's most probable token, int64 [n]."""
        return first_maximum(self.log_q)


def forward_kl(rows: PairSums) -> Tensor:
    """Forward Kullback-Leibler divergence over the draft vocabulary."""
    return rows.forward_kl


def reverse_kl(rows: PairSums) -> Tensor:
    """Reverse Kullback-Leibler divergence over the draft vocabulary."""
    return rows.reverse_kl


def cross_entropy(rows: PairSums) -> Tensor:
    """Soft cross-entropy over the draft vocabulary (arXiv 2503.01840)."""
    return rows.cross_entropy


def text_cross_entropy(rows: PairSums) -> Tensor:
    """Cross-entropy with the text itself, -log q(y); 0 if the text's token y is not a draft token.

    The published loss of independent heads (arXiv 2404.19124, 2401.10774); it does not use the verifier.
    """
    assert rows.text is not None
    return -rows.log_q_text.masked_fill(rows.text < 0, 0)


def argmax_cross_entropy(rows: PairSums) -> Tensor:
    """Cross-entropy with the verifier's most probable draft token, -log q(argmax p)."""
    return -rows.log_q_best


def total_variation(rows: PairSums) -> Tensor:
    """Probability of rejection, 1 - sum_v min(p, q): total variation with the verifier's full distribution."""
    return 1 - rows.acceptance


def jensen_shannon(rows: PairSums) -> Tensor:
    """Jensen-Shannon divergence over the draft vocabulary."""
    return rows.jensen_shannon


def lk_alpha(rows: PairSums) -> Tensor:
    """Minus the logarithm of the acceptance probability (LK-alpha, arXiv 2602.23881)."""
    return -rows.log_acceptance


def lk_lambda(rows: PairSums) -> Tensor:
    """Forward KL fading into the probability of rejection (LK-lambda, arXiv 2602.23881).

    w KL(p || q) + (1 - w) (1 - a), with w = exp(-3 A) and A the mean acceptance of the step, without a gradient.
    """
    assert rows.mean_acceptance is not None
    weight = torch.exp(-LK_DECAY * rows.mean_acceptance)
    return weight * forward_kl(rows) + (1 - weight) * total_variation(rows)
