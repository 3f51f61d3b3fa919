"""Statistical test of whether responses were sampled from this verifier."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specforge.verifier.features import capture
from specforge.verifier.parts import VerifierParts

# Positions whose logits are in memory at once.
_CHUNK = 128
# Nats per token by which an engine's numerics (another dtype, other kernels) may differ.
_TOLERANCE = 0.1
_STANDARD_ERRORS = 4.0


@dataclass(frozen=True)
class PolicyCheck:
    """Log-probabilities of responses under a verifier.

    Attributes:
        rows: Number of rows.
        tokens: Number of response tokens.
        log_prob: Mean log-probability of a response token, in nats.
        expected: Expected ``log_prob`` of tokens that the verifier samples itself at the same positions.
        standard_error: Standard error of ``log_prob`` for tokens that the verifier samples itself.
    """

    rows: int
    tokens: int
    log_prob: float
    expected: float
    standard_error: float

    @property
    def limit(self) -> float:
        """Lowest ``log_prob`` of the verifier's own responses: four standard errors and 0.1 nats below ``expected``."""
        return self.expected - _STANDARD_ERRORS * self.standard_error - _TOLERANCE

    @property
    def is_own(self) -> bool:
        """Whether the verifier may have written the responses."""
        return self.log_prob >= self.limit


@torch.no_grad()
def check_policy(verifier: PreTrainedModel, rows: Iterable[tuple[Tensor, Tensor, float]]) -> PolicyCheck | None:
    """Compare responses with what the verifier itself would sample at the same positions.

    Let p_t be the verifier's distribution at the temperature, given the text before position t. For a token x_t drawn
    from p_t, log p_t(x_t) has mean -H(p_t) and variance sum_x p_t(x) log^2 p_t(x) - H(p_t)^2. The differences
    log p_t(x_t) + H(p_t) have mean 0 given the past (they form a martingale difference sequence), so the variance of
    their sum is the sum of the variances, and the sum is nearly normal. Top-k and top-p exclude improbable tokens,
    which only raises the mean. Greedy text is compared with log max p_t, which it attains at every position. Text of
    another origin is less probable by a large fraction of a nat per token.

    Args:
        verifier: The verifier.
        rows: ``input_ids`` int64 [T], ``loss_mask`` bool [T] and the sampling temperature of the response (0 for
            greedy) of each row.

    Returns:
        The means; None if there is no response token with a token before it.
    """
    parts = VerifierParts.of(verifier)
    number, totals = 0, torch.zeros(4, dtype=torch.double)
    for input_ids, loss_mask, temperature in rows:
        number += 1
        ids = input_ids.to(verifier.device)
        positions = loss_mask[1:].nonzero().squeeze(1).to(verifier.device)
        last = capture(verifier, ids[None], torch.arange(len(ids), device=ids.device)[None], []).last[0]
        for chunk in positions.split(_CHUNK):
            totals += _sums(parts.logits(last[chunk]), ids[chunk + 1], temperature)
    tokens, log_prob, expected, variance = totals.tolist()
    if not tokens:
        return None
    return PolicyCheck(number, int(tokens), log_prob / tokens, expected / tokens, variance**0.5 / tokens)


def _sums(logits: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    """Return count, log-probabilities, their means and variances, summed over positions, double [4]."""
    log_p = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    own = log_p.gather(1, chosen[:, None]).squeeze(1)
    if temperature:
        p = log_p.exp()
        finite = log_p.clamp(min=-1e4)  # avoids 0 times infinity for excluded tokens
        expected = (p * finite).sum(1)
        variance = (p * finite.square()).sum(1) - expected.square()
    else:
        expected = log_p.max(1).values
        variance = torch.zeros_like(expected)
    return torch.stack([torch.ones_like(own), own, expected, variance]).cpu().double().sum(1)
