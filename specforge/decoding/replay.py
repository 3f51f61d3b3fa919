"""The exact acceptance length of a draft on text that the verifier wrote, without running the verifier again.

Token verification accepts a drafted token exactly as often as this coupling does: take the token y that the verifier
sampled. A draft that samples is accepted with probability min(1, q(y) / p(y)); a deterministic draft if its token
equals y. So text that the verifier itself wrote, at the same temperature, determines how every round of decoding would
end. q is computed with the true tokens as inputs and the draft's own states, as in training.

A *turn* is a contiguous run of response tokens x_s .. x_e. The prefill yields x_s; N = e - s tokens are left to
rounds. Anchor j = 0 .. N - 1 is a round that begins when x_{s+j} is the root: its step i drafts x_{s+j+1+i}. A round
that accepts m tokens yields m + 1, and the next one begins there.

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
    """Expected rounds of decoding some turns with chains of 1 .. S tokens.

    Attributes:
        tokens: Number of tokens that the rounds yield, a scalar.
        rounds: Number of rounds by chain length, [S].
        accepted: Number of rounds that accept at least k tokens, by chain length and k = 1 .. S, [S, S]; 0 for k above
            the chain length.
    """

    tokens: Tensor
    rounds: Tensor
    accepted: Tensor


def replay(acceptance: Tensor, lengths: Tensor) -> Rounds:
    """Compute the expected rounds of decoding each turn.

    The expected number of rounds that begin at an anchor is v(0) = 1, v(t + m + 1) += v(t) P(exactly m accepted at t).

    Args:
        acceptance: Probability that step i at anchor j is accepted, given that the steps before it were, [M, N, S];
            values beyond a turn's end are not read.
        lengths: Number of anchors of each turn, int64 [M].
    """
    # On the CPU: the steps are many and too small for an accelerator.
    acceptance, lengths = acceptance.cpu(), lengths.cpu()
    turns, anchors, steps = acceptance.shape
    positions = torch.arange(anchors)[:, None] + torch.arange(steps + 1)
    inside = positions < lengths[:, None, None]
    acceptance = torch.where(inside[..., :steps], acceptance.double(), 0)
    # Probability that at least k = 0 .. S tokens are accepted.
    joint = torch.cat([torch.ones_like(acceptance[..., :1]), acceptance.cumprod(-1)], dim=-1)
    # Probability that exactly m are accepted, for chains of K = 1 .. S: a chain of K accepts at most K.
    number = torch.arange(steps + 1)
    chain = number[1:, None]
    following = torch.cat([joint[..., 1:], torch.zeros_like(joint[..., :1])], dim=-1)
    exactly = torch.where(
        number < chain, (joint - following)[:, :, None], torch.where(number == chain, joint[:, :, None], 0)
    )
    visits = joint.new_zeros(turns, anchors + steps + 1, steps)
    visits[:, 0] = 1
    # An anchor's visits depend on earlier anchors: loop over tokens, vectorised over turns and chains.
    for anchor in range(anchors):
        visits[:, anchor + 1 : anchor + steps + 2] += visits[:, anchor, None] * exactly[:, anchor].transpose(1, 2)
    visits = visits[:, :anchors] * inside[..., :1]
    # The last token of a turn counts as the verifier's own even if it was drafted, so a round yields 1 + accepted.
    reached = joint[..., 1:] * inside[..., 1:]
    accepted = torch.einsum("mnc,mnk->ck", visits, reached).tril()
    return Rounds(lengths.sum().double(), visits.sum((0, 1)), accepted)


class Sums(UncastMetric):
    """A metric whose states are sums over batches and ranks; they keep their dtype when a parent module is cast."""

    full_state_update = False

    def add_sum(self, name: str, *shape: int) -> None:
        """Add a state of zeros.

        Args:
            name: Attribute name.
            shape: Shape of the state.
        """
        # Sums over millions of rows lose digits in float32, but Apple GPUs have no wider type.
        wide = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state(name, torch.zeros(shape, dtype=wide), dist_reduce_fx="sum")


class AcceptanceLength(Sums):
    """Tokens per verifier forward pass, exact over batches and ranks of different sizes.

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
            acceptance: Acceptance probability of every step at every position, [S, B, T].
            reachable: Positions where a round can begin and draft a token of the same turn, bool [B, T].
        """
        starts, lengths = find_turns(reachable)
        if not len(starts):
            return
        flat = acceptance.flatten(1).T
        turns = [flat[start : start + length] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]
        found = replay(pad_sequence(turns, batch_first=True), lengths)
        self.tokens += found.tokens.to(self.tokens)
        self.rounds += found.rounds.to(self.rounds)
        self.accepted += found.accepted.to(self.accepted)

    def compute(self) -> dict[int, dict[str, float]]:
        """Return the result of ``figures`` for each chain length K; empty if there were no turns."""
        if not self.tokens:
            return {}
        return {
            chain: figures(float(self.tokens), float(self.rounds[chain - 1]), self.accepted[chain - 1, :chain].tolist())
            for chain in range(1, len(self.rounds) + 1)
        }


def figures(tokens: float, rounds: float, accepted: Sequence[float]) -> dict[str, float]:
    """Return acceptance length and rates.

    Args:
        tokens: Number of tokens that the rounds yielded.
        rounds: Number of rounds, one verifier forward pass each.
        accepted: Number of rounds that accepted at least k = 1, 2, ... tokens.

    Returns:
        ``acceptance_length`` (tokens per round, the verifier's own included), ``accept_rate_pos_k`` (share of the
        rounds that accepted at least k) and ``accept_rate_cond_k`` (share of those that accepted at least k - 1).
    """
    values = {"acceptance_length": tokens / rounds}
    before = rounds
    for position, count in enumerate(accepted, start=1):
        values[f"accept_rate_pos_{position}"] = count / rounds
        values[f"accept_rate_cond_{position}"] = count / before if before else 0.0
        before = count
    return values


def find_turns(reachable: Tensor) -> tuple[Tensor, Tensor]:
    """Find the contiguous runs in bool [B, T], as starts and lengths in the flattened batch, int64 [M] each."""
    edges = torch.nn.functional.pad(reachable.int(), (1, 1)).diff(dim=1)
    rows, begins = (edges == 1).nonzero(as_tuple=True)
    _, ends = (edges == -1).nonzero(as_tuple=True)
    return rows * reachable.shape[1] + begins, ends - begins
