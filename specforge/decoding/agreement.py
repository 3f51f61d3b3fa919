"""Check that real decoding accepts what replay accepts: a draft's drafter against its ``unroll``.

At temperature 0 the text determines every round of a chain: a drafted token is accepted exactly if the draft's most
probable token is the text's next one. A drafter computes this round by round, from its own cache; ``unroll`` computes
it at all tokens at once, as in training. Replayed over the decoded text, both must accept the same tokens in every
round, or one of them is wrong. Comparing only acceptance lengths would miss this when few tokens are accepted.

The *margin* of a token is its logit minus the largest other logit: positive if the draft proposes the token. If the
margin is tiny, rounding may decide, so such tokens agree with either outcome.

Letters in shapes: S steps of the chain, N anchors of the text, R rounds, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.decoding.recorded import chunks, draft_indices
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.features import Features

# A margin that rounding may flip, in units of the dtype's epsilon times the largest logit.
ROUNDING = 16


@dataclass(frozen=True)
class Agreement:
    """Comparison of the rounds of real decoding with replay.

    Attributes:
        rounds: Number of compared rounds.
        differing: Number of rounds that accept different tokens than replay.
        example: Description of one such round; empty if there is none.
    """

    rounds: int = 0
    differing: int = 0
    example: str = ""

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(self.rounds + other.rounds, self.differing + other.differing, self.example or other.example)

    def __str__(self) -> str:
        return (
            f"real decoding accepts different tokens than replay in {self.differing:,} of {self.rounds:,} rounds: "
            f"{self.example}. Replay runs the draft as in training, so the drafter used for decoding computes "
            "something else: these figures do not show what the trained draft is worth"
        )


@torch.no_grad()
def compare_rounds(
    draft: SpeculatorModel, tokens: Tensor, features: Features, begin: int, accepted: Sequence[int], chain: int
) -> Agreement:
    """Compare the rounds of a greedy chain, decoded at temperature 0, with a replay of the same text.

    Args:
        draft: The draft, attached.
        tokens: Prompt and decoded tokens, int64 [T].
        features: The verifier's states over them, [1, T, ...].
        begin: Index of the first decoded token.
        accepted: Number of tokens that each round accepted, in order. A round yields 1 + accepted; the first decoded
            token comes before all rounds.
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
    differs = (steps < counts) & (margins < -rounding)
    differs |= (steps == counts) & (counts < most) & (margins > rounding)
    differing = differs.any(0).nonzero()[:, 0]
    if not len(differing):
        return Agreement(len(anchors))
    first = int(differing[0])
    step = int(differs[:, first].nonzero()[0])
    outcome = ("accepted", "rejected") if step < accepted[first] else ("rejected", "accepted")
    return Agreement(
        len(anchors),
        len(differing),
        f"in one, after {int(anchors[first]) + 1} tokens of the response, drafted token {step + 1} is {outcome[0]} "
        f"in decoding and {outcome[1]} in replay",
    )


def _margins(
    draft: SpeculatorModel, tokens: Tensor, features: Features, begin: int, steps: int
) -> tuple[Tensor, Tensor]:
    """Return the margin of the text's token at each step and anchor, and its rounding error, [S, N] each."""
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
            labels = draft_indices(tokens[rows + 2 + step], draft.draft_ids)
            logits = draft.logits(hidden[step, rows], step).double()
            index = labels.clamp(min=0)[:, None]
            own = torch.where(labels >= 0, logits.gather(1, index).squeeze(1), -torch.inf)
            # For a token outside the draft vocabulary, all logits are others.
            others = torch.where(labels[:, None] >= 0, logits.scatter(1, index, -torch.inf), logits).amax(1)
            margins[step, row] = own - others
            rounding[step, row] = ROUNDING * precision * logits.masked_fill(logits.isinf(), 0).abs().amax(1)
    return margins, rounding
