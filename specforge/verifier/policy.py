"""Whether a verifier wrote some text itself: how probable it finds the text, and how probable its own would be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specforge.verifier.features import capture
from specforge.verifier.parts import VerifierParts

# Positions whose logits are held at a time.
_CHUNK = 128
# Nats a token by which numerics of an engine, in another type or kernel, may differ.
_TOLERANCE = 0.1
_STANDARD_ERRORS = 4.0


@dataclass(frozen=True)
class PolicyCheck:
    """How some responses look to a verifier.

    Attributes:
        rows: Rows that were read.
        tokens: Response tokens in them.
        log_prob: Mean log-probability of a response token, in nats.
        expected: What it would be, in the mean, for tokens that the verifier chose itself at the same places.
        standard_error: Of ``log_prob``, if the verifier had chosen the tokens.
    """

    rows: int
    tokens: int
    log_prob: float
    expected: float
    standard_error: float

    @property
    def limit(self) -> float:
        """Below this, the responses are not the verifier's own: four standard errors and 0.1 nats under the mean."""
        return self.expected - _STANDARD_ERRORS * self.standard_error - _TOLERANCE

    @property
    def is_own(self) -> bool:
        """Whether the verifier may have written the responses."""
        return self.log_prob >= self.limit


@torch.no_grad()
def check_policy(verifier: PreTrainedModel, rows: Iterable[tuple[Tensor, Tensor, float]]) -> PolicyCheck | None:
    """Compare responses with what a verifier would have written at the same places.

    Let p_t be the verifier's distribution at the temperature, after the text before. Of a token x_t that is drawn from
    p_t, log p_t(x_t) has the mean -H(p_t) and the variance sum_x p_t(x) log^2 p_t(x) - H(p_t)^2. The differences
    log p_t(x_t) + H(p_t) have the mean 0 whatever came before (they are a martingale), so their sum over a text has the
    sum of the variances, and is nearly normal. Top-k and top-p leave out what is improbable, which only raises the
    mean. Greedy text is compared with log max p_t, which it has at every place. Text of another hand is less probable
    by a large part of a nat a token.

    Args:
        verifier: The verifier.
        rows: ``input_ids`` int64 [T] and ``loss_mask`` bool [T] of each row, and the temperature at which its response
            was drawn, 0 for a greedy one.

    Returns:
        The means; None where no response token has anything before it.
    """
    parts = VerifierParts.of(verifier)
    number, totals = 0, torch.zeros(4, dtype=torch.double)
    for input_ids, loss_mask, temperature in rows:
        number += 1
        ids = input_ids.to(verifier.device)
        places = loss_mask[1:].nonzero().squeeze(1).to(verifier.device)
        last = capture(verifier, ids[None], torch.arange(len(ids), device=ids.device)[None], []).last[0]
        for chunk in places.split(_CHUNK):
            totals += _sums(parts.logits(last[chunk]), ids[chunk + 1], temperature)
    tokens, log_prob, expected, variance = totals.tolist()
    if not tokens:
        return None
    return PolicyCheck(number, int(tokens), log_prob / tokens, expected / tokens, variance**0.5 / tokens)


def _sums(logits: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    """Return number, log-probabilities, their means and variances, summed over places; double [4]."""
    log_p = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    own = log_p.gather(1, chosen[:, None]).squeeze(1)
    if temperature:
        p = log_p.exp()
        finite = log_p.clamp(min=-1e4)  # a token that is ruled out counts 0 times infinity
        expected = (p * finite).sum(1)
        variance = (p * finite.square()).sum(1) - expected.square()
    else:
        expected = log_p.max(1).values
        variance = torch.zeros_like(expected)
    return torch.stack([torch.ones_like(own), own, expected, variance]).cpu().double().sum(1)
