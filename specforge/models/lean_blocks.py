"""Blocks of transformers that keep less for the backward pass, with the same weights and results.

Autograd keeps the inputs of each operation: for a norm both the state and the normalised state, for a gated
feed-forward block both the gate and its activation. The second follows from the first by an elementwise operation and
is recomputed when needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from specforge.precision import computed
from specforge.private.torch import LAYER_NORM_BACKWARD


def use_memory_saving_blocks(network: nn.Module) -> None:
    """Replace norms and gated feed-forward blocks that compute the same as Llama's, in any family, in place.

    Args:
        network: Any module; its weights and their names stay the same.
    """
    for module in network.modules():
        if _computes_as(module, LlamaRMSNorm):
            module.__class__ = LeanRMSNorm
        elif _computes_as(module, LlamaMLP) and isinstance(module.act_fn, SiLUActivation):
            module.__class__ = LeanMLP


class LeanRMSNorm(LlamaRMSNorm):
    """RMSNorm that keeps only its input (https://arxiv.org/abs/1910.07467, equation 4)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise states [..., H]; with autocast, to its dtype, so that products that read them share one copy."""
        return cast(Tensor, _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon))


class LeanMLP(LlamaMLP):
    """Feed-forward block gated by SiLU that does not keep the activation (https://arxiv.org/abs/2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., H] from [..., H]."""
        return cast(Tensor, self.down_proj(_SiLUGate.apply(self.gate_proj(x), self.up_proj(x))))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.epsilon = epsilon
        # Compiled, the formula is fused with what surrounds it; the kernel's gradient cannot be traced.
        if _has_fused_norm(states.device) and not torch.compiler.is_compiling():
            ctx.save_for_backward(states, weight)
            output = _fused_norm(_widened(states), weight, epsilon)
            return computed(output.to(torch.promote_types(weight.dtype, states.dtype)))
        wide = _widened(states)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(states, weight, scale)
        return computed(weight * (wide * scale).to(states.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, *rest = ctx.saved_tensors
        if not rest:
            return *_gradients_of_fused_norm(gradient, states, weight, ctx.epsilon), None
        of_states, of_weight = _gradients(
            _widened(gradient), _widened(states), _widened(weight), rest[0], ctx.needs_input_grad[:2]
        )
        return (
            None if of_states is None else of_states.to(states.dtype),
            None if of_weight is None else of_weight.to(weight.dtype),
            None,
        )


def _gradients(
    gradient: Tensor, states: Tensor, weight: Tensor, scale: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of states [..., H] and weight [H], those that are needed, by the kernel of layer norms."""
    mean = torch.zeros_like(scale)
    of_states, of_weight, _ = LAYER_NORM_BACKWARD(
        gradient, states, weight.shape, mean, scale, weight, None, [*needed, False]
    )
    if of_states is not None:
        # The kernel has subtracted the mean of gradient * weight, since a layer norm subtracts the states' mean.
        of_states.add_((gradient * weight).mean(-1, keepdim=True).mul_(scale))
    return of_states, of_weight


def _has_fused_norm(device: torch.device) -> bool:
    return device.type != "cpu"


def _fused_norm(wide: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), epsilon)


def _gradients_of_fused_norm(gradient: Tensor, states: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    # Run again: the kernel keeps its input in float32, which is twice as large as the states.
    with torch.enable_grad():
        leaves = states.detach().requires_grad_(), weight.detach().requires_grad_()
        output = _fused_norm(_widened(leaves[0]), leaves[1], epsilon)
        of_states, of_weight = torch.autograd.grad(output, leaves, gradient.to(output.dtype))
    return of_states, of_weight


class _SiLUGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _computes_as(module: nn.Module, example: type[nn.Module]) -> bool:
    """Return whether a module's ``forward`` has the same source code as that of ``example``, as in copied families."""
    return _source_of(type(module).forward) == _source_of(example.forward)


@cache
def _source_of(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
