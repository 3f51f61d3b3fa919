"""What the choice of DFlash2's selector comes to in decoding: acceptance by the distribution that it draws from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from specforge.decoding.recorded import LOGITS_PER_CHUNK, acceptance_of_drawn, label_log_probs
from specforge.training.losses.distillation import DraftSteps, Labels
from specforge.training.losses.objectives import Distributions
from specforge.training.module import Drafted
from specforge.verifier.parts import VerifierParts
from specforge_dflash.dflash2 import DFlash2DraftModel


@torch.no_grad()
def selected_steps(
    draft: DFlash2DraftModel, drafted: Drafted, last: Tensor, parts: VerifierParts, labels: Labels, outcome: DraftSteps
) -> DraftSteps:
    """Replace acceptance and agreement of a batch by those of the selector's distribution.

    Args:
        draft: The draft.
        drafted: What it computed.
        last: The verifier's states before its final norm, [N, H].
        parts: Its norm and head.
        labels: The text's next tokens.
        outcome: What the head's own distribution comes to.
    """
    found = [torch.zeros_like(outcome.acceptance) for _ in range(4)]
    for steps, rows, states, target in _chunks(drafted, parts.lm_head.weight.shape[0]):
        # Pairs come in the order of their targets, each of which is formed once a chunk.
        targets, target_of = target.unique_consecutive(return_inverse=True)
        q = draft.logits(drafted.states[states]).float()
        p, text = parts.logits(last[targets]).float()[target_of], labels.tokens[targets][target_of]
        log_p, choice = p.log_softmax(-1), q.argmax(-1)
        accepted = Distributions(q.log_softmax(-1), log_p, log_p).acceptance
        matches = (choice == text).float()
        drawn = matches
        if not labels.sampling.is_greedy:
            drawn = acceptance_of_drawn(*(label_log_probs(one, text, labels.sampling) for one in (q, p)))
        for by_row, values in zip(found, (accepted, choice == p.argmax(-1), matches, drawn), strict=True):
            by_row[steps, rows] = values.to(by_row.dtype)
    accepted, agreement, matches, drawn = found
    return replace(outcome, acceptance=accepted, agreement=agreement, matches=matches, drawn=drawn)


def _chunks(drafted: Drafted, vocabulary: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield step, row, state and target of all pairs that count, in the order of their targets, few at a time."""
    counted = drafted.counted()
    order = counted[-1].argsort(stable=True)
    for some in order.split(max(1, LOGITS_PER_CHUNK // vocabulary)):
        yield tuple(one[some] for one in counted)
