"""Private names of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_aten = torch.ops.aten
Wrapper = TypeVar("Wrapper", bound=Tensor)

# What scaled_dot_product_attention runs on a CPU, and its gradients.
ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
# Products of rows with the matrix of the expert that each belongs to.
GROUPED_PRODUCT = _aten._grouped_mm
# In these a mask chooses entries.
CHOOSING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
# What ``item()`` and ``tolist()`` ask a tensor of one entry.
READS_VALUE = _aten._local_scalar_dense.default

NO_TORCH_FUNCTION: Any = torch._C._disabled_torch_function_impl
"""As a tensor class's ``__torch_function__``: nothing is done above ``__torch_dispatch__``."""


def wrapper(cls: type[Wrapper], content: Tensor) -> Wrapper:
    """Create a tensor of a class that has the shape, strides and type of another one and is on the CPU."""
    made: Wrapper = Tensor._make_wrapper_subclass(
        cls,
        content.shape,
        strides=content.stride(),
        storage_offset=content.storage_offset(),
        dtype=content.dtype,
        device=torch.device("cpu"),
    )
    return made


def packet(function: Any) -> Any:
    """Return the operation that an overload belongs to."""
    return function._overloadpacket


def map_own(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter and buffer of a module, not those of the modules in it."""
    module._apply(change, recurse=False)


def let_clip(optimizer: Optimizer) -> None:
    """Say of a fused optimizer that it leaves unscaling gradients to others.

    Lightning refuses to clip the gradients of optimizers that offer to unscale them, as fused ones do.
    """
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def add_summary(writer: SummaryWriter, summary: Any) -> None:
    """Write a summary as it is; ``add_hparams`` would write it to a file of its own."""
    writer._get_file_writer().add_summary(summary)
