"""Operations of the simulated device on tensors without values (meta), beside ids, masks and indices with values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_aten = torch.ops.aten
_INDEXING = {
    *(_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default),
}
_SHAPED_BY_TORCH = {_aten._flash_attention_forward.default, _aten._flash_attention_backward.default}
_META = torch.device("meta")


def run(function: Any, kernel: Callable[..., Any], args: Any, kwargs: dict[str, Any], to_device: bool) -> Any:
    """Run an operation on the contents of the device's tensors.

    Args:
        function: The operation.
        kernel: Its implementation on the CPU.
        args: Its arguments, with contents instead of the device's tensors.
        kwargs: Its keywords, likewise.
        to_device: Whether it copies to the device or creates a tensor there.

    Returns:
        The output: without values if an input has none, or if it is a new floating point tensor.
    """
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not any(one.is_meta for one in given):
        is_new = to_device and (not given or function is _aten._to_copy.default)
        output = kernel(*args, **(kwargs | {"device": _META})) if is_new else None
        return output if output is not None and output.is_floating_point() else kernel(*args, **kwargs)
    if function is _aten._local_scalar_dense.default:
        return torch.ones((), dtype=given[0].dtype).item()
    if function is _aten._to_copy.default and not to_device and kwargs.get("device") is not None:
        # At the end, Lightning copies weights and the optimizer's states of any size to the CPU.
        return torch.ones((), dtype=kwargs.get("dtype") or given[0].dtype).expand(given[0].shape)
    if function is _aten.copy_.default and not args[0].is_meta:
        return args[0].fill_(1)
    if function in _INDEXING:
        # A mask with values chooses as many entries as it has.
        args = (args[0], [part for index in args[1] for part in _chosen(index)], *args[2:])
    args, kwargs = tree_map_only(Tensor, lambda one: one if one.is_meta else one.to(_META), (args, kwargs))
    # Operations with implementations of their own on the device have their shapes from torch.
    run = kernel if function not in _SHAPED_BY_TORCH else function
    return run(*args, **(kwargs | {"device": _META} if kwargs.get("device") is not None else kwargs))


def _chosen(index: Tensor | None) -> tuple[Tensor | None, ...]:
    is_mask = index is not None and index.dtype == torch.bool and not index.is_meta
    return index.nonzero(as_tuple=True) if is_mask else (index,)
