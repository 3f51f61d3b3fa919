"""Losses and metrics of a chunk of (draft, target) pairs, as pure tensor code that torch.compile can fuse.

Eager execution makes about fifteen passes over the logits, compiled code a few.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specforge.training.losses.objectives import Distributions


@dataclass(frozen=True)
class Term:
    """One term of the objective.

    Attributes:
        name: The objective's name.
        weight: Its factor.
        function: Maps ``Distributions`` of n rows to n values.
        uses_mean_acceptance: Whether it reads ``Distributions.mean_acceptance``.
        uses_text: Whether it reads ``Distributions.text``.
        closed_form: Whether it reads only ``PairSums``.
    """

    name: str
    weight: float
    function: Callable[[Any], Tensor]
    uses_mean_acceptance: bool = False
    uses_text: bool = False
    closed_form: bool = False


class PairResults(NamedTuple):
    """Results for m pairs.

    Attributes:
        loss: The weighted sum of all terms, a scalar with gradient.
        values: Each term's value for each pair, [terms, m].
        acceptance: Probability that a sampled draft token is accepted, [m].
        top: The most probable draft token, int64 [m].
    """

    loss: Tensor
    values: Tensor
    acceptance: Tensor
    top: Tensor


def compare(
    logits: Tensor,
    log_p: Tensor,
    log_p_full: Tensor,
    top: Tensor,
    target_of: Tensor,
    weights: Tensor,
    terms: Sequence[Term],
    finish: Callable[[Tensor], Tensor],
    mean_acceptance: Tensor | None = None,
    text: Tensor | None = None,
) -> PairResults:
    """Compare m pairs of a draft's logits and a target, one of R.

    Args:
        logits: The draft's, [m, D].
        log_p: The verifier's at each target, normalised over the draft vocabulary, [R, D].
        log_p_full: The same over its whole vocabulary, [R, D]; the same tensor if the vocabularies are the same.
        top: See ``Distributions.verifier_top``, int64 [R].
        target_of: Index of each pair's target, int64 [m].
        weights: Factor of each pair in the loss, [m].
        terms: The terms of the objective.
        finish: Function applied to the logits first.
        mean_acceptance: See ``Distributions``, [m].
        text: See ``Distributions``, int64 [m].
    """
    log_q = log_softmax(finish(logits))
    rows = Distributions(log_q, *gathered(log_p, log_p_full, target_of), mean_acceptance, text, top[target_of])
    loss, values = weighted(terms, rows, weights)
    return PairResults(loss, values, replace(rows, log_q=log_q.detach()).acceptance, rows.top)


def weighted(terms: Sequence[Term], rows: Any, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of all terms, with gradient, and each term's values, [terms, m].

    Args:
        terms: The terms of the objective.
        rows: What their functions read.
        weights: Factor of each pair in the loss, [m].
    """
    loss = weights.new_zeros(())
    values = []
    for term in terms:
        values.append(term.function(rows))
        loss = loss + term.weight * (weights * values[-1]).sum()
    return loss, torch.stack(values).detach()


@functools.cache
def compiled_compare() -> Callable[..., PairResults]:
    """Return ``compare`` compiled, for any number of pairs and targets."""
    return torch.compile(compare, dynamic=True)


def gathered(log_p: Tensor, log_p_full: Tensor, target_of: Tensor) -> tuple[Tensor, Tensor]:
    """Gather two tensors of R targets, [R, D], for m pairs, [m, D]; only once if they are the same tensor."""
    of_pairs = log_p.index_select(0, target_of)  # rows are copied whole; indexing takes several times as long
    return of_pairs, of_pairs if log_p_full is log_p else log_p_full.index_select(0, target_of)


def log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities in at least float32."""
    return logits.to(wide_type(logits.dtype)).log_softmax(-1)


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """Return at least float32: shorter dtypes are only for matrix products."""
    return torch.promote_types(dtype, torch.float32)
