"""Counts what a training step asks of the simulated device, and simulates when a GPU would do it.

Kernels, views, waits of the host, floating point operations and bytes are counted by part of the step; a backward pass
by the part that its forward pass was of. The times are those of ``Rates``, which are assumptions.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import simulated_device
import torch
import waits
from fusion import FUSIBLE, Fusion
from simulated_device import DeviceTensor
from simulated_kernels import ATTENTION_PAIRS, FLASH_BACKWARD
from torch import Tensor
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_VIEWS = {
    *("view", "_unsafe_view", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "t", "permute"),
    *("as_strided", "detach", "alias", "split", "split_with_sizes", "unbind", "unfold", "diagonal", "_reshape_alias"),
    *("lift_fresh", "is_same_size", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
    *("set_", "resize_", "record_stream", "_has_compatible_shallow_copy_type"),
}
# Kernels of an operation that launches several.
_SEVERAL = {"nonzero": 4, "_unique2": 8, "sort": 3, "argsort": 3, "index_put_bool": 6, "index_bool": 6}
_GATHERS = {"index", "embedding", "gather", "index_select"}
_SCATTERS = {"index_put_", "_index_put_impl_", "index_put", "index_copy", "index_copy_", "index_add", "index_add_"}
BACKWARD = "backward"
OTHER = "other"


@dataclass(frozen=True)
class Rates:
    """Assumed times of a host and a GPU: an H200, without having been measured on one.

    Attributes:
        kernel: Seconds of the host to launch a kernel.
        view: Seconds of the host for a view.
        wait: Seconds of the host to continue after the device has finished.
        least: Least seconds of a kernel.
        bandwidth: Bytes per second of memory, as measured for copies.
        products: Operations per second of matrix products: 70 % of 790e12.
        attention: Operations per second of fused attention, forward.
        attention_backward: The same, backward.
    """

    kernel: float = 5e-6
    view: float = 1.5e-6
    wait: float = 12e-6
    least: float = 2e-6
    bandwidth: float = 4.3e12
    products: float = 0.7 * 790e12
    attention: float = 280e12
    attention_backward: float = 200e12


RATES = Rates()
PEAK = 790e12


@dataclass(frozen=True)
class Event:
    """Something that the host does: launch kernels, make a view, mark a point, or wait.

    Attributes:
        part: Part of the step.
        kind: kernel, view, mark, wait, or wait for a mark.
        kernels: Number of kernels.
        seconds: What they take on the device.
        mark: The mark that is set or waited for.
    """

    part: str
    kind: str
    kernels: int = 0
    seconds: float = 0.0
    mark: int = 0


@dataclass
class StepCounts:
    """The counts of a step.

    Attributes:
        kernels: Number of kernels by part.
        views: Number of views and allocations by part.
        bytes: Bytes that kernels without products read and write, by part.
        flops: Operations of matrix products by part.
        attention_flops: Operations of fused attention by part.
        waits: How often the host waits, by part, kind and line.
        bytes_by_operation: ``bytes`` by part and operation.
        kernels_by_operation: ``kernels`` by part and operation.
        events: Everything in the host's order.
        peak: Peak of the device's memory in bytes, of all tensors that exist.
        held: What exists at the peak, in bytes by the part and operation that made it.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    views: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    attention_flops: Counter[str] = field(default_factory=Counter)
    waits: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    bytes_by_operation: Counter[tuple[str, str]] = field(default_factory=Counter)
    kernels_by_operation: Counter[tuple[str, str]] = field(default_factory=Counter)
    events: list[Event] = field(default_factory=list)
    peak: int = 0
    held: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def all_flops(self) -> int:
        """Operations of products and attention."""
        return self.flops.total() + self.attention_flops.total()

    def simulated(self, rates: Rates = RATES) -> Timeline:
        """Simulate the step: the host runs ahead of the device, except where it waits."""
        host = device = busy = 0.0
        marks = {}
        by_part: Counter[str] = Counter()
        for event in self.events:
            if event.kind == "view":
                host += rates.view
            elif event.kind == "mark":
                marks[event.mark] = device
            elif event.kind == "wait":
                host = max(host, device if not event.mark else marks.get(event.mark, 0.0)) + rates.wait
            else:
                host += rates.kernel * event.kernels
                seconds = max(rates.least * event.kernels, event.seconds)
                device = max(device, host) + seconds
                busy += seconds
                by_part[event.part] += seconds
        return Timeline(max(host, device), busy, host, by_part)


@dataclass(frozen=True)
class Timeline:
    """A simulated step.

    Attributes:
        seconds: Time of the step.
        busy: Time in which the device computes.
        host: Time until the host has launched everything.
        by_part: ``busy`` by part.
    """

    seconds: float
    busy: float
    host: float
    by_part: Counter[str]


