"""From hidden states and heads to losses, acceptance and gradients, in chunks of rows.

Neither the draft's logits nor the verifier's are ever stored for more than one chunk. The verifier's distribution of
a target is formed once and serves every step that is trained towards it. Gradients are formed in the forward pass,
chunk by chunk, so that the backward pass only scales them.

Letters in shapes: S steps, N rows (a flattened batch), P pairs of row and step that the draft ran, M pairs that count,
H width, V verifier and D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.decoding.recorded import acceptance_of_drawn, draft_places, label_log_probs
from specforge.models.draft_rows import DraftRows
from specforge.sampling import Sampling
from specforge.training.objectives import Distributions, acceptance
from specforge.training.totals import total
from specforge.verifier.parts import VerifierParts

# Logits of one chunk, draft and verifier together: 64 MiB in float32.
LOGITS_PER_CHUNK = 2**24


@dataclass(frozen=True)
class Term:
    """One summand of the objective.

    Attributes:
        name: The objective's name.
        weight: Its factor.
        function: Maps ``Distributions`` of n rows to n values.
        uses_mean_acceptance: Whether it reads ``Distributions.mean_acceptance``.
        uses_text: Whether it reads ``Distributions.text``.
    """

    name: str
    weight: float
    function: Callable[[Distributions], Tensor]
    uses_mean_acceptance: bool = False
    uses_text: bool = False


@dataclass(frozen=True)
class Teacher:
    """The verifier's side.

    Attributes:
        last: Its states before the final norm, [N, H].
        parts: Its norm and head.
        draft_ids: The verifier's ids of the D draft tokens, int64 [D]; None where the vocabularies are the same.
    """

    last: Tensor
    parts: VerifierParts
    draft_ids: Tensor | None


@dataclass(frozen=True)
class Labels:
    """What the text goes on with, to be trained on or to replay decoding on (see ``specforge.decoding.replay``).

    Attributes:
        tokens: The token that each row and step drafts, the verifier's id, int64 [S, N].
        sampling: How the verifier chose the text's tokens.
    """

    tokens: Tensor
    sampling: Sampling


@dataclass(frozen=True)
class DraftSteps:
    """What a draft did at every step and row; every metric follows from it.

    Attributes:
        loss: The weighted loss, a scalar with gradient.
        terms: For each objective, the sum over supervised rows at each step, [S].
        supervised: Which rows count, bool [S, N].
        acceptance: Probability that a sampled draft token is accepted, [S, N]; 0 where not supervised.
        agreement: Whether the most probable tokens of draft and verifier agree, [S, N]; 0 where not supervised.
        matches: Whether the draft's most probable token is the text's, [S, N]; 0 where not supervised or no labels.
        drawn: Probability that a token drawn by the draft is accepted, seen from the text's, [S, N]; 0 likewise.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    supervised: Tensor
    acceptance: Tensor
    agreement: Tensor
    matches: Tensor
    drawn: Tensor


def distill(
    hidden: Tensor,
    head: Tensor | Sequence[Tensor],
    teacher: Teacher,
    targets: Tensor,
    supervised: Tensor,
    terms: list[Term],
    step_weights: Tensor,
    skip_targets_outside: bool = False,
    labels: Labels | None = None,
    finish: Callable[[Tensor], Tensor] = lambda logits: logits,
    rows: DraftRows | None = None,
) -> DraftSteps:
    """Compare a draft's steps with the verifier.

    Args:
        hidden: What the draft's head reads, [S, N, H]; with ``rows``, of those alone, [P, H].
        head: The draft's head, [D, H]; or one for each of the S steps.
        teacher: The verifier's side.
        targets: Row of ``teacher.last`` that each row and step is compared with, int64 [S, N].
        supervised: Which rows count, bool [S, N].
        terms: The summands of the objective.
        step_weights: Factor of each step's sum over rows, [S]: its decay over its denominator.
        skip_targets_outside: Leave out of the loss rows whose most probable verifier token is no draft token.
        labels: What the text goes on with; None where decoding is not replayed.
        finish: What is done to the draft's logits behind its head, where that head is the verifier's.
        rows: The rows that were run at each step, all that count among them; None where every row was.
    """
    if rows is None:
        hidden = hidden.flatten(0, 1)
        places = torch.arange(len(hidden), device=hidden.device).view_as(supervised)
    else:
        places = rows.places()
    step_weights = step_weights.to(hidden.device)
    work = _Work(teacher, places, targets, supervised, terms, step_weights, skip_targets_outside, labels, finish)
    heads = [head] if isinstance(head, Tensor) else list(head)
    if not torch.is_grad_enabled():
        # Without this, a head that is trained would ask for its gradient in validation too.
        hidden, heads = hidden.detach(), [one.detach() for one in heads]
    loss, sums, *by_row = _Distill.apply(hidden, work, *heads)
    names = [term.name for term in terms]
    return DraftSteps(loss, dict(zip(names, sums, strict=True)), supervised, *by_row)


