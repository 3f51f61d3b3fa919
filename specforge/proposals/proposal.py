"""The tree of tokens that a proposal method passes to the verifier, and the base class of methods.

Letters in shapes: B sequences, N proposed nodes, I nodes that have children (the root included), D draft vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from specforge.config import TokenProposalConfig
from specforge.models.drafter import Drafter
from specforge.models.tree_cache import ancestors_of
from specforge.sampling import RandomSource, Sampling

Settings = TypeVar("Settings", bound=TokenProposalConfig)


@dataclass(frozen=True)
class Proposal:
    """Trees of candidate tokens after the last committed token of each sequence, the root.

    Nodes are ordered by depth, siblings in the order in which they were drawn.

    Attributes:
        tokens: The verifier's ids, int64 [B, N].
        parents: The parent of each node, int64 [B, N]; -1 is the root.
        counts: Number of real nodes of each row, int64 [B]; padding comes after them.
        log_q: The log-probabilities from which sampled tokens were drawn, [B, I, D]: those of the root's children, then
            those of the other nodes' children in order; siblings are drawn without replacement. None if tokens are a
            deterministic function of the committed ones.
        draft_ids: The verifier's ids of the draft tokens, int64 [D]; None if the vocabularies are the same.
        accept_k: Accept a token that is among the verifier's k most probable ones: lossy above 1.
        accept_tolerance: Accept a token whose log-probability is at most this far below the best: lossy above 0.
    """

    tokens: Tensor
    parents: Tensor
    counts: Tensor
    log_q: Tensor | None = None
    draft_ids: Tensor | None = None
    accept_k: int = 1
    accept_tolerance: float = 0.0

    @property
    def ancestors(self) -> Tensor:
        """Which nodes are on the path to each node, itself included, bool [B, N, N]."""
        return ancestors_of(self.parents)

    @property
    def depths(self) -> Tensor:
        """Depth of each node, int64 [B, N]; children of the root have 1."""
        return self.ancestors.sum(-1)

    def within(self, limits: Tensor) -> Proposal:
        """Drop nodes deeper than each sequence's limit, int64 [B]."""
        counts = torch.minimum(self.counts, (self.depths <= limits[:, None]).sum(1))
        longest = int(counts.max())
        return replace(self, tokens=self.tokens[:, :longest], parents=self.parents[:, :longest], counts=counts)


class Proposer(ABC, Generic[Settings]):
    """Base class of proposal methods.

    Args:
        config: Settings of the method.
        sampling: How the verifier chooses its tokens, for methods that sample in the same way.
        rng: Source of randomness.
    """

    needs_draft: ClassVar[bool] = True

    def __init__(self, config: Settings, sampling: Sampling, rng: RandomSource) -> None:
        self.config = config
        self.sampling = sampling
        self.rng = rng

    @property
    @abstractmethod
    def depth(self) -> int:
        """Maximum number of tokens on a proposed path."""

    def check(self, vocabulary_size: int) -> None:
        """Reject settings that do not fit the verifier's vocabulary; override if the method has such settings.

        Raises:
            UsageError: They do not fit.
        """

    @abstractmethod
    def propose(self, sequences: Sequence[Tensor], drafter: Drafter | None) -> Proposal:
        """Propose the next tokens.

        Args:
            sequences: The committed tokens of each sequence, prompt included, int64 [T] each.
            drafter: The drafter, which has read them; None for methods that need none.
        """


def grow(drafter: Drafter, widths: Sequence[int], sampling: Sampling | None, rng: RandomSource) -> Proposal:
    """Grow a tree of a fixed shape, level by level.

    Args:
        drafter: The draft.
        widths: Number of children of the root, of each of these children, and so on.
        sampling: Draw the children of a node from its distribution, without replacement; None takes the most probable.
        rng: Source of randomness.
    """
    logits = drafter.root[:, None]
    batch, device = len(logits), logits.device
    frontier = torch.full((1,), -1, device=device)
    stepped = 0
    tokens, parents, distributions = [], [], []
    for level, width in enumerate(widths):
        # The vocabulary may be smaller than the tree's width.
        width = min(width, logits.shape[-1])
        if sampling is None:
            chosen = logits.topk(width, dim=-1).indices
        else:
            distributions.append(sampling.log_probs(logits))
            chosen = rng.draw_without_replacement(distributions[-1], width)
        tokens.append(drafter.to_verifier(chosen).flatten(1))
        parents.append(frontier.repeat_interleave(width).expand(batch, -1))
        if level + 1 < len(widths):
            logits = drafter.step(tokens[-1], parents[-1])
            frontier = torch.arange(tokens[-1].shape[1], device=device) + stepped
            stepped += len(frontier)
    joined = torch.cat(tokens, dim=1)
    return Proposal(
        tokens=joined,
        parents=torch.cat(parents, dim=1),
        counts=torch.full((batch,), joined.shape[1], device=device),
        log_q=torch.cat(distributions, dim=1) if distributions else None,
        draft_ids=drafter.draft_ids,
    )


def follow(
    sequences: Sequence[Tensor], speculate: Callable[[Tensor], Tensor], device: torch.device | None = None
) -> Proposal:
    """Propose one chain per sequence, by a rule that needs no draft.

    Args:
        sequences: The committed tokens of each sequence, int64 [T] each.
        speculate: Maps committed tokens [T] to proposed ones, [n]; n may be 0.
        device: Device of the proposal; None takes that of the sequences.
    """
    chains = [speculate(sequence) for sequence in sequences]
    counts = torch.tensor([len(chain) for chain in chains], device=device or sequences[0].device)
    tokens = torch.nn.utils.rnn.pad_sequence(chains, batch_first=True).to(counts.device)
    parents = torch.arange(tokens.shape[1], device=counts.device) - 1
    return Proposal(tokens, parents.expand(len(chains), -1), counts)
