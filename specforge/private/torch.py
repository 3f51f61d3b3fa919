"""Private names of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, _muon
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_aten = torch.ops.aten
Wrapper = TypeVar("Wrapper", bound=Tensor)

# The operators of scaled_dot_product_attention on a CPU, forward and backward.
ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
# FlashAttention over sequences of different lengths; the public function takes no log-sum-exp for its backward pass.
FLASH_ATTENTION = _aten._flash_attention_forward
FLASH_ATTENTION_BACKWARD = _aten._flash_attention_backward
# The gradient of a layer norm, which takes its mean and scale.
LAYER_NORM_BACKWARD = _aten.native_layer_norm_backward
# Products of rows with the matrix of each row's expert.
GROUPED_PRODUCT = _aten._grouped_mm
# Operators in which a mask may choose entries.
CHOOSING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
# The operator of ``item()`` and ``tolist()`` on a tensor of one entry.
READS_VALUE = _aten._local_scalar_dense.default

NO_TORCH_FUNCTION: Any = torch._C._disabled_torch_function_impl
"""``__torch_function__`` of a tensor class that works only through ``__torch_dispatch__``."""


def wrapper(cls: type[Wrapper], content: Tensor) -> Wrapper:
    """Create a tensor of a class with the shape, strides and dtype of another tensor, on the CPU."""
    made: Wrapper = Tensor._make_wrapper_subclass(
        cls,
        content.shape,
        strides=content.stride(),
        storage_offset=content.storage_offset(),
        dtype=content.dtype,
        device=torch.device("cpu"),
    )
    return made


def shared_zeros(number: int) -> Tensor:
    """Return zeros, uint8 [number], in memory that other processes can map without a copy."""
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(max(number, 1)))[:number]


def packet(function: Any) -> Any:
    """Return the operation that an overload belongs to."""
    return function._overloadpacket


def map_own(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter and buffer of a module, but not those of its submodules."""
    module._apply(change, recurse=False)


def let_clip(optimizer: Optimizer) -> None:
    """Mark a fused optimizer as not unscaling gradients.

    Lightning refuses to clip the gradients of optimizers that can unscale them, as fused ones can.
    """
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


_newton_schulz_in_bfloat16 = _muon._zeropower_via_newtonschulz


def _newton_schulz(grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Tensor:
    if grad.device.type != "cpu":
        return _newton_schulz_in_bfloat16(grad, ns_coefficients, ns_steps, eps)
    a, b, c = ns_coefficients
    is_tall = grad.size(0) > grad.size(1)
    found = grad.float().T if is_tall else grad.float()
    found = found / found.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if is_tall else found


def let_muon_use_float32() -> None:
    """Let ``torch.optim.Muon`` orthogonalise in float32 on a CPU, where bfloat16 takes several times as long.

    The iteration is torch's own: equation 1 of https://arxiv.org/abs/2502.16982.
    """
    _muon._zeropower_via_newtonschulz = _newton_schulz


def add_summary(writer: SummaryWriter, summary: Any) -> None:
    """Write a summary unchanged; ``add_hparams`` would write it to a separate file."""
    writer._get_file_writer().add_summary(summary)
