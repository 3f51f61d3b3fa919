"""Whether real decoding accepts what replay accepts: a check of a draft's drafter against its ``unroll``.

At temperature 0 the text determines every round of a chain: a drafted token is accepted exactly where the draft's most
probable token is the text's next one. A drafter computes that round by round, from its own cache; ``unroll`` computes
it at all tokens at once, as training does. Replayed over the very text that was decoded, both must accept the same
tokens in every round, or one of them is wrong. Acceptance lengths alone would not tell where few tokens are accepted.

The *margin* of a token is its logit minus the greatest one of the others: positive where the draft proposes it.
Rounding may decide where the margin is next to nothing, so such tokens agree with either outcome.

Letters in shapes: S steps of the chain, N anchors of the text, R rounds, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.decoding.recorded import chunks, draft_places
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.features import Features

# A margin that rounding may turn, in units of the type's precision times the greatest logit.
ROUNDING = 16


@dataclass(frozen=True)
class Agreement:
    """Rounds of real decoding beside replay.

    Attributes:
        rounds: How many were compared.
        differing: How many of them accept other tokens than replay does.
        example: One that does, in words; empty if none.
    """

    rounds: int = 0
    differing: int = 0
    example: str = ""

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(self.rounds + other.rounds, self.differing + other.differing, self.example or other.example)

    def __str__(self) -> str:
        return (
            f"real decoding accepts other tokens than replay in {self.differing:,} of {self.rounds:,} rounds: "
            f"{self.example}. Replay runs the draft as training does, so the drafter, which decoding steps through, "
            "computes something else: these figures are not what the trained draft is worth"
        )


@torch.no_grad()
def compare_rounds(
    draft: SpeculatorModel, tokens: Tensor, features: Features, begin: int, accepted: Sequence[int], chain: int
) -> Agreement:
    """Compare the rounds of a greedy chain, decoded at temperature 0, with a replay of the same text.

    Args:
        draft: The draft, attached.
        tokens: Prompt and what was decoded, int64 [T].
        features: The verifier's states over them, [1, T, ...].
        begin: Index of the first decoded token.
        accepted: How many tokens each round accepted, in order; 1 + accepted in each, and the first token before.
        chain: Length of the chain.
    """
    counts = torch.tensor(accepted, dtype=torch.int64, device=tokens.device)
    anchors = (counts + 1).cumsum(0) - counts - 1
    if not len(anchors):
        return Agreement()
    margins, rounding = _margins(draft, tokens, features, begin, chain)
    margins, rounding = margins[:, anchors], rounding[:, anchors]
    # The last token of a text counts as the verifier's own.
    most = (len(tokens) - 2 - begin - anchors).clamp(max=chain)
    steps = torch.arange(chain, device=tokens.device)[:, None]
    unlike = (steps < counts) & (margins < -rounding)
    unlike |= (steps == counts) & (counts < most) & (margins > rounding)
    differing = unlike.any(0).nonzero()[:, 0]
    if not len(differing):
        return Agreement(len(anchors))
    first = int(differing[0])
    step = int(unlike[:, first].nonzero()[0])
    outcome = ("accepted", "rejected") if step < accepted[first] else ("rejected", "accepted")
    return Agreement(
        len(anchors),
        len(differing),
        f"in one, after {int(anchors[first]) + 1} tokens of the response, drafted token {step + 1} is {outcome[0]} "
        f"where replay has it {outcome[1]}",
    )


def _margins(
    draft: SpeculatorModel, tokens: Tensor, features: Features, begin: int, steps: int
) -> tuple[Tensor, Tensor]:
    """Return the margin of the text's token at each step and anchor, and what rounding may make of it, [S, N] each."""
    positions = torch.arange(len(tokens), device=tokens.device)[None]
    hidden = draft.unroll(tokens[None], features, positions, torch.zeros_like(positions), steps)[:, 0]
    precision = max(torch.finfo(one).eps for one in (draft.dtype, features.last.dtype))
    anchors = len(tokens) - 1 - begin
    margins = torch.zeros(steps, anchors, dtype=torch.float64, device=tokens.device)
    rounding = torch.zeros_like(margins)
    for step in range(steps):
        for row in chunks(anchors - step, draft.verifier_parts.lm_head.weight.shape[0]):
            # Anchor j is row t = s - 1 + j, whose step i drafts x_{t+2+i}.
            rows = begin - 1 + row
            places = draft_places(tokens[rows + 2 + step], draft.draft_ids)
            logits = draft.logits(hidden[step, rows], step).double()
            index = places.clamp(min=0)[:, None]
            own = torch.where(places >= 0, logits.gather(1, index).squeeze(1), -torch.inf)
            # A token that the draft does not know leaves all others.
            others = torch.where(places[:, None] >= 0, logits.scatter(1, index, -torch.inf), logits).amax(1)
            margins[step, row] = own - others
            rounding[step, row] = ROUNDING * precision * logits.masked_fill(logits.isinf(), 0).abs().amax(1)
    return margins, rounding
