"""Measured rate of matrix multiplication on this device."""

from __future__ import annotations

import time

import torch

SECONDS = 1.0


def measured_flops(dtype: torch.dtype) -> float:
    """Return the floating point operations per second of the fastest of several matrix products.

    Args:
        dtype: Dtype of the matrices.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    # Large enough to fill the device, small enough that other processes do not interrupt every product.
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
