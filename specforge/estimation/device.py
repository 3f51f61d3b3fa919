"""How fast a device multiplies matrices, measured on the spot."""

from __future__ import annotations

import time

import torch

SECONDS = 1.0


def measured_flops(dtype: torch.dtype) -> float:
    """Return floating point operations a second of the best of several matrix products.

    Args:
        dtype: Type of the matrices.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    # Large enough to keep the device busy, small enough that others do not interrupt every one of them.
    width = 512 if device.type == "cpu" else 8192
    left, right = torch.ones(2, width, width, device=device, dtype=dtype)
    torch.mm(left, right)
    best, until = float("inf"), time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < until:
        begin = time.perf_counter()
        torch.mm(left, right)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * width**3 / best
