"""The loss of a chunk by kernels: sums over the vocabulary, then the gradient in place of the logits.

A loss of closed form is a function of few numbers for each pair. Their derivatives come from autograd, and what the
numbers themselves contribute to the logits' gradient is in the kernel, so that the distributions are never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from specforge.training.losses.chunks import for_accelerator
from specforge.training.losses.comparison import Term
from specforge.training.losses.kernel import pair_gradient_, pair_sums
from specforge.training.losses.targets import FusedTarget
from specforge.training.losses.weightings import ChainWeighting

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not_fused(
    device: torch.device, dtype: torch.dtype, terms: Sequence[Term], weighting: ChainWeighting | None
) -> str | None:
    """Return why the loss is computed by operations of torch; None if by kernels.

    Args:
        device: Device of the draft's states.
        dtype: Dtype of the logits.
        terms: The terms of the objective.
        weighting: The weighting along the chain.
    """
    if device.type != "cuda" and not for_accelerator.get():
        return f"there is no kernel for the device {device.type}"
    if not for_accelerator.get() and not _has_triton():
        return "Triton is not installed"
    if dtype not in DTYPES:
        return f"there is no kernel for {dtype}"
    if others := [term.name for term in terms if not term.closed_form]:
        return f"{', '.join(others)} has no closed form"
    return "the weighting has no closed form" if weighting is not None and not weighting.closed_form else None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@dataclass(frozen=True)
class FusedSums:
    """``PairSums`` of M pairs by a kernel; the first seven, and log q of the most probable tokens, are leaves."""

    forward_kl: Tensor
    cross_entropy: Tensor
    reverse_kl: Tensor
    jensen_shannon: Tensor
    log_acceptance: Tensor
    log_q_text: Tensor
    log_q_best: Tensor
    most_probable: Callable[[int], tuple[Tensor, Tensor]]
    top: Tensor
    mean_acceptance: Tensor | None
    text: Tensor | None
    verifier_top: Tensor

    @property
    def acceptance(self) -> Tensor:
        """Probability that a sampled draft token is accepted, [M]."""
        return self.log_acceptance.exp()

    @property
    def leaves(self) -> list[Tensor]:
        """What the loss depends on."""
        every = (self.forward_kl, self.cross_entropy, self.reverse_kl, self.jensen_shannon, self.log_acceptance)
        return [*every, self.log_q_text, self.log_q_best]


class FusedPairs:
    """Pairs of a draft's logits and targets, compared by kernels.

    Args:
        logits: The draft's, [M, D]; ``differentiate`` overwrites them.
        target: The verifier's distributions, R of them.
        target_of: Index of each pair's target, int64 [M].
        text: See ``Distributions``, int64 [M].
        mean_acceptance: See ``Distributions``, [M].

    Attributes:
        sums: What losses read.
    """

    def __init__(
        self,
        logits: Tensor,
        target: FusedTarget,
        target_of: Tensor,
        text: Tensor | None = None,
        mean_acceptance: Tensor | None = None,
    ) -> None:
        self._given = logits, target.logits, target.normaliser, target.of_draft, target_of
        self._found, top = pair_sums(*self._given)
        best = target.best[target_of]
        self._tokens = torch.stack([torch.full_like(best, -1) if text is None else text, best])
        log_q = logits.gather(1, self._tokens.clamp(min=0).T).T - self._found[0]
        leaves = [one.detach().requires_grad_(torch.is_grad_enabled()) for one in (*self._found[1:6], *log_q)]
        self._further = _FurtherTokens(logits, self._found[0], target, target_of)
        others = self._further.most_probable, top, mean_acceptance, text, target.top[target_of]
        self.sums = FusedSums(*leaves, *others)  # type: ignore[call-arg]

    def differentiate(self, loss: Tensor) -> None:
        """Replace the logits by the gradient of a loss of the sums."""
        leaves, further = self.sums.leaves, self._further
        found = torch.autograd.grad(loss, [*leaves, *further.leaves], allow_unused=True)
        used = [one is not None for one in found[: len(leaves)]]
        none = torch.zeros_like(self._found[0])
        forward, cross, *others = (none if one is None else one for one in found[: len(leaves)])
        # KL(p || q) and the cross-entropy differ by the entropy of p.
        tokens, factors = self._tokens, torch.stack([forward + cross, *others])
        if further.leaves:
            tokens = torch.cat([tokens, *further.tokens])
            both = zip(found[len(leaves) :], further.leaves, strict=True)
            of_further = [torch.zeros_like(leaf) if one is None else one for one, leaf in both]
            factors = torch.cat([factors, *of_further])
        pair_gradient_(*self._given, self._found, tokens, factors, [used[0] or used[1], *used[2:]])


class _FurtherTokens:
    """Tokens whose log-probabilities are further leaves of the loss's graph.

    It is not part of ``FusedPairs``: a cycle of references would keep the logits beyond their chunk.

    Args:
        logits: The draft's, [M, D].
        log_sums: Their log-sum-exps, [M].
        target: The verifier's distributions, R of them.
        target_of: Index of each pair's target, int64 [M].

    Attributes:
        tokens: Those of each call, int64 [number, M].
        leaves: Their log-probabilities, [number, M].
    """

    def __init__(self, logits: Tensor, log_sums: Tensor, target: FusedTarget, target_of: Tensor) -> None:
        self._logits, self._log_sums, self._target, self._target_of = logits, log_sums, target, target_of
        self.tokens: list[Tensor] = []
        self.leaves: list[Tensor] = []

    def most_probable(self, number: int) -> tuple[Tensor, Tensor]:
        """See ``PairSums.most_probable``."""
        tokens, probabilities = (one[self._target_of] for one in self._target.most_probable(number))
        log_q = self._logits.gather(1, tokens).T - self._log_sums
        self.tokens.append(tokens.T)
        self.leaves.append(log_q.detach().requires_grad_(torch.is_grad_enabled()))
        return probabilities, self.leaves[-1].T
