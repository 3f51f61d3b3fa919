"""What the slots of a block attend to: the context before its anchor, and the block itself.

Slot k of the block of row t sees the context rows up to t of its document, and every slot of its own block. A layer
with a sliding window W sees, at every slot, the last W context rows only; where windows are causal, its slots see
those up to themselves. Nothing sees another block.

Letters in shapes: N context rows, A blocks, K slots a block, Q slots that attend, D width of a head, B sequences,
L context rows a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from specforge import flash
from specforge.models.block.documents import document_starts
from specforge.models.block.slots_as_heads import SlotsAsHeads
from specforge.models.masked_attention import masked_attention
from specforge.moving import moved
from specforge.precision import computed

# On a CPU: small enough that few keys are looked at in vain, large enough that each product is a large one.
QUERIES_PER_MASK = 256
QUERIES_PER_MASK_OF_ACCELERATORS = 2048

KeysAndValues = tuple[Tensor, Tensor]


class BlockAttention(Protocol):
    """How the slots of blocks attend in one layer, in training or in decoding."""

    def attend(
        self, query: Tensor, context: KeysAndValues, own: KeysAndValues, scale: float, window: int | None
    ) -> Tensor:
        """Attend in one layer; rotary positions are applied.

        Args:
            query: Of the slots that attend, [Q, heads, D].
            context: Keys and values of the context, in whatever shape the attention keeps them.
            own: Keys and values of all slots of all blocks, [A * K, key-value heads, D] each.
            scale: Factor of the logits.
            window: A slot sees only the last so many context rows; None for all.

        Returns:
            [Q, heads, D].
        """


@dataclass(frozen=True)
class _Part:
    """Some slots that attend together.

    Attributes:
        queries: Which of the slots that attend.
        context: The context rows that any of them sees.
        blocks: The slots of their blocks.
    """

    queries: slice
    context: slice
    blocks: slice


class PackedBlocks:
    """Attention of blocks of a packed batch: no mask of all slots and rows is ever made.

    FlashAttention runs blocks without a mask, except for windows that are causal within a block. Other devices and
    dtypes run some slots at a time with a mask.

    Args:
        document_ids: Which document a row belongs to, -1 for padding, [B, T], on the CPU.
        rows: Row t of each block, ascending, int64 [A], on the CPU.
        size: Number K of slots a block.
        slots: The slots that attend, ascending, int64 [Q], on the CPU; None for all of them.
        causal_windows: Whether layers with a sliding window are causal within a block.
        device: Where the slots attend.
    """

    def __init__(
        self,
        document_ids: Tensor,
        rows: Tensor,
        size: int,
        slots: Tensor | None,
        causal_windows: bool,
        device: torch.device,
    ) -> None:
        starts = document_starts(document_ids)[rows]
        self._given = rows, starts, size, slots, device
        slots = torch.arange(len(rows) * size) if slots is None else slots
        number = QUERIES_PER_MASK if device.type == "cpu" else QUERIES_PER_MASK_OF_ACCELERATORS
        self._parts = self._split(rows, starts, slots, size, number)
        self.rows, self.starts, self.slots = moved((rows, starts, slots), device)
        self.size = size
        self.causal_windows = causal_windows

    @staticmethod
    def _split(rows: Tensor, starts: Tensor, slots: Tensor, size: int, number: int) -> list[_Part]:
        first = torch.arange(0, len(slots), number)
        last = (first + number - 1).clamp(max=len(slots) - 1)
        begin, end = slots[first] // size, slots[last] // size
        # Rows ascend, so that the first block's document begins first.
        bounds = torch.stack([starts[begin], rows[end] + 1, begin * size, (end + 1) * size], dim=1)
        return [
            _Part(slice(index * number, (index + 1) * number), slice(low, high), slice(own_low, own_high))
            for index, (low, high, own_low, own_high) in enumerate(bounds.tolist())
        ]

    @torch.compiler.disable  # the parts differ from batch to batch
    def attend(
        self, query: Tensor, context: KeysAndValues, own: KeysAndValues, scale: float, window: int | None
    ) -> Tensor:
        """Attend in one layer; the context is of the flattened batch, [N, key-value heads, D] each."""
        asked = computed(query)
        if flash.takes(asked) and (window is None or not self.causal_windows):
            context, own = ((computed(key), computed(value)) for key, value in (context, own))
            return self._as_heads.attend(asked, context, own, scale, window)
        return torch.cat([self._attend(part, query, context, own, scale, window) for part in self._parts])

    @cached_property
    def _as_heads(self) -> SlotsAsHeads:
        return SlotsAsHeads(*self._given)

    def _attend(
        self, part: _Part, query: Tensor, context: KeysAndValues, own: KeysAndValues, scale: float, window: int | None
    ) -> Tensor:
        key, value = (
            torch.cat([before[part.context], block[part.blocks].to(before.dtype)]).transpose(0, 1)[None]
            for before, block in zip(context, own, strict=True)
        )
        visible = partial(self._visible, part, window)
        run: Any = masked_attention
        if query.device.type != "cpu" and torch.is_grad_enabled():
            # There the mask would be kept for the backward pass.
            run = partial(checkpoint, masked_attention, use_reentrant=False)
        attended: Tensor = run(query[part.queries].transpose(0, 1)[None], key, value, visible, scale)
        return attended[0].transpose(0, 1)

    def _visible(self, part: _Part, window: int | None) -> Tensor:
        """Return what some slots see of the context and of their blocks, bool [1, 1, Q, N + slots]."""
        slots = self.slots[part.queries, None]
        block = slots // self.size
        rows = torch.arange(part.context.start, part.context.stop, device=slots.device)
        last = self.rows[block]
        first = self.starts[block] if window is None else torch.maximum(self.starts[block], last + 1 - window)
        others = torch.arange(part.blocks.start, part.blocks.stop, device=slots.device)
        within = others // self.size == block
        if window is not None and self.causal_windows:
            within &= others <= slots
        return torch.cat([(rows >= first) & (rows <= last), within], dim=1)[None, None]


@dataclass(frozen=True)
class CachedContext:
    """Attention of one block for each of B sequences to its cached context.

    Attributes:
        lengths: Context rows of each sequence, int64 [B].
        causal_windows: Whether layers with a sliding window are causal within a block.
    """

    lengths: Tensor
    causal_windows: bool

    def attend(
        self, query: Tensor, context: KeysAndValues, own: KeysAndValues, scale: float, window: int | None
    ) -> Tensor:
        """Attend in one layer; the context is [B, key-value heads, L, D] each, padded after each sequence's rows."""
        batch = len(self.lengths)
        key, value = (
            torch.cat([before, block.unflatten(0, (batch, -1)).transpose(1, 2).to(before.dtype)], dim=2)
            for before, block in zip(context, own, strict=True)
        )
        queries = query.unflatten(0, (batch, -1)).transpose(1, 2).to(key.dtype)
        visible = self._visible(context[0].shape[2], len(own[0]) // batch, queries.shape[2], window)
        attended = F.scaled_dot_product_attention(queries, key, value, attn_mask=visible, scale=scale, enable_gqa=True)
        return attended.transpose(1, 2).flatten(0, 1)

    def _visible(self, rows: int, size: int, queries: int, window: int | None) -> Tensor:
        """Return what the last ``queries`` slots of each block see, bool [B, 1, queries, L + K]."""
        index = torch.arange(rows, device=self.lengths.device)
        seen = index < self.lengths[:, None]
        if window is not None:
            seen = seen & (index >= self.lengths[:, None] - window)
        own = torch.ones(queries, size, dtype=torch.bool, device=index.device)
        if window is not None and self.causal_windows:
            own = own.tril(size - queries)
        shape = (len(self.lengths), queries, -1)
        return torch.cat([seen[:, None].expand(*shape), own.expand(*shape)], dim=-1)[:, None]
