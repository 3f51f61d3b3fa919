"""Several heads, one for each step (https://arxiv.org/abs/2412.19437, section 2.2).

Row t at step k reads x_{t+1+k} beside its own state of step k - 1, which is that of the previous token, x_{t+k}: seen
by tokens, the heads are layers, of which each reads the embedding of the token and the layer below at the token before
it. Head k attends to its own keys at the rows up to t, which are tokens x_{1+k} .. x_{t+1+k}. So a drafter runs each
token once through the heads, and a token after d drafted ones only through heads d and later: its rows of the earlier
ones would need states that the verifier has not computed.

Letters in shapes: B rows or sequences, T or Q tokens, N rows (a flattened batch), W stepped nodes, K heads, H width,
P pairs of row and step that are run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.models.chain.alignment import step_tokens
from specforge.models.chain.ttt_attention import TrainingTimeTest
from specforge.models.draft_rows import DraftRows
from specforge.models.drafter import Drafter
from specforge.models.tree_cache import TreeCache
from specforge.verifier.features import Features

if TYPE_CHECKING:
    from specforge_mtp.model import MtpDraftModel


def run_depths(
    network: MtpDraftModel, input_ids: Tensor, feature: Tensor, position_ids: Tensor, rows: DraftRows
) -> Tensor:
    """Run each step with its own head, fed with the true tokens.

    All rows are run but at the last step: those of a later step attend to them.

    Args:
        network: The heads.
        input_ids: The verifier's tokens x, [B, T].
        feature: The first step's input, [B, T, H].
        position_ids: Position of each row at step 0, [B, T].
        rows: The rows whose states are needed at each step.

    Returns:
        Their states, concatenated step by step, [P, H].
    """
    tokens = step_tokens(input_ids, len(rows.counts)).flatten(1)[:, None, rows.order]
    positions = position_ids.flatten()[None, rows.order]
    read = feature.flatten(0, 1)[None, rows.order]
    states = []
    for step, count in enumerate(rows.counts):
        run = count if step == len(rows.counts) - 1 else len(rows.order)
        attention = TrainingTimeTest(replace(rows, counts=(run,))).at(0)
        read = network.advance(tokens[step], read, positions + step, attention, run, step)
        states.append(read[:, :count])
    return torch.cat(states, dim=1)[0]


class DepthCache(TreeCache):
    """Keys and values of the heads, a layer each, in which head k has no rows for the first k tokens."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """Attend in one head and cache keys and values."""
        if layer == 0:
            return super().attend(layer, query, key, value, scale, window)
        keys, values = self.update(key, value, layer)
        slots, new = keys.shape[2], query.shape[2]
        numbers = torch.arange(slots, device=query.device)
        itself = numbers == numbers[-new:, None]
        visible = self.visible(window)
        if visible is None:
            visible, index = numbers <= numbers[-new:, None], numbers.expand(len(query), -1)
        else:
            pending = self.lengths[:, None] + self._depths
            index = torch.cat([numbers[: slots - pending.shape[1]].expand(len(query), -1), pending], dim=1)
        # A token sees itself, so that the softmax of those without a row is a number.
        mask = (visible & (index >= layer)[:, None]) | itself
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask[:, None], scale=scale, enable_gqa=True
        )


class DepthDrafter(Drafter):
    """Drafts with several heads: at most as many tokens as there are heads.

    Args:
        network: The heads, attached to their verifier.
        batch_size: Number B of sequences.
        device: Device of the heads.
    """

    reads_weights_once = True

    def __init__(self, network: MtpDraftModel, batch_size: int, device: torch.device) -> None:
        self._network = network
        self._cache = DepthCache(batch_size, device)
        self._last: Tensor | None = None
        self.max_depth = network.num_heads

    @torch.no_grad()
    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        """Run the decided tokens through all heads."""
        self._cache.drop()
        index = self._cache.extend(tokens.shape[1])
        read = self._network.first_feature(features)
        states = []
        for head in range(self._network.num_heads):
            states.append(self._network.advance(tokens, read, index, self._cache, head=head))
            before = torch.zeros_like(read[:, :1]) if self._last is None else self._last[:, None, head]
            read = torch.cat([before.to(states[-1].dtype), states[-1][:, :-1]], dim=1)
        self._cache.keep_first(counts)
        self._last = torch.stack(states, dim=2)[torch.arange(len(tokens), device=tokens.device), counts - 1]
        # Of the root, then of the nodes: the states of all heads, and the number of drafted tokens.
        self._states, self._depths = self._last[:, None], torch.zeros_like(tokens[:, :1])
        self.root = self._network.state_logits(self._last[:, 0])

    @torch.no_grad()
    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Extend some nodes: each head reads the states that the one before it computed for their parents."""
        index = self._cache.append(parents)
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        depths = self._depths[rows, parents + 1] + 1
        of_parents = self._states[rows, parents + 1]
        states = [torch.zeros_like(of_parents[:, :, 0])]
        for head in range(1, self._network.num_heads):
            read = of_parents[:, :, head - 1]
            states.append(self._network.advance(tokens, read, index, self._cache, head=head))
        found = torch.stack(states, dim=2)
        self._states = torch.cat([self._states, found], dim=1)
        self._depths = torch.cat([self._depths, depths], dim=1)
        own = found[rows, torch.arange(tokens.shape[1], device=tokens.device), depths]
        return self._network.state_logits(own)

    def select(self, rows: Tensor) -> None:
        """Continue with some of the sequences."""
        self._cache.drop()
        self._cache.select(rows)
        assert self._last is not None
        self._last = self._last[rows]
