"""The exact acceptance length of a draft on text that the verifier wrote, without running the verifier again.

Token verification accepts a drafted token exactly as often as this coupling does: take the token y that the verifier
sampled, and accept with probability min(1, q(y) / p(y)) if the draft's token is drawn, or if it equals y where the
draft is a fixed function of the text. So text that the verifier itself wrote, at the same temperature, tells how every
round of decoding would go. q is computed with the true tokens as inputs and the draft's own states, as in training.

A *turn* is an unbroken run of response tokens x_s .. x_e. The verifier says x_s with the prompt's pass; N = e - s
tokens are left to rounds. Anchor j = 0 .. N - 1 is a round that begins when x_{s+j} is the root: its step i drafts
x_{s+j+1+i}. A round that accepts m tokens yields m + 1, and the next one begins there.

Letters in shapes: M turns, N anchors of the longest turn, S draft steps, K length of the chain, V verifier and D draft
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specforge.private.torchmetrics import UncastMetric


@dataclass(frozen=True)
class Rounds:
    """Expected rounds of decoding some turns by chains of 1 .. S tokens.

    Attributes:
        tokens: Tokens that the rounds yield, a scalar.
        rounds: Rounds by length of the chain, [S].
        accepted: Rounds that accept at least k tokens, by length of the chain and k = 1 .. S, [S, S]; 0 for k above
            the length.
    """

    tokens: Tensor
    rounds: Tensor
    accepted: Tensor


def replay(acceptance: Tensor, lengths: Tensor) -> Rounds:
    """Follow the rounds of decoding through turns.

    The expected number of rounds that begin at an anchor is v(0) = 1, v(t + m + 1) += v(t) P(exactly m accepted at t).

    Args:
        acceptance: Probability that step i at anchor j is accepted, given that the steps before it were, [M, N, S];
            what lies behind a turn's end is not read.
        lengths: Anchors of each turn, int64 [M].
    """
    # On the CPU: each of many steps is too small for an accelerator.
    acceptance, lengths = acceptance.cpu(), lengths.cpu()
    turns, anchors, steps = acceptance.shape
    places = torch.arange(anchors)[:, None] + torch.arange(steps + 1)
    inside = places < lengths[:, None, None]
    acceptance = torch.where(inside[..., :steps], acceptance.double(), 0)
    # Probability that at least k = 0 .. S tokens are accepted.
    joint = torch.cat([torch.ones_like(acceptance[..., :1]), acceptance.cumprod(-1)], dim=-1)
    # Probability that exactly m are, for chains of K = 1 .. S: what more a longer chain would accept ends at K.
    number = torch.arange(steps + 1)
    chain = number[1:, None]
    following = torch.cat([joint[..., 1:], torch.zeros_like(joint[..., :1])], dim=-1)
    exactly = torch.where(
        number < chain, (joint - following)[:, :, None], torch.where(number == chain, joint[:, :, None], 0)
    )
    visits = joint.new_zeros(turns, anchors + steps + 1, steps)
    visits[:, 0] = 1
    # An anchor's visits depend on those before it: this loop is over tokens, and each step over all turns and chains.
    for anchor in range(anchors):
        visits[:, anchor + 1 : anchor + steps + 2] += visits[:, anchor, None] * exactly[:, anchor].transpose(1, 2)
    visits = visits[:, :anchors] * inside[..., :1]
    # The last token of a turn is the verifier's own even if it was drafted, so that a round yields 1 + accepted.
    reached = joint[..., 1:] * inside[..., 1:]
    accepted = torch.einsum("mnc,mnk->ck", visits, reached).tril()
    return Rounds(lengths.sum().double(), visits.sum((0, 1)), accepted)


class Sums(UncastMetric):
    """A metric whose states are sums over batches and ranks; they keep their type when a module around it is cast."""

    full_state_update = False

    def add_sum(self, name: str, *shape: int) -> None:
        """Add a state of zeros.

        Args:
            name: Name of the attribute.
            shape: Its shape.
        """
        # Sums over millions of rows lose digits in float32, but Apple's GPUs have nothing wider.
        wide = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state(name, torch.zeros(shape, dtype=wide), dist_reduce_fx="sum")


class AcceptanceLength(Sums):
    """Tokens for each pass of the verifier, exact over batches and ranks of different size.

    Args:
        steps: Number S of draft steps.
    """

    tokens: Tensor
    rounds: Tensor
    accepted: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.add_sum("tokens")
        self.add_sum("rounds", steps)
        self.add_sum("accepted", steps, steps)

    def update(self, acceptance: Tensor, reachable: Tensor) -> None:
        """Add a batch.

        Args:
            acceptance: Acceptance probability of every step at every row, [S, B, T].
            reachable: Rows where a round can begin and draft a token of the same turn, bool [B, T].
        """
        starts, lengths = turns_of(reachable)
        if not len(starts):
            return
        flat = acceptance.flatten(1).T
        turns = [flat[start : start + length] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]
        found = replay(pad_sequence(turns, batch_first=True), lengths)
        self.tokens += found.tokens.to(self.tokens)
        self.rounds += found.rounds.to(self.rounds)
        self.accepted += found.accepted.to(self.accepted)

    def compute(self) -> dict[int, dict[str, float]]:
        """Return, for each length K of the chain, the figures of ``figures``; empty without any turn."""
        if not self.tokens:
            return {}
        return {
            chain: figures(float(self.tokens), float(self.rounds[chain - 1]), self.accepted[chain - 1, :chain].tolist())
            for chain in range(1, len(self.rounds) + 1)
        }


def figures(tokens: float, rounds: float, accepted: Sequence[float]) -> dict[str, float]:
    """Return acceptance length and rates.

    Args:
        tokens: Tokens that rounds yielded.
        rounds: Number of rounds, one pass of the verifier each.
        accepted: Rounds that accepted at least k = 1, 2, ... tokens.

    Returns:
        ``acceptance_length`` (tokens a round, the verifier's own included), ``accept_rate_pos_k`` (share of the rounds
        that accepted at least k) and ``accept_rate_cond_k`` (of those that accepted at least k - 1).
    """
    values = {"acceptance_length": tokens / rounds}
    before = rounds
    for position, count in enumerate(accepted, start=1):
        values[f"accept_rate_pos_{position}"] = count / rounds
        values[f"accept_rate_cond_{position}"] = count / before if before else 0.0
        before = count
    return values


def turns_of(reachable: Tensor) -> tuple[Tensor, Tensor]:
    """Find the unbroken runs of rows, bool [B, T], as starts and lengths in the flattened batch, int64 [M] each."""
    edges = torch.nn.functional.pad(reachable.int(), (1, 1)).diff(dim=1)
    rows, begins = (edges == 1).nonzero(as_tuple=True)
    _, ends = (edges == -1).nonzero(as_tuple=True)
    return rows * reachable.shape[1] + begins, ends - begins