class Counting:
    """Counts the operations between ``start`` and ``stop``; memory from its creation on.

    Args:
        compiled: Parts whose elementwise operations are counted as torch.compile would fuse them.

    Attributes:
        counts: The counts.
    """

    def __init__(self, compiled: Collection[str] = ()) -> None:
        self.counts = StepCounts()
        self._compiled = compiled
        self._weights: set[torch.Size] = set()
        self._fusion: Fusion | None = None
        self._parts = [OTHER]
        self._counts_now = False
        self._forward: dict[int, str] = {}
        self._live: Counter[tuple[str, str]] = Counter()
        self._storages: dict[int, weakref.ref[Any]] = {}
        simulated_device.LISTENERS.append(self._listen)

    def start(self, weights: Iterable[Tensor] = ()) -> None:
        """Start to count.

        Args:
            weights: Weights of compiled parts; the addition of their gradients is not fused.
        """
        self._weights = {one.shape for one in weights}
        self._counts_now = True
        self.counts.peak = 0
        self._measure()

    def stop(self) -> None:
        """Stop counting."""
        self._end_fusion()
        self._counts_now = False
        simulated_device.LISTENERS.remove(self._listen)

    def enter(self, part: str) -> None:
        """Count what follows under a name."""
        self._parts.append(part)

    def leave(self) -> None:
        """Count what follows under the name before."""
        self._parts.pop()

    def name_part(self, owner: Any, method: str, part: str) -> None:
        """Count a method or function of a class or module under a name."""
        original = getattr(owner, method)

        @wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return original(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, method, run)

    def _listen(self, function: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        outputs = [one for one in tree_leaves(output) if isinstance(one, Tensor)]
        for one in outputs:
            if isinstance(one, DeviceTensor):
                self._hold(one.content, _name(function))
        if not self._counts_now:
            return
        if function is simulated_device.Event.record:
            self.counts.events.append(Event(self._part(), "mark", mark=id(args[0])))
            return
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        kind = waits.kind_of(function, args, kwargs)
        on_device = kind != waits.EVENT and any(isinstance(one, DeviceTensor) for one in (*inputs, *outputs))
        if on_device:
            self._add(function, args, inputs, outputs)
        if kind is not None:
            part = self._part()
            self.counts.waits[part, kind, waits.caller()] += 1
            mark = id(args[0]) if kind == waits.EVENT else 0
            self.counts.events.append(Event(part, "wait", mark=mark))

    def _add(self, function: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        counts, part = self.counts, self._part()
        name = _name(function)
        if name in _VIEWS:
            # Compiled code makes views at no cost.
            if part not in self._compiled:
                counts.views[part] += 1
                counts.events.append(Event(part, "view"))
            return
        if self._fuses(part, name, inputs, outputs):
            return
        if name == "_to_copy" and part in self._compiled and self._is_weight(outputs[0]):
            return  # counted with the products
        masked = name in _GATHERS | _SCATTERS and any(one.dtype == torch.bool for one in inputs[1:])
        kernels = _SEVERAL.get(f"{name.rstrip('_')}_bool" if masked else name, 1)
        if function in ATTENTION_PAIRS:
            backward, pairs = ATTENTION_PAIRS[function]
            flops = _attention_flops(args, pairs, backward)
            counts.attention_flops[part] += flops
            rate = RATES.attention_backward if backward else RATES.attention
            # Backward: the products of gradients and outputs, the main kernel, and the conversion of a gradient.
            kernels, seconds = 3 if backward else 1, flops / rate
            moved = sum(map(_size, inputs)) + sum(map(_size, outputs))
            if function is FLASH_BACKWARD and (by_head := _gradients_by_head(*args[1:3])):
                # Two more kernels sum over the heads that share a key.
                kernels, seconds, moved = kernels + 2, seconds + by_head / RATES.bandwidth, moved + 2 * by_head
                self._measure(by_head)
        elif (packet := getattr(function, "_overloadpacket", None)) in _PRODUCTS:
            flops = _PRODUCTS[packet](*args)
            counts.flops[part] += flops
            # A product of many small matrices is as slow as reading and writing them.
            read = sum(map(_size, inputs)) + sum(map(_size, outputs))
            moved = self._converted(part, outputs if part.startswith(BACKWARD) else inputs)
            seconds = max(flops / RATES.products, read / RATES.bandwidth) + moved / RATES.bandwidth
        else:
            moved = _moved(name, inputs, outputs or _written(name, function, args))
            if part in self._compiled and any(map(self._is_half_weight, outputs)):
                moved *= 2  # gradients of several calls are added in float32
            seconds = moved / RATES.bandwidth
        self._add_kernels(part, name, kernels, moved, seconds)

    def _add_kernels(self, part: str, name: str, kernels: int, moved: int, seconds: float) -> None:
        counts = self.counts
        counts.kernels[part] += kernels
        counts.kernels_by_operation[part, name] += kernels
        counts.bytes[part] += moved
        counts.bytes_by_operation[part, name] += moved
        counts.events.append(Event(part, "kernel", kernels, seconds))

    def _fuses(self, part: str, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        """Add an operation to the fused kernel, or end that kernel; return whether it was added."""
        fits = part in self._compiled and name.rstrip("_") in FUSIBLE and bool(outputs)
        fits = fits and all(isinstance(one, DeviceTensor) for one in (*inputs, *outputs) if one.dim())
        fits = fits and not any(map(self._is_weight, outputs))
        if self._fusion is not None and (not fits or self._fusion.part != part):
            self._end_fusion()
        if fits:
            self._fusion = self._fusion or Fusion(part)
            self._fusion.add(name.rstrip("_"), inputs, outputs, _size)
        return fits

    def _converted(self, part: str, tensors: list[Tensor]) -> int:
        """Return the bytes that convert weights and their gradients around a product.

        Compiled code converts in each call; autocast converts a weight once, and its gradient after all calls' sum.
        """
        return sum(3 * _size(one) for one in tensors if part in self._compiled and self._is_half_weight(one))

    def _is_half_weight(self, tensor: Tensor) -> bool:
        return tensor.itemsize == 2 and self._is_weight(tensor)

    def _is_weight(self, tensor: Tensor) -> bool:
        return bool({tensor.shape, tensor.shape[::-1]} & self._weights)

    def _end_fusion(self) -> None:
        if self._fusion is not None:
            fusion, self._fusion = self._fusion, None
            self._add_kernels(fusion.part, "fused", fusion.kernels, fusion.bytes, fusion.bytes / RATES.bandwidth)

    def _part(self) -> str:
        part = self._parts[-1]
        if part != BACKWARD:
            self._forward[torch._C._autograd._get_sequence_nr()] = part
            return part
        node = torch._C._current_autograd_node()
        if node is None:
            return BACKWARD
        # The latest operation before the node's own.
        number = node._sequence_nr()
        found = next((self._forward[one] for one in range(number + 1, number - 60, -1) if one in self._forward), None)
        return BACKWARD if found is None else f"{BACKWARD} of {found}"

    def _hold(self, content: Tensor, operation: str) -> None:
        storage = content.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return
        made_by = self._part(), operation

        def end(_: Any) -> None:
            self._live[made_by] -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, end)
        self._live[made_by] += size
        self._measure()

    def _measure(self, scratch: int = 0) -> None:
        if (total := self._live.total() + scratch) > self.counts.peak:
            self.counts.peak, self.counts.held = total, self._live.copy()


def _name(function: Any) -> str:
    return function._schema.name.partition("::")[2] if hasattr(function, "_schema") else function.__name__


def _size(tensor: Tensor) -> int:
    """Return the bytes that are read or written; what is expanded is read once."""
    if not tensor.numel():
        return 0
    sizes = (length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return torch.Size(sizes).numel() * tensor.element_size()


def _written(name: str, function: Any, args: Any) -> list[Tensor]:
    """Return what an operation writes that returns nothing."""
    arguments = zip(function._schema.arguments if args and hasattr(function, "_schema") else (), args, strict=False)
    written = [value for one, value in arguments if one.alias_info is not None and one.alias_info.is_write]
    if name == "_fused_adamw_":
        del written[1]  # gradients are only scaled by some
    return [one for one in tree_leaves(written) if isinstance(one, Tensor)]


def _moved(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    if name in _GATHERS:
        # What is read is as much as is written.
        return 2 * sum(map(_size, outputs)) + sum(_size(one) for one in inputs[1:])
    if name in _SCATTERS:
        written = 2 * _size(inputs[-1]) + sum(_size(one) for one in inputs[1:-1])
        return written if name.endswith("_") else written + 2 * _size(inputs[0])
    return sum(map(_size, inputs)) + sum(map(_size, outputs))


def _gradients_by_head(query: Tensor, key: Tensor) -> int:
    """Return the bytes of the gradients of keys and values for each query head, if several share a key."""
    shares = query.shape[1] // key.shape[1]
    return 2 * shares * key.numel() * key.element_size() if shares > 1 else 0


def _attention_flops(args: Any, pairs: Callable[..., int], backward: bool) -> int:
    query, _, value = args[1:4] if backward else args[:3]
    products = 2 * pairs(*args) * (query.shape[-1] + value.shape[-1])
    return int(products * 2.5) if backward else products


def _mm(left: Tensor, right: Tensor, *_: Any) -> int:
    return 2 * left.shape.numel() * right.shape[-1]


_PRODUCTS: dict[Any, Callable[..., int]] = {
    _aten.mm: _mm,
    _aten.bmm: _mm,
    _aten.addmm: lambda _, left, right, *__: _mm(left, right),
    _aten.addmm_: lambda _, left, right, *__: _mm(left, right),
    _aten.baddbmm: lambda _, left, right, *__: _mm(left, right),
    _aten._grouped_mm: lambda rows, experts, *_: 2 * rows.shape.numel() * experts.shape[-1],
}
