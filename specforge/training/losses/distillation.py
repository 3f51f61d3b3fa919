"""From hidden states and heads to losses, acceptance and gradients, in chunks of rows.

Logits of draft and verifier are never stored for more than one chunk. The verifier's distribution of a target is
computed once and used by every step with this target. Gradients are computed in the forward pass, chunk by chunk, in
place of the logits; the backward pass only scales them.

Letters in shapes: S steps, N rows (a flattened batch), P pairs of row and step that the draft ran, M pairs that count,
H width, V verifier and D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specforge.decoding.recorded import acceptance_of_drawn, draft_indices, label_log_probs
from specforge.errors import SpecforgeError
from specforge.models.speculator import unchanged
from specforge.moving import moved
from specforge.precision import compute_type
from specforge.sampling import Sampling
from specforge.training.losses.chunks import Chunk, blocks, chunks
from specforge.training.losses.comparison import (
    PairResults,
    Term,
    compare,
    compiled_compare,
    gathered,
    log_softmax,
    weighted,
    wide_type,
)
from specforge.training.losses.fused import FusedPairs, why_not_fused
from specforge.training.losses.objectives import Distributions, PairSums
from specforge.training.losses.targets import FusedTarget, PlainTarget, Target, joined, tail
from specforge.training.losses.weightings import ChainWeighting
from specforge.training.totals import total
from specforge.verifier.parts import VerifierParts


@dataclass(frozen=True)
class Teacher:
    """The verifier's states and head, which a draft is compared with.

    Attributes:
        last: Its states before the final norm, [N, H].
        parts: Its norm and head.
        draft_ids: The verifier's ids of the D draft tokens, int64 [D]; None if the vocabularies are the same.
    """

    last: Tensor
    parts: VerifierParts
    draft_ids: Tensor | None


@dataclass(frozen=True)
class Labels:
    """The text's own tokens, to train on or to replay decoding with (see ``specforge.decoding.replay``).

    Attributes:
        tokens: Id of the token after each row, which the verifier's state of that row predicts, int64 [N].
        sampling: Sampling by which the verifier generated the text.
    """

    tokens: Tensor
    sampling: Sampling


@dataclass(frozen=True)
class DraftSteps:
    """A draft's results at every step and row, from which all metrics are computed.

    Attributes:
        loss: The weighted loss, a scalar with gradient.
        terms: For each objective, the sum over supervised rows at each step, [S].
        supervised: Which rows count, bool [S, N].
        acceptance: Probability that a sampled draft token is accepted, [S, N]; 0 if not supervised.
        agreement: Whether the most probable tokens of draft and verifier agree, [S, N]; 0 if not supervised.
        matches: Whether the draft's most probable token is the text's, [S, N]; 0 if not supervised or no labels.
        drawn: Acceptance probability of a sampled draft token given the text's token, [S, N]; 0 likewise.
        candidates: The draft's K most probable tokens at each pair that was run, int64 [P, K]; K is 0 by default.
        verifier_tops: Draft id of the verifier's most probable token there, int64 [P]; -1 if it is not a draft token.
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
    state_index: Tensor | None = None,
    compiled: bool = False,
    weighting: ChainWeighting | None = None,
    further_head: Tensor | None = None,
    candidates: int = 0,
) -> DraftSteps:
    """Compare a draft's steps with the verifier.

    Args:
        hidden: Input of the draft's head, [S, N, H]; with ``state_index``, only of the pairs that were run, [P, H].
            With a ``further_head``, R more columns.
        head: The draft's head, [D, H]; or one for each of the S steps.
        teacher: The verifier's states and head.
        targets: Row of ``teacher.last`` that each row and step is compared with, int64 [S, N], on the CPU.
        supervised: Which rows count, bool [S, N], on the CPU.
        terms: The terms of the objective.
        weights: Factor of each row and step in the loss, [S, N].
        labels: The text's own tokens; None if no loss reads them and decoding is not replayed.
        finish: Function applied to the draft's logits after its head.
        state_index: Index in ``hidden`` of each row's and step's state, int64 [S, N], on the CPU; None if every pair
            has a state.
        compiled: Whether torch.compile fuses the operations on the logits; slows the first call.
        weighting: A further factor of each pair that depends on its whole chain; None for none.
        further_head: A second head for the last R columns of ``hidden``, [D, R]; its logits are added to the head's. A
            frozen head then needs no gradient, unlike one matrix for both.
        candidates: Number K of the draft's most probable tokens that are returned for each pair.

    Raises:
        SpecforgeError: The heads read another width than ``hidden`` has.
    """
    if state_index is None:
        hidden = hidden.flatten(0, 1)
        state_index = torch.arange(len(hidden)).view_as(supervised)
    heads = [head] if isinstance(head, Tensor) else list(head)
    width = heads[0].shape[1] + (0 if further_head is None else further_head.shape[1])
    if hidden.shape[-1] != width:
        raise SpecforgeError(
            f"the draft's heads read a width of {width}, but its states have {hidden.shape[-1]}: `states`, then "
            "`before_head`, must return the input of `head_weights`"
        )
    fused = why_not_fused(hidden.device, compute_type(hidden), terms, weighting) is None
    # Sampling's filters copy and sort logits.
    copies = not fused or (labels is not None and not labels.sampling.is_greedy)
    verifier_size = teacher.parts.lm_head.weight.shape[0]
    work = _Inputs(
        teacher,
        chunks(supervised, targets, state_index, verifier_size, len(heads[0]), hidden.device, copies),
        moved(supervised, hidden.device),
        *(terms, weights, labels, finish),
        weighting=weighting,
        candidates=candidates,
        compare=compiled_compare() if compiled else compare,
        fused=fused,
    )
    if not torch.is_grad_enabled():
        # Otherwise a trained head would require its gradient in validation, too.
        hidden, heads = hidden.detach(), [one.detach() for one in heads]
        further_head = None if further_head is None else further_head.detach()
    loss, sums, *by_row = _Distill.apply(hidden, work, further_head, *heads)
    names = [term.name for term in terms]
    return DraftSteps(loss, dict(zip(names, sums, strict=True)), work.supervised, *by_row)


