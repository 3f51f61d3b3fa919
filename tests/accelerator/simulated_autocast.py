"""Autocast on the simulated device, by CUDA's lists of operations; torch has none for devices written in Python."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_KEY = "AutocastPrivateUse1"
# https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float16" and "to float32"; those that
# training uses.
_SHORT = (
    *("linear", "matmul", "mm", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "mv"),
    *("scaled_dot_product_attention", "_grouped_mm"),
)
_WIDE = (
    *("exp", "log", "log1p", "log_softmax.int", "softmax.int", "rsqrt", "reciprocal", "pow.Tensor_Scalar", "sum"),
    *("sum.dim_IntList", "cumsum", "prod", "layer_norm", "kl_div", "nll_loss", "norm.Scalar"),
)

_short_weights: dict[int, tuple[Tensor, Tensor]] = {}
_keep: list[torch.library.Library] = []


def install() -> None:
    """Register the kernels; once per process."""
    everything = torch.library.Library("_", "IMPL", _KEY)
    everything.fallback(torch.library.fallthrough_kernel)
    aten = torch.library.Library("aten", "IMPL", _KEY)
    for names, cast in ((_SHORT, _shortened), (_WIDE, _widened)):
        for name in names:
            packet, _, overload = name.partition(".")
            aten.impl(name, partial(_run, getattr(getattr(torch.ops.aten, packet), overload or "default"), cast))
    _keep.extend((everything, aten))
    clear = torch.clear_autocast_cache

    def clear_both() -> None:
        _short_weights.clear()
        clear()

    torch.clear_autocast_cache = clear_both


def _run(function: Any, cast: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return function(*tree_map_only(Tensor, cast, args), **tree_map_only(Tensor, cast, kwargs))


def _shortened(tensor: Tensor) -> Tensor:
    """Cast to bfloat16; a weight once until the end of autocast."""
    if tensor.dtype != torch.float32:
        return tensor
    if not (tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled()):
        return tensor.to(torch.bfloat16)
    if id(tensor) not in _short_weights:
        _short_weights[id(tensor)] = tensor, tensor.to(torch.bfloat16)
    return _short_weights[id(tensor)][1]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
