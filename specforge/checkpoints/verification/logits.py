"""The largest logits of a draft at some rows, recorded compactly and compared with recorded ones.

A stand-in replaces the verifier if there is none: its states, embeddings and head are fixed numbers, so that the
draft's output depends only on the draft.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from specforge.checkpoints.verification.probe import Logits
from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.decoding.recorded import draft_indices
from specforge.errors import UsageError
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.features import Features
from specforge.verifier.parts import VerifierParts

KEPT = 8
ROWS = 4
STEPS = 3
STAND_IN_TOKENS = 32
STAND_IN_LENGTH = 12
# The order of summation differs between machines; real faults differ by much more.
TOLERANCE = 2e-3


def stand_in_logits(model: SpeculatorModel, verifier: VerifierFacts) -> Logits:
    """Return a draft's logits on the stand-in's states; the draft is left attached to the stand-in.

    Args:
        model: The draft, in float32.
        verifier: Facts about the draft's verifier.
    """
    tokens, features = attach_stand_in(model, verifier)
    return greatest_logits(model, tokens, features)


def attach_stand_in(model: SpeculatorModel, verifier: VerifierFacts) -> tuple[Tensor, Features]:
    """Attach a stand-in for the verifier.

    Args:
        model: The draft.
        verifier: Facts about the draft's verifier.

    Returns:
        Tokens [T] and the stand-in's states over them.
    """
    width, number = verifier.hidden_size, min(STAND_IN_TOKENS, verifier.vocab_size)
    head = nn.Linear(width, number, bias=False)
    head.weight = nn.Parameter(_numbers(number, width, seed=1), requires_grad=False)
    parts = VerifierParts(
        # The fields that drafts read, without the families' processing after the head.
        config=cast(Any, SimpleNamespace(**verifier.model_dump())),
        embed_tokens=nn.Embedding.from_pretrained(_numbers(number, width, seed=2)),
        norm=nn.Identity(),
        lm_head=head,
    )
    model.attach_verifier(parts)
    tokens = (torch.arange(STAND_IN_LENGTH) * 7 + 3).remainder(number)
    aux = len(model.aux_layers)
    return tokens, Features(
        _numbers(STAND_IN_LENGTH, aux * width, seed=3).view(1, STAND_IN_LENGTH, aux, width),
        _numbers(STAND_IN_LENGTH, width, seed=4)[None],
    )


@torch.no_grad()
def greatest_logits(model: SpeculatorModel, tokens: Tensor, features: Features) -> Logits:
    """Return a draft's largest logits at its last rows that read nothing beyond the text.

    Args:
        model: The draft, attached.
        tokens: A text, int64 [T].
        features: The verifier's states over it, [1, T, ...].

    Raises:
        UsageError: Logits are infinite or not a number.
    """
    ids, values = [], []
    for step, logits in enumerate(_step_logits(model, tokens, features)):
        # A draft may leave out tokens, by logits of minus infinity.
        if not bool(torch.isfinite(logits.amax(-1)).all()):
            raise UsageError(f"at step {step}, the draft's logits are not finite; its settings or weights are damaged")
        top = logits.topk(min(KEPT, int(torch.isfinite(logits).sum(-1).min())))
        kept = top.indices.cpu()
        ids.append((kept if model.draft_ids is None else model.draft_ids.cpu()[kept]).tolist())
        values.append(top.values.cpu().tolist())
    return Logits(ids=ids, values=values)


@torch.no_grad()
def difference(model: SpeculatorModel, tokens: Tensor, features: Features, expected: Logits) -> str | None:
    """Describe how a draft's logits differ from recorded ones; None if they do not.

    Args:
        model: The draft, attached.
        tokens: The text, int64 [T].
        features: The verifier's states over it, [1, T, ...].
        expected: The recorded logits.
    """
    found = _step_logits(model, tokens, features)
    if len(found) != len(expected.ids):
        return f"the draft runs {len(found)} steps, {len(expected.ids)} are expected"
    draft_ids = None if model.draft_ids is None else model.draft_ids.cpu()
    for step, logits in enumerate(found):
        ids, wanted = torch.tensor(expected.ids[step]), torch.tensor(expected.values[step])
        indices = draft_indices(ids, draft_ids)
        if bool((indices < 0).any()) or int(indices.max()) >= logits.shape[-1]:
            missing = int(ids[(indices < 0) | (indices >= logits.shape[-1])][0])
            return f"at step {step}, token {missing} should be among the most probable, but is not a draft token"
        got = logits.cpu().gather(-1, indices)
        allowed = TOLERANCE * max(1.0, float(wanted.abs().max()))
        furthest = float((got - wanted).abs().max())
        above = float((logits.cpu().amax(-1) - wanted[:, 0]).max())
        if not max(furthest, above) <= allowed:
            return f"at step {step}, logits are up to {max(furthest, above):.3g} off, {allowed:.2g} is allowed"
    return None


def _step_logits(model: SpeculatorModel, tokens: Tensor, features: Features) -> list[Tensor]:
    """Return float32 logits [R, D] of each step, at the last rows whose inputs are all in the text."""
    steps = min(STEPS, model.drafter(1).max_depth or STEPS)
    positions = torch.arange(len(tokens), device=tokens.device)[None]
    hidden = model.unroll(tokens[None], features, positions, torch.zeros_like(positions), steps)[:, 0]
    # Row t reads x_{t+1} .. x_{t+S}.
    last = len(tokens) - steps
    rows = slice(max(last - ROWS, 0), last)
    return [model.logits(hidden[step, rows], step).float() for step in range(steps)]


def _numbers(rows: int, columns: int, seed: int) -> Tensor:
    """Return fixed numbers of mean 0 and variance 1, float32, the same on every machine and version of torch."""
    index = torch.arange(rows * columns, dtype=torch.float64) + seed * 1_000_003
    return ((torch.sin(index * 12.9898) * 43758.5453).frac().abs().sub(0.5) * 12**0.5).float().view(rows, columns)
