"""Attention with a mask that is recomputed in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.precision import computed
from specforge.private.torch import ATTENTION, ATTENTION_BACKWARD


def masked_attention(query: Tensor, key: Tensor, value: Tensor, visible: Callable[[], Tensor], scale: float) -> Tensor:
    """Attend with a mask.

    On a CPU the mask is not kept after the call; on accelerators torch keeps it.

    Args:
        query: [G, heads, Q, D].
        key: [G, key-value heads, L, D].
        value: [G, key-value heads, L, D].
        visible: Returns what each query sees, bool [G, 1, Q, L]; always the same, and at least one key per query.
        scale: Factor of the logits.

    Returns:
        [G, heads, Q, D].
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible(), scale=scale, enable_gqa=True)
    return cast(Tensor, _OnCPU.apply(*map(computed, (query, key, value)), visible, scale))


class _OnCPU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, visible: Callable[[], Tensor], scale: float
    ) -> Tensor:
        output, logsumexp = ATTENTION(query, key, value, attn_mask=_summand(visible(), query.dtype), scale=scale)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.visible, ctx.scale = visible, scale
        return cast(Tensor, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, *kept = ctx.saved_tensors
        mask = _summand(ctx.visible(), query.dtype)
        return *ATTENTION_BACKWARD(gradient, query, *kept, 0.0, False, attn_mask=mask, scale=ctx.scale), None, None


def _summand(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a visibility mask to a summand of the logits."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