@dataclass(frozen=True)
class _Work:
    teacher: Teacher
    places: Tensor
    targets: Tensor
    supervised: Tensor
    terms: list[Term]
    step_weights: Tensor
    skip_targets_outside: bool
    labels: Labels | None
    finish: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Chunk:
    """Some targets and all pairs of step and row that are compared with them.

    Attributes:
        targets: Rows of the teacher, [R].
        steps: Step of each pair, [M].
        rows: Row of each pair, [M].
        places: Where its state stands in what the draft's head reads, [M].
        target_of: Index of each pair's target within ``targets``, [M].
    """

    targets: Tensor
    steps: Tensor
    rows: Tensor
    places: Tensor
    target_of: Tensor


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, work: _Work, *heads: Tensor) -> tuple[Tensor, ...]:
        compute_type = _compute_type(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            run = _Run(hidden, heads, work, compute_type, ctx.needs_input_grad[0], ctx.needs_input_grad[2])
            for chunk in _chunks(work, heads[0].shape[0]):
                run.add(chunk)
        ctx.gradients = run.hidden_gradient, run.head_gradients
        others = run.sums, run.acceptance, run.agreement, run.matches, run.drawn
        ctx.mark_non_differentiable(*others)
        return run.loss, *others

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_heads = ctx.gradients
        return (
            None if of_hidden is None else of_hidden * scale.to(of_hidden.dtype),
            None,
            *(None if one is None else one * scale for one in of_heads),
        )


class _Run:
    """One pass over the chunks, and what it has summed up so far."""

    def __init__(
        self,
        hidden: Tensor,
        heads: Sequence[Tensor],
        work: _Work,
        compute_type: torch.dtype,
        train_hidden: bool,
        train_heads: bool,
    ) -> None:
        self.work = work
        self.hidden = hidden.detach()
        self.heads = [head.detach().to(compute_type).requires_grad_(train_heads) for head in heads]
        self.train_hidden = train_hidden
        shape = work.supervised.shape
        zeros = partial(torch.zeros, device=hidden.device, dtype=_wide_type(hidden.dtype))
        self.loss = zeros(())
        self.sums = zeros(len(work.terms), shape[0])
        self.acceptance = zeros(shape)
        self.agreement = zeros(shape)
        self.matches = zeros(shape)
        self.drawn = zeros(shape)
        self.hidden_gradient = torch.zeros_like(self.hidden) if train_hidden else None
        self.head_gradients = [zeros(head.shape) if train_heads else None for head in heads]
        self.mean_acceptance = self._mean_acceptance() if any(t.uses_mean_acceptance for t in work.terms) else None

    def add(self, chunk: _Chunk) -> None:
        """Add a chunk to the loss, the sums, the per-row results and the gradients."""
        states = self.hidden[chunk.places].to(self.heads[0].dtype).requires_grad_(self.train_hidden)
        with torch.set_grad_enabled(self.train_hidden or self.heads[0].requires_grad):
            target = _target(self.work.teacher, chunk)
            logits = self._logits(states, chunk)
            log_q = _log_softmax(logits)
            mean = None if self.mean_acceptance is None else self.mean_acceptance[chunk.steps]
            rows = Distributions(log_q, target.log_p, target.log_p_full, mean, self._text(chunk))
            loss = self._loss(rows, target, chunk)
        self.loss += loss.detach()
        self.acceptance[chunk.steps, chunk.rows] = acceptance(replace(rows, log_q=log_q.detach()))
        top = log_q.argmax(-1)
        self.agreement[chunk.steps, chunk.rows] = (top == target.top).to(self.agreement.dtype)
        if self.work.labels is not None:
            self._replay(self.work.labels, logits.detach(), top, chunk)
        self._accumulate(loss, states, chunk)

    def _logits(self, states: Tensor, chunk: _Chunk) -> Tensor:
        if len(self.heads) == 1:
            return self.work.finish(F.linear(states, self.heads[0]))
        # By step, so that each step's head reads one slice, and back again.
        order = chunk.steps.argsort(stable=True)
        counts = chunk.steps.bincount(minlength=len(self.heads)).tolist()
        by_step = [F.linear(some, head) for some, head in zip(states[order].split(counts), self.heads, strict=True)]
        return self.work.finish(torch.cat(by_step)[order.argsort()])

    def _text(self, chunk: _Chunk) -> Tensor | None:
        if self.work.labels is None:
            return None
        return draft_places(self.work.labels.tokens[chunk.steps, chunk.rows], self.work.teacher.draft_ids)

    def _replay(self, labels: Labels, logits: Tensor, top: Tensor, chunk: _Chunk) -> None:
        """Note whether the text's token would have been drafted, and how probable that was."""
        tokens = labels.tokens[chunk.steps, chunk.rows]
        places = draft_places(tokens, self.work.teacher.draft_ids)
        matches = (top == places).to(self.matches.dtype)
        self.matches[chunk.steps, chunk.rows] = matches
        if labels.sampling.is_greedy:
            self.drawn[chunk.steps, chunk.rows] = matches
            return
        of_verifier = _teacher_logits(self.work.teacher, chunk)
        # The token of a target is the same for all pairs of step and row that are compared with it.
        said = tokens.new_zeros(len(chunk.targets)).index_copy(0, chunk.target_of, tokens)
        log_p = label_log_probs(of_verifier, said, labels.sampling)[chunk.target_of]
        log_q = label_log_probs(logits, places, labels.sampling)
        self.drawn[chunk.steps, chunk.rows] = acceptance_of_drawn(log_q, log_p).to(self.drawn.dtype)

    def _loss(self, rows: Distributions, target: _Target, chunk: _Chunk) -> Tensor:
        weights = self.work.step_weights[chunk.steps]
        if self.work.skip_targets_outside:
            weights = weights * (target.top >= 0)
        loss = rows.log_q.new_zeros(())
        for number, term in enumerate(self.work.terms):
            values = term.function(rows)
            self.sums[number].index_add_(0, chunk.steps, values.detach())
            loss = loss + term.weight * (weights * values).sum()
        return loss

    def _accumulate(self, loss: Tensor, states: Tensor, chunk: _Chunk) -> None:
        inputs = [one for one in (states, *self.heads) if one.requires_grad]
        if not inputs:
            return
        gradients = dict(zip(map(id, inputs), torch.autograd.grad(loss, inputs), strict=True))
        if self.hidden_gradient is not None:
            self.hidden_gradient[chunk.places] = gradients[id(states)].to(self.hidden_gradient.dtype)
        for gradient, head in zip(self.head_gradients, self.heads, strict=True):
            if gradient is not None:
                gradient += gradients[id(head)]

    def _mean_acceptance(self) -> Tensor:
        """Mean acceptance of each step over the batches of all processes, [S], by a pass without gradients."""
        sums = torch.zeros_like(self.sums[0])
        for chunk in _chunks(self.work, self.heads[0].shape[0]):
            target = _target(self.work.teacher, chunk)
            states = self.hidden[chunk.places].to(self.heads[0].dtype)
            with torch.no_grad():
                log_q = _log_softmax(self._logits(states, chunk))
            sums.index_add_(0, chunk.steps, acceptance(Distributions(log_q, target.log_p, target.log_p_full)))
        return total(sums) / total(self.work.supervised.sum(1)).clamp(min=1)


@dataclass(frozen=True)
class _Target:
    """The verifier's distributions for the M pairs of a chunk.

    Attributes:
        log_p: Normalised over the draft vocabulary, [M, D].
        log_p_full: Normalised over the whole vocabulary, at the draft tokens, [M, D].
        top: Draft id of the most probable verifier token, [M]; -1 where it is no draft token.
    """

    log_p: Tensor
    log_p_full: Tensor
    top: Tensor


def _teacher_logits(teacher: Teacher, chunk: _Chunk) -> Tensor:
    return teacher.parts.logits(teacher.last[chunk.targets])


@torch.no_grad()
def _target(teacher: Teacher, chunk: _Chunk) -> _Target:
    logits = _teacher_logits(teacher, chunk)
    log_p_full = _log_softmax(logits)
    top = logits.argmax(-1)
    if teacher.draft_ids is None:
        log_p_full = log_p_full[chunk.target_of]
        return _Target(log_p_full, log_p_full, top[chunk.target_of])
    log_p_full = log_p_full[:, teacher.draft_ids]
    log_p = log_p_full.log_softmax(-1)
    top = draft_places(top, teacher.draft_ids)
    return _Target(log_p[chunk.target_of], log_p_full[chunk.target_of], top[chunk.target_of])


def _chunks(work: _Work, draft_size: int) -> Iterator[_Chunk]:
    """Split the supervised pairs by target, so that each target's distribution is formed once."""
    steps, rows = work.supervised.nonzero(as_tuple=True)
    targets, target_of = work.targets[steps, rows].unique(return_inverse=True)
    order = target_of.argsort(stable=True)
    steps, rows, target_of = steps[order], rows[order], target_of[order]
    places = work.places[steps, rows]
    verifier_size = work.teacher.parts.lm_head.weight.shape[0]
    size = max(1, LOGITS_PER_CHUNK // (verifier_size + work.supervised.shape[0] * draft_size))
    begins = torch.arange(0, targets.numel() + size, size, device=targets.device)
    bounds = torch.searchsorted(target_of, begins).tolist()
    for number, (begin, end) in enumerate(pairwise(bounds)):
        first = number * size
        own = slice(begin, end)
        yield _Chunk(targets[first : first + size], steps[own], rows[own], places[own], target_of[own] - first)


def _compute_type(hidden: Tensor) -> torch.dtype:
    """Return the type of the matrix products: autocast's where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _wide_type(dtype: torch.dtype) -> torch.dtype:
    """Return at least float32: short types are for matrix products alone."""
    return torch.promote_types(dtype, torch.float32)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(_wide_type(logits.dtype)).log_softmax(-1)
