"""A drafter for networks that propose a block in one pass: a round costs that pass, whatever is drafted of it.

The context of a sequence is kept as keys and values of each layer; of the block, nothing outlives the round. All slots
of the trained block are run even where fewer tokens are drafted, so that a shorter chain is the longer one cut short;
``shorten`` runs fewer, as a server does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.models.block.attention import CachedContext, KeysAndValues
from specforge.models.drafter import Drafter
from specforge.verifier.features import Features


class BlockNetwork(Protocol):
    """A draft network that proposes blocks of S tokens."""

    @property
    def draft_ids(self) -> Tensor | None:
        """The verifier's id of each draft token, int64 [D]; None where the vocabularies are the same."""

    @property
    def num_drafted(self) -> int:
        """Number S of tokens that a block proposes."""

    @property
    def causal_windows(self) -> bool:
        """Whether layers with a sliding window are causal within a block."""

    @property
    def memory_size(self) -> int:
        """Width R of what a head carries from slot to slot; 0 where it carries nothing."""

    def context_states(self, features: Features, position_ids: Tensor) -> list[KeysAndValues]:
        """Return keys and values of each layer at context rows, [B, T, key-value heads, D] each."""

    def run_blocks(
        self, tokens: Tensor, position_ids: Tensor, context: Sequence[KeysAndValues], attention: CachedContext
    ) -> Tensor:
        """Run one block for each anchor token, [B], at its position, [B]; return states of its S slots, [B, S, H]."""

    def shortened(self, num_drafted: int) -> Self:
        """Return a network with the same weights whose blocks propose fewer tokens."""

    def slot_logits(self, states: Tensor) -> Tensor:
        """Turn states of slots [..., H] into logits over the draft vocabulary [..., D], whatever came before."""

    def conditioned(self, logits: Tensor, states: Tensor, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Let slots know the token before the one that they predict.

        Args:
            logits: Result of ``slot_logits``, [B, W, D].
            states: Of the slots, [B, W, H].
            tokens: The token before, the verifier's ids, int64 [B, W].
            memory: What the slots before carried on, [B, W, R]; zeros at the first slot.

        Returns:
            Logits [B, W, D], and what the slots carry on, [B, W, R].
        """


class BlockDrafter(Drafter):
    """Drafts with blocks.

    Args:
        network: The network, attached to its verifier.
        batch_size: Number B of sequences.
        device: Where the network is.
    """

    reads_weights_once = True

    def __init__(self, network: BlockNetwork, batch_size: int, device: torch.device) -> None:
        self._network = network
        self._lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._context: list[KeysAndValues] = []
        self.draft_ids = network.draft_ids
        self.max_depth = network.num_drafted
        self.states = torch.empty(batch_size, 0)
        """States of the block's slots, [B, S, H]; set by ``commit``."""

    @torch.no_grad()
    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        """Add the new context, and run the block that begins with the last decided token."""
        positions = self._lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        new = self._network.context_states(features, positions)
        self._lengths = self._lengths + counts
        self._context = _grown(self._context, new, positions, int(self._lengths.max()))
        self._anchors = tokens.gather(1, counts[:, None] - 1)
        self._run()

    @torch.no_grad()
    def shorten(self, num_drafted: int) -> None:
        """Run this round's block again, and all later ones, with only the slots that propose so many tokens.

        The slots of a block see each other, so that their tokens differ from those of the whole block.

        Args:
            num_drafted: Number of tokens, from 1 to ``max_depth``.
        """
        if self._network.num_drafted != num_drafted:
            self._network = self._network.shortened(num_drafted)
            self._run()

    def _run(self) -> None:
        network, anchors = self._network, self._anchors
        attention = CachedContext(self._lengths, network.causal_windows)
        self.states = network.run_blocks(anchors[:, 0], self._lengths, self._context, attention)
        self._logits = network.slot_logits(self.states)
        # Of the root, then of the nodes.
        self._depths = torch.zeros_like(anchors)
        self._memory = self.states.new_zeros(len(anchors), 1, network.memory_size)
        logits, self._memory = self._at(torch.zeros_like(anchors), anchors, self._memory)
        self.root = logits[:, 0]

    @torch.no_grad()
    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Draft on from some nodes: each is read at the slot of its depth."""
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        depths = self._depths[rows, parents + 1] + 1
        logits, memory = self._at(depths, tokens, self._memory[rows, parents + 1])
        self._depths = torch.cat([self._depths, depths], dim=1)
        self._memory = torch.cat([self._memory, memory], dim=1)
        return logits

    def select(self, rows: Tensor) -> None:
        """Continue with some of the sequences."""
        self._lengths = self._lengths[rows]
        self._context = [(key[rows], value[rows]) for key, value in self._context]

    def _at(self, depths: Tensor, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(depths), device=depths.device)[:, None]
        return self._network.conditioned(self._logits[rows, depths], self.states[rows, depths], tokens, memory)


def _grown(
    known: list[KeysAndValues], new: list[KeysAndValues], positions: Tensor, longest: int
) -> list[KeysAndValues]:
    """Write new keys and values [B, T, heads, D] at their positions [B, T] into known ones, [B, heads, L, D]."""
    if not known:
        return [(key.transpose(1, 2), value.transpose(1, 2)) for key, value in new]
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    needed = int(positions.max()) + 1

    def joined(before: Tensor, added: Tensor) -> Tensor:
        room = F.pad(before, (0, 0, 0, needed - before.shape[2]))
        room[rows, :, positions] = added.to(room.dtype)
        return room[:, :, :longest]

    return [
        (joined(key, new_key), joined(value, new_value))
        for (key, value), (new_key, new_value) in zip(known, new, strict=True)
    ]