@dataclass(frozen=True)
class _Inputs:
    teacher: Teacher
    chunks: list[Chunk]
    supervised: Tensor
    terms: list[Term]
    weights: Tensor
    labels: Labels | None
    finish: Callable[[Tensor], Tensor]
    weighting: ChainWeighting | None
    candidates: int
    compare: Callable[..., PairResults]
    fused: bool

    def compared(self) -> Iterator[tuple[Chunk, PlainTarget | FusedTarget]]:
        """Yield the chunks and the verifier's distributions at their targets, each computed once."""
        target = None
        for chunk in self.chunks:
            target = tail(target, chunk.shared) if target and chunk.shared else None
            fresh = self._target(chunk.targets[chunk.shared :])
            target = joined(target, fresh) if target else fresh
            yield chunk, target

    def _target(self, rows: Tensor) -> PlainTarget | FusedTarget:
        """Compute the verifier's distributions at some rows of its states."""
        logits = self.teacher.parts.logits(self.teacher.last.index_select(0, rows))
        of_text = None
        if self.labels is not None and not self.labels.sampling.is_greedy:
            of_text = label_log_probs(logits, self.labels.tokens[rows], self.labels.sampling)
        return (FusedTarget if self.fused else PlainTarget).of(logits, self.teacher.draft_ids, of_text)


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, work: _Inputs, further_head: Tensor | None, *heads: Tensor
    ) -> tuple[Tensor, ...]:
        dtype = compute_type(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            of_hidden, _, of_further, *of_heads = ctx.needs_input_grad
            run = _ChunkPass(hidden, heads, further_head, work, dtype, of_hidden, of_heads[0], of_further)
            for chunk, target in work.compared():
                run.add(chunk, target)
        # Saved, so that they are freed as soon as they are used.
        ctx.save_for_backward(run.hidden_gradient, run.further_gradient, *run.head_gradients)
        others = run.sums, run.acceptance, run.agreement, run.matches, run.drawn, run.candidates, run.verifier_tops
        ctx.mark_non_differentiable(*others)
        return run.loss, *others

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_further, *of_heads = ctx.saved_tensors
        return (
            None if of_hidden is None else of_hidden * scale.to(of_hidden.dtype),
            None,
            None if of_further is None else of_further * scale,
            *(None if one is None else one * scale for one in of_heads),
        )


class _ChunkPass:
    """One pass over the chunks, with its running sums."""

    def __init__(
        self,
        hidden: Tensor,
        heads: Sequence[Tensor],
        further_head: Tensor | None,
        work: _Inputs,
        dtype: torch.dtype,
        train_hidden: bool,
        train_heads: bool,
        train_further: bool,
    ) -> None:
        self.work = work
        self.hidden = hidden.detach()
        self.heads = [head.detach().to(dtype) for head in heads]
        self.further_head = None if further_head is None else further_head.detach().to(dtype)
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
        self.mean_acceptance: Tensor | None = None
        if any(term.uses_mean_acceptance for term in work.terms):
            self.mean_acceptance = self._mean_acceptance()

    def add(self, chunk: Chunk, target: PlainTarget | FusedTarget) -> None:
        """Add a chunk to the loss, the sums, the per-row results and the gradients."""
        states = self.hidden.index_select(0, chunk.state_of).to(self.heads[0].dtype)
        logits = self._logits(states, chunk)
        if isinstance(target, FusedTarget):
            self._add_fused(logits, target, chunk)
        else:
            self._add_plain(logits, target, chunk)
        if self.trains:
            self._accumulate(logits, states, chunk)

    def _logits(self, states: Tensor, chunk: Chunk) -> Tensor:
        """Compute the logits of the draft's heads for the pairs of a chunk, [M, D]."""
        logits = states.new_empty(len(states), len(self.heads[0]))
        width = self.heads[0].shape[1]
        for head, own in zip(self.heads, chunk.by_head(len(self.heads)), strict=True):
            torch.mm(states[own, :width], head.T, out=logits[own])
        if self.further_head is not None:
            logits.addmm_(states[:, width:], self.further_head.T)
        return logits

    def _add_fused(self, logits: Tensor, target: FusedTarget, chunk: Chunk) -> None:
        """Add a chunk's pairs to the loss, sums and results; replace their logits [M, D] by the logits' gradient."""
        with torch.set_grad_enabled(self.trains):
            leaf = logits.detach().requires_grad_(self.trains)
            finished = self.work.finish(leaf)
            pairs = self._fused(finished.detach(), target, chunk)
            loss, values = weighted(self.work.terms, pairs.sums, self._weights(chunk, [pairs.sums]))
        found = PairResults(loss, values, pairs.sums.acceptance.detach(), pairs.sums.top)
        self._record(found, logits, target, chunk)
        if self.trains:
            pairs.differentiate(loss)
            if finished is not leaf:
                logits.copy_(torch.autograd.grad(finished, leaf, finished.detach())[0])

    def _add_plain(self, logits: Tensor, target: PlainTarget, chunk: Chunk) -> None:
        """Do the same with operations of torch, block by block."""
        weights = self._weights(chunk, (sums for _, sums in self._pair_sums(logits, target, chunk)))
        for block in blocks(logits):
            own, pairs = logits[block], chunk.part(block)
            with torch.set_grad_enabled(self.trains):
                leaf = own.detach().requires_grad_(self.trains)
                # A call of its own frees the comparison's intermediates before the gradient is computed.
                found = self._losses(leaf, target, weights[block], pairs)
            self._record(found, own, target, pairs)
            if self.trains:
                # The logits are not read again.
                own.copy_(torch.autograd.grad(found.loss, leaf)[0])

    def _weights(self, chunk: Chunk, sums: Iterable[PairSums]) -> Tensor:
        """Return the factor of each pair of a chunk in the loss, [M].

        Args:
            chunk: The chunk.
            sums: Those of its pairs, in one or several parts; read only for a weighting along the chain.
        """
        weights = self.work.weights[chunk.steps, chunk.rows]
        if self.work.weighting is None:
            return weights
        found = torch.cat([self.work.weighting.statistic(one).detach() for one in sums])
        # Arranged by step and row, so that each column is a chain.
        by_row = self.loss.new_zeros(len(self.work.supervised), chunk.size)
        by_row[chunk.steps, chunk.row_of] = found.to(by_row.dtype)
        counts = torch.zeros_like(by_row, dtype=torch.bool)
        counts[chunk.steps, chunk.row_of] = True
        return weights * self.work.weighting.function(by_row, counts)[chunk.steps, chunk.row_of]

    def _fused(self, logits: Tensor, target: FusedTarget, chunk: Chunk) -> FusedPairs:
        """Compare some finished logits with their targets by kernels."""
        return FusedPairs(logits, target, chunk.target_of, self._text(chunk), self._mean(chunk))

    def _pair_sums(
        self, logits: Tensor, target: PlainTarget | FusedTarget, chunk: Chunk
    ) -> Iterator[tuple[Chunk, PairSums]]:
        """Yield the pairs of a chunk, block by block, with their sums, but without the mean acceptance."""
        for block in blocks(logits):
            pairs, own = chunk.part(block), self.work.finish(logits[block])
            if isinstance(target, FusedTarget):
                yield pairs, self._fused(own, target, pairs).sums
            else:
                yield pairs, self._distributions(own, target, pairs)

    def _distributions(self, logits: Tensor, target: PlainTarget, chunk: Chunk) -> Distributions:
        """Return the distributions of some pairs, by their finished logits."""
        of_targets = gathered(target.log_p, target.log_p_full, chunk.target_of)
        return Distributions(
            log_softmax(logits), *of_targets, text=self._text(chunk), verifier_top=target.top[chunk.target_of]
        )

    def _losses(self, logits: Tensor, target: PlainTarget, weights: Tensor, chunk: Chunk) -> PairResults:
        """Compare some pairs with their targets."""
        mean, text = self._mean(chunk), self._text(chunk)
        targets = target.log_p, target.log_p_full, target.top, chunk.target_of
        return self.work.compare(logits, *targets, weights, self.work.terms, self.work.finish, mean, text)

    def _record(self, found: PairResults, logits: Tensor, target: Target, chunk: Chunk) -> None:
        """Add the results of some pairs to the loss, the sums and the per-row results."""
        self.loss += found.loss.detach()
        self.sums.index_add_(1, chunk.steps, found.values)
        self.acceptance[chunk.steps, chunk.rows] = found.acceptance
        self.agreement[chunk.steps, chunk.rows] = (found.top == target.top[chunk.target_of]).to(self.agreement.dtype)
        if self.work.candidates:
            self.candidates[chunk.state_of] = logits.topk(self.work.candidates).indices
            self.verifier_tops[chunk.state_of] = target.top[chunk.target_of]
        if self.work.labels is not None:
            self._replay(self.work.labels.sampling, self.work.finish(logits), found.top, target, chunk)

    def _text(self, chunk: Chunk) -> Tensor | None:
        if self.work.labels is None:
            return None
        tokens = self.work.labels.tokens[chunk.targets][chunk.target_of]
        return draft_indices(tokens, self.work.teacher.draft_ids)

    def _replay(self, sampling: Sampling, logits: Tensor, top: Tensor, target: Target, chunk: Chunk) -> None:
        """Record whether the text's token would have been drafted, and its acceptance probability."""
        text = self._text(chunk)
        assert text is not None
        matches = (top == text).to(self.matches.dtype)
        self.matches[chunk.steps, chunk.rows] = matches
        if target.log_p_text is None:
            self.drawn[chunk.steps, chunk.rows] = matches
            return
        log_q = label_log_probs(logits, text, sampling)
        accepted = acceptance_of_drawn(log_q, target.log_p_text[chunk.target_of])
        self.drawn[chunk.steps, chunk.rows] = accepted.to(self.drawn.dtype)

    def _accumulate(self, of_logits: Tensor, states: Tensor, chunk: Chunk) -> None:
        """Add the gradients of the states and heads from the gradient of a chunk's logits."""
        width = self.heads[0].shape[1]
        for number, own in enumerate(chunk.by_head(len(self.heads))):
            if self.hidden_gradient is not None:
                of_states = of_logits[own] @ self.heads[number]
                self.hidden_gradient[chunk.state_of[own], :width] = of_states.to(self.hidden_gradient.dtype)
            _add_product(self.head_gradients[number], of_logits[own], states[own, :width])
        if self.further_head is not None:
            if self.hidden_gradient is not None:
                of_states = of_logits @ self.further_head
                self.hidden_gradient[chunk.state_of, width:] = of_states.to(self.hidden_gradient.dtype)
            _add_product(self.further_gradient, of_logits, states[:, width:])

    def _mean_acceptance(self) -> Tensor:
        """Return the mean acceptance of each step over all processes, [S], computed without gradients."""
        sums = torch.zeros_like(self.sums[0])
        for chunk, target in self.work.compared():
            logits = self._logits(self.hidden.index_select(0, chunk.state_of).to(self.heads[0].dtype), chunk)
            for pairs, found in self._pair_sums(logits, target, chunk):
                sums.index_add_(0, pairs.steps, found.acceptance.to(sums.dtype))
        sums, counts = total(torch.stack([sums, self.work.supervised.sum(1).to(sums)]))
        return sums / counts.clamp(min=1)

    def _mean(self, chunk: Chunk) -> Tensor | None:
        """Return the mean acceptance of each pair's step."""
        return None if self.mean_acceptance is None else self.mean_acceptance[chunk.steps]


def _add_product(gradient: Tensor | None, of_logits: Tensor, states: Tensor) -> None:
    """Add what logits [M, D] of states [M, H] come to in the gradient of their head, [D, H], if that is asked for."""
    if gradient is None:
        return
    if gradient.dtype == of_logits.dtype:
        gradient.addmm_(of_logits.T, states)
    else:
        gradient += of_logits.T @ states
