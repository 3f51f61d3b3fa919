"""Attention, norms and gates as one operation on the simulated device, as on a GPU, by kernels of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flash_reference import flash_attention, flash_attention_backward
from torch import Tensor

from specforge import flash

_aten = torch.ops.aten
FUSED = _aten._scaled_dot_product_fused_attention_overrideable.default
FUSED_BACKWARD = _aten._scaled_dot_product_fused_attention_overrideable_backward.default
FLASH = _aten._flash_attention_forward.default
FLASH_BACKWARD = _aten._flash_attention_backward.default
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
_keep: list[torch.library.Library] = []


def install() -> None:
    """Register operations that torch would compute by their formulas on this device."""
    flash.has_flash = lambda device: device.type != "cpu"
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        aten = torch.library.Library("aten", "IMPL", key)
        aten.impl("scaled_dot_product_attention", _attention)
        aten.impl("rms_norm", _rms_norm)
        aten.impl("silu_backward", _silu_backward)
        _keep.append(aten)


def _rms_norm(states: Tensor, shape: list[int], weight: Tensor | None, epsilon: float) -> Tensor:
    return _norm(states, states.new_ones(shape) if weight is None else weight, epsilon)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.shape[-1] != value.shape[-1]:
        masked = query, key, value, attn_mask, dropout_p, is_causal
        return _aten._scaled_dot_product_attention_math(*masked, scale=scale, enable_gqa=enable_gqa)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    return FUSED(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    output, logsumexp = _ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_bias, scale=scale)
    empty = query.new_empty(0, dtype=torch.int64)
    return output, logsumexp, empty, empty, query.shape[2], key.shape[2], empty, empty, query.new_empty(0)


def _fused_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    grad_input_mask: list[bool],
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *_: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = _ATTENTION_BACKWARD(
        *(gradient, query, key, value, out, logsumexp, dropout_p, is_causal), attn_mask=attn_bias, scale=scale
    )
    return *found, query.new_empty(0)


@torch.library.custom_op("simulated::norm", mutates_args=())
def _norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return states * (states.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight


@torch.library.custom_op("simulated::norm_backward", mutates_args=())
def _norm_backward(gradient: Tensor, states: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    scale = (states.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    normalised, of_normalised = states * scale, gradient * weight
    along = (of_normalised * normalised).mean(-1, keepdim=True)
    return (of_normalised - normalised * along) * scale, (gradient * normalised).flatten(0, -2).sum(0)


@torch.library.custom_op("simulated::silu_backward", mutates_args=())
def _silu_backward(gradient: Tensor, states: Tensor) -> Tensor:
    return _aten.silu_backward(gradient, states)


_silu_backward.register_fake(lambda _, states: torch.empty_like(states))
_norm.register_fake(lambda states, *_: torch.empty_like(states))
_norm_backward.register_fake(lambda _, states, weight, *__: (torch.empty_like(states), torch.empty_like(weight)))


def _keep_inputs(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.epsilon = inputs[2]


_norm.register_autograd(
    lambda ctx, gradient: (*_norm_backward(gradient, *ctx.saved_tensors, ctx.epsilon), None),
    setup_context=_keep_inputs,
)


CPU_VERSIONS: dict[Any, Callable[..., Any]] = {
    FUSED: _fused,
    FUSED_BACKWARD: _fused_backward,
    FLASH: flash_attention,
    FLASH_BACKWARD: flash_attention_backward,
}


def _pairs(query: Tensor, key: Tensor, is_causal: bool) -> int:
    every: int = query.shape[:-1].numel() * key.shape[-2]
    return every // 2 if is_causal else every


def _pairs_of_sequences(query: Tensor, of_queries: Any, of_keys: Any) -> int:
    """Every query of a sequence sees the keys up to its own position, counted from the end."""
    queries, keys = (ends.content.diff().tolist() for ends in (of_queries, of_keys))
    return query.shape[1] * sum(q * k - q * (q - 1) // 2 for q, k in zip(queries, keys, strict=True))


ATTENTION_PAIRS: dict[Any, tuple[bool, Callable[..., int]]] = {
    FUSED: (False, lambda query, key, _, bias=None, dropout=0.0, causal=False, *rest: _pairs(query, key, causal)),
    FUSED_BACKWARD: (True, lambda _, query, key, *rest: _pairs(query, key, rest[10])),
    FLASH: (False, lambda query, key, value, *ends: _pairs_of_sequences(query, *ends[:2])),
    FLASH_BACKWARD: (True, lambda _, query, *rest: _pairs_of_sequences(query, *rest[4:6])),
}
"""Fused attention: whether it is a backward pass, and how many pairs of query and key, over all heads, are computed."""
