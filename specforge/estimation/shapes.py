"""Tensors with shape and dtype but no values, to count the operations and memory of real code.

Inside ``ShapeMode``, floating point tensors are created as ``ShapeTensor``, and operations on one return one. Ids,
masks and indices stay real, so that code which reads their values (which rows are supervised, where a document ends)
runs unchanged. Matrix products are counted by torch's own formulas, and storages as they are created and freed.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, shape_wrapper

from specforge.private.torch import (
    ATTENTION,
    ATTENTION_BACKWARD,
    CHOOSING,
    GROUPED_PRODUCT,
    NO_TORCH_FUNCTION,
    READS_VALUE,
    TorchDispatchMode,
    packet,
    tree_leaves,
    tree_map_only,
    wrapper,
)


class ShapeTensor(Tensor):
    """A tensor without values that appears to be on the CPU.

    Args:
        content: The same tensor on the meta device.
    """

    content: Tensor
    __torch_function__: Any = NO_TORCH_FUNCTION

    @staticmethod
    def __new__(cls, content: Tensor) -> Self:
        """Wrap a tensor on the meta device."""
        shape = wrapper(cls, content)
        shape.content = content
        return shape

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        """Refuse to compute outside ``ShapeMode``."""
        raise RuntimeError(f"{function} was called on a tensor without values, outside ShapeMode()")


class ShapeMode(TorchDispatchMode):
    """Computes only shapes, and counts operations and memory.

    Attributes:
        flops: Floating point operations by part (see ``part``); a multiply-add counts as two.
        live: Bytes of the storages that exist.
        peak: Peak of ``live`` since ``restart``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.live = 0
        self.peak = 0
        self._part = ""
        self._storages: dict[int, weakref.ref[Any]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the operations inside under a name."""
        outer, self._part = self._part, name
        try:
            yield
        finally:
            self._part = outer

    def restart(self) -> None:
        """Reset operations and peak, but not the live storages."""
        self.flops.clear()
        self.peak = self.live

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation: on shapes if it reads a ``ShapeTensor`` or creates floats, with values otherwise."""
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        known = {id(one.content): one for one in given if isinstance(one, ShapeTensor)}
        if given and not known:
            return function(*args, **kwargs)
        if function is READS_VALUE:
            raise RuntimeError("the value of a tensor without values was read")
        inner_args, inner_kwargs = tree_map_only(Tensor, lambda one: _content(function, one), (args, kwargs))
        result = function(*inner_args, **_on_meta(inner_kwargs))
        if not given and not _is_number(result):
            return function(*args, **kwargs)
        formula = _FORMULAS.get(packet(function))
        if formula is not None:
            self.flops[self._part] += formula(*inner_args, **inner_kwargs, out_val=result)
        # In-place operations return the same tensor.
        return tree_map_only(Tensor, lambda one: known[id(one)] if id(one) in known else self._wrap(one), result)

    def _wrap(self, content: Tensor) -> ShapeTensor:
        storage = content.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._storages:

            def end(_: Any) -> None:
                self.live -= size
                del self._storages[key]

            self._storages[key] = weakref.ref(storage, end)
            self.live += size
            self.peak = max(self.peak, self.live)
        return ShapeTensor(content)


def _content(function: Any, tensor: Tensor) -> Tensor:
    if isinstance(tensor, ShapeTensor):
        return tensor.content
    # With a boolean mask, the shape of the result depends on the mask's values.
    return tensor if function in CHOOSING and tensor.dtype == torch.bool else tensor.to("meta")


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Replace the device by the meta device, which needs no generator."""
    replaced = {"device": "meta", "generator": None}
    return {name: replaced.get(name, value) for name, value in kwargs.items()}


def _is_number(result: Any) -> bool:
    return isinstance(result, Tensor) and result.is_floating_point()


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Scores and weighted values, every query with every key: 2 products."""
    return _pairs(query, key) * 2 * (query[-1] + value[-1])


def _attention_backward_flops(
    _: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *__: Any, **___: Any
) -> int:
    """Recomputed scores, and the gradients of scores, query, key and value: 5 products."""
    return _pairs(query, key) * 2 * (3 * query[-1] + 2 * value[-1])


def _grouped_flops(rows: torch.Size, experts: torch.Size, *_: Any, **__: Any) -> int:
    """Each row with the matrix of its expert."""
    return 2 * rows.numel() * experts[-1]


def _pairs(query: torch.Size, key: torch.Size) -> int:
    return query[:-1].numel() * key[-2]


MORE_FORMULAS: dict[Any, Callable[..., int]] = {
    ATTENTION: _attention_flops,
    ATTENTION_BACKWARD: _attention_backward_flops,
    GROUPED_PRODUCT: _grouped_flops,
}
"""Formulas that torch lacks, from argument shapes to operations: attention on the CPU, grouped products of experts."""
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    **{function: shape_wrapper(formula) for function, formula in MORE_FORMULAS.items()},
}
