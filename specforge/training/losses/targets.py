"""The verifier's distributions at the R targets of a chunk.

Letters in shapes: V verifier and D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from specforge.decoding.recorded import draft_indices
from specforge.training.losses.chunks import blocks
from specforge.training.losses.comparison import log_softmax, wide_type
from specforge.training.losses.kernel import row_statistics
from specforge.training.losses.maximum import first_maximum


@dataclass(frozen=True)
class Target:
    """What both ways of computing losses read.

    Attributes:
        top: Draft id of the most probable verifier token, [R]; -1 if it is not a draft token.
        log_p_text: Log-probability of the text's token under its sampling, [R]; None if the text was not sampled or
            there are no labels.
    """

    top: Tensor
    log_p_text: Tensor | None


@dataclass(frozen=True)
class PlainTarget(Target):
    """Log-probabilities, for operations of torch.

    Attributes:
        log_p: Over the draft vocabulary, [R, D].
        log_p_full: Over the whole vocabulary, at the draft tokens, [R, D]; the same tensor if the vocabularies are the
            same.
    """

    log_p: Tensor
    log_p_full: Tensor

    @classmethod
    def of(cls, logits: Tensor, draft_ids: Tensor | None, log_p_text: Tensor | None) -> PlainTarget:
        """Normalise the verifier's logits [R, V]; the draft tokens are those of ``draft_ids``, or all."""
        top = first_maximum(logits)
        if draft_ids is None:
            log_p = log_softmax(logits)
            return cls(top, log_p_text, log_p, log_p)
        wide = wide_type(logits.dtype)
        normaliser = torch.cat([logits[block].to(wide).logsumexp(-1) for block in blocks(logits)])
        log_p_full = logits.index_select(1, draft_ids).to(wide) - normaliser[:, None]
        return cls(draft_indices(top, draft_ids), log_p_text, log_p_full.log_softmax(-1), log_p_full)


@dataclass(frozen=True)
class FusedTarget(Target):
    """Logits and their normalisers, for kernels.

    Attributes:
        logits: At the draft tokens, [R, D].
        normaliser: Log-sum-exp over the whole vocabulary, float32 [R].
        of_draft: Log-sum-exp over the draft vocabulary, float32 [R]; the same tensor if the vocabularies are the same.
        best: The most probable draft token, int64 [R].
    """

    logits: Tensor
    normaliser: Tensor
    of_draft: Tensor
    best: Tensor

    @classmethod
    def of(cls, logits: Tensor, draft_ids: Tensor | None, log_p_text: Tensor | None) -> FusedTarget:
        """Pick the draft tokens of the verifier's logits [R, V]: those of ``draft_ids``, or all."""
        normaliser, top = row_statistics(logits)
        if draft_ids is None:
            return cls(top, log_p_text, logits, normaliser, normaliser, top)
        own = logits.index_select(1, draft_ids)
        return cls(draft_indices(top, draft_ids), log_p_text, own, normaliser, *row_statistics(own))

    def most_probable(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the most probable draft tokens, int64 [R, number], and their probabilities, float32 [R, number]."""
        found = self.logits.topk(min(number, self.logits.shape[1]), dim=1)
        return found.indices, (found.values.float() - self.of_draft[:, None]).exp()


AnyTarget = TypeVar("AnyTarget", bound=Target)


def tail(target: AnyTarget, number: int) -> AnyTarget:
    """Copy the last targets, so that the others can be freed."""
    return _combined(lambda one: one[0][-number:].clone(), target)


def joined(*targets: AnyTarget) -> AnyTarget:
    """Concatenate targets."""
    return _combined(torch.cat, *targets)


def _combined(function: Callable[[list[Tensor]], Tensor], *targets: AnyTarget) -> AnyTarget:
    """Combine targets tensor by tensor; shared tensors stay shared."""
    made: dict[int, Tensor] = {}
    values = []
    for field in fields(targets[0]):
        own = [getattr(one, field.name) for one in targets]
        if own[0] is not None and id(own[0]) not in made:
            made[id(own[0])] = function(own)
        values.append(None if own[0] is None else made[id(own[0])])
    return type(targets[0])(*values)  # type: ignore[arg-type]  # only log_p_text may be None
