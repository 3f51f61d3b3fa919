"""Copies to a device, and back from it, that do not make the host wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")

# Alignment in bytes of each tensor in the copy, so that it can be viewed in its dtype.
_ALIGNMENT = 8


def moved(value: T, device: torch.device) -> T:
    """Copy all tensors inside a value to a device.

    Args:
        value: A tensor on the CPU, or a dataclass, tuple, list or dict of such values; anything else is unchanged.
        device: Target device; for the CPU nothing is copied.
    """
    if device.type == "cpu":
        return value
    tensors: list[Tensor] = []
    _mapped(value, lambda one: tensors.append(one) or one)  # type: ignore[func-returns-value]
    copies = _copied(tensors, device)
    return _mapped(value, lambda _: next(copies))


def begin_read(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the CPU.

    Returns:
        A function that waits until the copy has been made, but not for later work of the device, and returns it.
    """
    device = tensor.device
    if device.type in ("cpu", "mps"):
        return tensor.cpu
    # Only to page-locked memory are copies asynchronous.
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=device.type == "cuda")
    copy.copy_(tensor.detach(), non_blocking=True)
    copied = torch.Event(device)
    copied.record()

    def finish() -> Tensor:
        copied.synchronize()
        return copy

    return finish


def _copied(tensors: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    flat = [one.contiguous().flatten().view(torch.uint8) for one in tensors]
    together = torch.cat([F.pad(one, (0, -len(one) % _ALIGNMENT)) for one in flat])
    if device.type == "cuda":
        # Only page-locked memory is copied asynchronously.
        together = together.pin_memory()
    # Asynchronous copies to Apple's GPUs would read the memory after it has been freed.
    there = together.to(device, non_blocking=device.type != "mps")
    begin = 0
    for own, like in zip(flat, tensors, strict=True):
        yield there[begin : begin + len(own)].view(like.dtype).view(like.shape)
        begin += len(own) + -len(own) % _ALIGNMENT


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(_mapped(one, function) for one in value)
    if isinstance(value, dict):
        return {name: _mapped(one, function) for name, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _mapped(getattr(value, one.name), function) for one in fields(value)})
    return value
