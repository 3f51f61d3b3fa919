"""Estimates what torch.compile would make of the operations between a draft's products, from an eager step.

Consecutive elementwise operations and reductions become one kernel, which reads once what existed before and writes
what still exists after it. A compiler can do a little more, such as to compute again in the backward pass what is kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from simulated_device import DeviceTensor
from torch import Tensor

FUSIBLE = {
    *(
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "neg",
        "pow",
        "square",
        "rsqrt",
        "reciprocal",
        "exp",
        "cos",
        "sin",
        "sigmoid",
    ),
    *("silu", "silu_backward", "norm", "norm_backward", "sum", "mean", "where", "masked_fill", "cat", "stack"),
    *("copy", "_to_copy", "clone", "fill", "zero", "zeros", "zeros_like", "ones_like", "slice_backward"),
}


@dataclass
class Fusion:
    """A kernel that grows operation by operation.

    Attributes:
        part: Part of the step.
        kernels: Number of kernels: one, and one for each sum over rows.
    """

    part: str
    kernels: int = 1
    _read: dict[int, int] = field(default_factory=dict)
    _overwritten: dict[int, int] = field(default_factory=dict)
    _made: dict[int, tuple[weakref.ref[Any], int]] = field(default_factory=dict)

    def add(
        self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], size: Callable[[Tensor], int]
    ) -> None:
        """Add an operation; ``size`` returns the bytes of a tensor."""
        for one in inputs:
            if (key := _key(one)) not in self._made:
                self._read[key] = max(self._read.get(key, 0), size(one))
        for one in outputs:
            key = _key(one)
            if any(key == _key(other) for other in inputs):
                if key not in self._made:
                    self._overwritten[key] = size(one)
            else:
                self._made[key] = weakref.ref(_storage(one)), size(one)
        if name == "sum" and outputs[0].shape[-1:] == inputs[0].shape[-1:]:
            self.kernels += 1

    @property
    def bytes(self) -> int:
        """Bytes that are read and written, if no further operation is added."""
        written = sum(size for reference, size in self._made.values() if reference() is not None)
        return sum(self._read.values()) + sum(self._overwritten.values()) + written


def _storage(tensor: Tensor) -> Any:
    return (tensor.content if isinstance(tensor, DeviceTensor) else tensor).untyped_storage()


def _key(tensor: Tensor) -> int:
    return id(_storage(tensor))
