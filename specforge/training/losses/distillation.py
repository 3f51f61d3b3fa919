"""From hidden states and heads to losses, acceptance and gradients, in chunks of rows.

Neither the draft's logits nor the verifier's are ever stored for more than one chunk. The verifier's distribution of
a target is formed once and serves every step that is trained towards it. Gradients are formed in the forward pass,
chunk by chunk and in the place of the logits, so that the backward pass only scales them.

Letters in shapes: S steps, N rows (a flattened batch), P pairs of row and step that the draft ran, M pairs that count,
H width, V verifier and D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specforge.decoding.recorded import acceptance_of_drawn, draft_indices, label_log_probs
from specforge.models.speculator import unchanged
from specforge.moving import moved
from specforge.sampling import Sampling
from specforge.training.losses.chunks import Chunk, blocks, chunks
from specforge.training.losses.comparison import (
    Compared,
    Term,
    compare,
    compiled_compare,
    gathered,
    log_softmax,
    wide_type,
)
from specforge.training.losses.objectives import Distributions, acceptance
from specforge.training.losses.weightings import ChainWeighting
from specforge.training.totals import total
from specforge.verifier.parts import VerifierParts


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
        tokens: The token behind each row, which the verifier's state of that row predicts; its id, int64 [N].
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
        candidates: The draft's most probable tokens at each pair that was run, int64 [P, K]; none if not asked for.
        verifier_tops: The verifier's most probable token there, as a draft id, int64 [P]; -1 where it is none.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    supervised: Tensor
    acceptance: Tensor
    agreement: Tensor
    matches: Tensor
    drawn: Tensor
    candidates: Tensor | None = None
    verifier_tops: Tensor | None = None


def distill(
    hidden: Tensor,
    head: Tensor | Sequence[Tensor],
    teacher: Teacher,
    targets: Tensor,
    supervised: Tensor,
    terms: list[Term],
    weights: Tensor,
    labels: Labels | None = None,
    finish: Callable[[Tensor], Tensor] = unchanged,
    places: Tensor | None = None,
    compiled: bool = False,
    weighting: ChainWeighting | None = None,
    further_head: Tensor | None = None,
    candidates: int = 0,
) -> DraftSteps:
    """Compare a draft's steps with the verifier.

    Args:
        hidden: What the draft's head reads, [S, N, H]; with ``places``, of the pairs that were run, [P, H]. With a
            ``further_head``, R more columns.
        head: The draft's head, [D, H]; or one for each of the S steps.
        teacher: The verifier's side.
        targets: Row of ``teacher.last`` that each row and step is compared with, int64 [S, N], on the CPU.
        supervised: Which rows count, bool [S, N], on the CPU.
        terms: The summands of the objective.
        weights: Factor of each row and step in the loss, [S, N].
        labels: What the text goes on with; None where decoding is not replayed.
        finish: What is done to the draft's logits after its head.
        places: Index in ``hidden`` of each row's and step's state, int64 [S, N], on the CPU; None where every pair
            has one.
        compiled: Whether torch.compile fuses what is done with the logits; takes a while at the first call.
        weighting: A further factor of each pair, which depends on its whole chain; None for none.
        further_head: Reads the last R columns of ``hidden``, [D, R]; what it says is added to the head's logits. It
            spares a head that is not trained the gradient that one matrix of both would form.
        candidates: Number K of the draft's most probable tokens that are returned for each pair.
    """
    if places is None:
        hidden = hidden.flatten(0, 1)
        places = torch.arange(len(hidden)).view_as(supervised)
    heads = [head] if isinstance(head, Tensor) else list(head)
    verifier_size = teacher.parts.lm_head.weight.shape[0]
    work = _Work(
        teacher,
        chunks(supervised, targets, places, verifier_size, len(heads[0]), hidden.device),
        moved(supervised, hidden.device),
        *(terms, weights, labels, finish),
        weighting=weighting,
        candidates=candidates,
        compare=compiled_compare() if compiled else compare,
    )
    if not torch.is_grad_enabled():
        # Without this, a head that is trained would ask for its gradient in validation too.
        hidden, heads = hidden.detach(), [one.detach() for one in heads]
        further_head = None if further_head is None else further_head.detach()
    loss, sums, *by_row = _Distill.apply(hidden, work, further_head, *heads)
    names = [term.name for term in terms]
    return DraftSteps(loss, dict(zip(names, sums, strict=True)), work.supervised, *by_row)


@dataclass(frozen=True)
class _Work:
    teacher: Teacher
    chunks: list[Chunk]
    supervised: Tensor
    terms: list[Term]
    weights: Tensor
    labels: Labels | None
    finish: Callable[[Tensor], Tensor]
    weighting: ChainWeighting | None
    candidates: int
    compare: Callable[..., Compared]

    def compared(self) -> Iterator[tuple[Chunk, _Target]]:
        """Yield the chunks, and the verifier's distributions at their targets, each formed once."""
        target = None
        for chunk in self.chunks:
            target = _tail(target, chunk.shared) if target and chunk.shared else None
            fresh = self._target(chunk.targets[chunk.shared :])
            target = _combined(torch.cat, target, fresh) if target else fresh
            yield chunk, target

    def _target(self, rows: Tensor) -> _Target:
        """Form the verifier's distributions at some rows of its states."""
        draft_ids = self.teacher.draft_ids
        logits = self.teacher.parts.logits(self.teacher.last[rows])
        top, of_text = logits.argmax(-1), None
        if self.labels is not None and not self.labels.sampling.is_greedy:
            of_text = label_log_probs(logits, self.labels.tokens[rows], self.labels.sampling)
        if draft_ids is None:
            log_p = log_softmax(logits)
            return _Target(log_p, log_p, top, of_text)
        wide = wide_type(logits.dtype)
        normaliser = torch.cat([logits[block].to(wide).logsumexp(-1) for block in blocks(logits)])
        log_p_full = logits[:, draft_ids].to(wide) - normaliser[:, None]
        return _Target(log_p_full.log_softmax(-1), log_p_full, draft_indices(top, draft_ids), of_text)


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, work: _Work, further_head: Tensor | None, *heads: Tensor
    ) -> tuple[Tensor, ...]:
        compute_type = _compute_type(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            of_hidden, _, of_further, *of_heads = ctx.needs_input_grad
            run = _Run(hidden, heads, further_head, work, compute_type, of_hidden, of_heads[0], of_further)
            for chunk, target in work.compared():
                run.add(chunk, target)
        ctx.gradients = run.hidden_gradient, run.further_gradient, run.head_gradients
        others = run.sums, run.acceptance, run.agreement, run.matches, run.drawn, run.candidates, run.verifier_tops
        ctx.mark_non_differentiable(*others)
        return run.loss, *others

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_further, of_heads = ctx.gradients
        return (
            None if of_hidden is None else of_hidden * scale.to(of_hidden.dtype),
            None,
            None if of_further is None else of_further * scale,
            *(None if one is None else one * scale for one in of_heads),
        )


class _Run:
    """One pass over the chunks, and what it has summed up so far."""

    def __init__(
        self,
        hidden: Tensor,
        heads: Sequence[Tensor],
        further_head: Tensor | None,
        work: _Work,
        compute_type: torch.dtype,
        train_hidden: bool,
        train_heads: bool,
        train_further: bool,
    ) -> None:
        self.work = work
        self.hidden = hidden.detach()
        self.heads = [head.detach().to(compute_type) for head in heads]
        self.further_head = None if further_head is None else further_head.detach().to(compute_type)
        shape = work.supervised.shape
        zeros = partial(torch.zeros, device=hidden.device, dtype=wide_type(hidden.dtype))
        self.loss = zeros(())
        self.sums = zeros(len(work.terms), shape[0])
        self.acceptance = zeros(shape)
        self.agreement = zeros(shape)
        self.matches = zeros(shape)
        self.drawn = zeros(shape)
        self.candidates = torch.zeros(len(hidden), work.candidates, dtype=torch.int64, device=hidden.device)
        self.verifier_tops = torch.full((len(hidden),), -1, device=hidden.device)
        self.trains = train_hidden or train_heads or train_further
        self.hidden_gradient = torch.zeros_like(self.hidden) if train_hidden else None
        self.head_gradients = [zeros(head.shape) if train_heads else None for head in heads]
        self.further_gradient = zeros(further_head.shape) if further_head is not None and train_further else None
        self.mean_acceptance = self._mean_acceptance() if any(t.uses_mean_acceptance for t in work.terms) else None

    def add(self, chunk: Chunk, target: _Target) -> None:
        """Add a chunk to the loss, the sums, the per-row results and the gradients."""
        states = self.hidden[chunk.places].to(self.heads[0].dtype)
        logits = self._logits(states, chunk)
        weights = self._weights(logits, target, chunk)
        for block in blocks(logits):
            self._compare(logits[block], target, weights[block], chunk.part(block))
        if self.trains:
            self._accumulate(logits, states, chunk)

    def _logits(self, states: Tensor, chunk: Chunk) -> Tensor:
        """Compute what the draft's heads say of the pairs of a chunk, [M, D]."""
        logits = states.new_empty(len(states), len(self.heads[0]))
        width = self.heads[0].shape[1]
        for head, own in zip(self.heads, chunk.by_head(len(self.heads)), strict=True):
            torch.mm(states[own, :width], head.T, out=logits[own])
        if self.further_head is not None:
            logits.addmm_(states[:, width:], self.further_head.T)
        return logits

    def _weights(self, logits: Tensor, target: _Target, chunk: Chunk) -> Tensor:
        """Return the factor of each pair of a chunk in the loss, [M]."""
        weights = self.work.weights[chunk.steps, chunk.rows]
        if self.work.weighting is None:
            return weights
        statistic = self.work.weighting.statistic
        found = [statistic(self._distributions(logits[one], target, chunk.part(one))) for one in blocks(logits)]
        # By step and row of the chunk, so that each column is a chain.
        by_row = self.loss.new_zeros(len(self.work.supervised), chunk.size)
        by_row[chunk.steps, chunk.row_of] = torch.cat(found).to(by_row.dtype)
        counts = torch.zeros_like(by_row, dtype=torch.bool)
        counts[chunk.steps, chunk.row_of] = True
        return weights * self.work.weighting.function(by_row, counts)[chunk.steps, chunk.row_of]

    def _distributions(self, logits: Tensor, target: _Target, chunk: Chunk) -> Distributions:
        """Return the distributions of some pairs, without the mean acceptance."""
        log_q = log_softmax(self.work.finish(logits))
        of_targets = gathered(target.log_p, target.log_p_full, chunk.target_of)
        return Distributions(log_q, *of_targets, text=self._text(chunk), verifier_top=target.top[chunk.target_of])

    def _compare(self, logits: Tensor, target: _Target, weights: Tensor, chunk: Chunk) -> None:
        """Add some pairs of a chunk to all but the gradients; that of their logits [m, D] takes their place."""
        with torch.set_grad_enabled(self.trains):
            leaf = logits.detach().requires_grad_(self.trains)
            # All that is not kept for the gradient has gone when it is formed.
            found = self._judge(leaf, target, weights, chunk)
        self._note(found, logits, target, chunk)
        if self.trains:
            # No logit is read again.
            logits.copy_(torch.autograd.grad(found.loss, leaf)[0])

    def _judge(self, logits: Tensor, target: _Target, weights: Tensor, chunk: Chunk) -> Compared:
        """Compare some pairs with their targets."""
        mean = None if self.mean_acceptance is None else self.mean_acceptance[chunk.steps]
        targets = target.log_p, target.log_p_full, target.top, chunk.target_of
        return self.work.compare(logits, *targets, weights, self.work.terms, self.work.finish, mean, self._text(chunk))

    def _note(self, found: Compared, logits: Tensor, target: _Target, chunk: Chunk) -> None:
        """Add what came of some pairs to the loss, the sums and the per-row results."""
        self.loss += found.loss.detach()
        self.sums.index_add_(1, chunk.steps, found.values)
        self.acceptance[chunk.steps, chunk.rows] = found.acceptance
        self.agreement[chunk.steps, chunk.rows] = (found.top == target.top[chunk.target_of]).to(self.agreement.dtype)
        if self.work.candidates:
            self.candidates[chunk.places] = logits.topk(self.work.candidates).indices
            self.verifier_tops[chunk.places] = target.top[chunk.target_of]
        if self.work.labels is not None:
            self._replay(self.work.labels.sampling, self.work.finish(logits), found.top, target, chunk)

    def _text(self, chunk: Chunk) -> Tensor | None:
        if self.work.labels is None:
            return None
        tokens = self.work.labels.tokens[chunk.targets][chunk.target_of]
        return draft_indices(tokens, self.work.teacher.draft_ids)

    def _replay(self, sampling: Sampling, logits: Tensor, top: Tensor, target: _Target, chunk: Chunk) -> None:
        """Note whether the text's token would have been drafted, and how probable that was."""
        places = self._text(chunk)
        assert places is not None
        matches = (top == places).to(self.matches.dtype)
        self.matches[chunk.steps, chunk.rows] = matches
        if target.log_p_text is None:
            self.drawn[chunk.steps, chunk.rows] = matches
            return
        log_q = label_log_probs(logits, places, sampling)
        accepted = acceptance_of_drawn(log_q, target.log_p_text[chunk.target_of])
        self.drawn[chunk.steps, chunk.rows] = accepted.to(self.drawn.dtype)

    def _accumulate(self, of_logits: Tensor, states: Tensor, chunk: Chunk) -> None:
        """Add the gradients of the states and heads that a chunk's logits were made of."""
        width = self.heads[0].shape[1]
        for number, own in enumerate(chunk.by_head(len(self.heads))):
            if self.hidden_gradient is not None:
                of_states = of_logits[own] @ self.heads[number]
                self.hidden_gradient[chunk.places[own], :width] = of_states.to(self.hidden_gradient.dtype)
            _add_product(self.head_gradients[number], of_logits[own], states[own, :width])
        if self.further_head is not None:
            if self.hidden_gradient is not None:
                of_states = of_logits @ self.further_head
                self.hidden_gradient[chunk.places, width:] = of_states.to(self.hidden_gradient.dtype)
            _add_product(self.further_gradient, of_logits, states[:, width:])

    def _mean_acceptance(self) -> Tensor:
        """Mean acceptance of each step over the batches of all processes, [S], by a pass without gradients."""
        sums = torch.zeros_like(self.sums[0])
        for chunk, target in self.work.compared():
            logits = self._logits(self.hidden[chunk.places].to(self.heads[0].dtype), chunk)
            for block in blocks(logits):
                pairs = chunk.part(block)
                sums.index_add_(0, pairs.steps, acceptance(self._distributions(logits[block], target, pairs)))
        sums, counts = total(torch.stack([sums, self.work.supervised.sum(1).to(sums)]))
        return sums / counts.clamp(min=1)


@dataclass(frozen=True)
class _Target:
    """The verifier's distributions at the R targets of a chunk.

    Attributes:
        log_p: Normalised over the draft vocabulary, [R, D].
        log_p_full: Normalised over the whole vocabulary, at the draft tokens, [R, D]; the same tensor where the
            vocabularies are the same.
        top: Draft id of the most probable verifier token, [R]; -1 where it is no draft token.
        log_p_text: Log-probability of the text's token as it was sampled, [R]; None where it was not, or is not asked.
    """

    log_p: Tensor
    log_p_full: Tensor
    top: Tensor
    log_p_text: Tensor | None


def _add_product(gradient: Tensor | None, of_logits: Tensor, states: Tensor) -> None:
    """Add what logits [M, D] of states [M, H] come to in the gradient of their head, [D, H], if that is asked for."""
    if gradient is None:
        return
    if gradient.dtype == of_logits.dtype:
        gradient.addmm_(of_logits.T, states)
    else:
        gradient += of_logits.T @ states


def _tail(target: _Target, number: int) -> _Target:
    """Return copies of the last targets, so that the others can be freed."""
    return _combined(lambda one: one[0][-number:].clone(), target)


def _combined(function: Callable[[list[Tensor]], Tensor], *targets: _Target) -> _Target:
    """Combine targets tensor by tensor; those that are the same stay the same."""

    def of(name: str) -> Tensor:
        return function([getattr(one, name) for one in targets])

    first, log_p = targets[0], of("log_p")
    log_p_full = log_p if first.log_p_full is first.log_p else of("log_p_full")
    return _Target(log_p, log_p_full, of("top"), None if first.log_p_text is None else of("log_p_text"))


def _compute_type(hidden: Tensor) -> torch.dtype:
    """Return the type of the matrix products: autocast's where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
