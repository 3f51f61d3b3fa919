"""Storage types of states: floating point as is, or one byte per value with a scale per token and layer.

The scale is s = max |x| / 448 (float8_e4m3fn) or max |x| / 127 (int8). The error of a decoded value x is at most
max(|x| / 16, s / 1024) for float8_e4m3fn, s / 2 for int8 and |x| / 256 for bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.bounds import FeatureType

_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def torch_dtype(name: FeatureType) -> torch.dtype:
    """Return the torch dtype with this name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def has_scales(dtype: torch.dtype) -> bool:
    """Return whether values of this type are stored with scales."""
    return dtype in _LARGEST


def state_bytes(width: int, dtype: torch.dtype) -> int:
    """Return the bytes of one stored state, including its scale.

    Args:
        width: Width H of a state.
        dtype: Storage type.
    """
    return width * dtype.itemsize + 4 * has_scales(dtype)


def encode(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Convert states to their storage type.

    Args:
        states: States [..., H].
        dtype: Storage type.

    Returns:
        The values [..., H] and the float32 scales [...] of one-byte types (None for other types).
    """
    if dtype not in _LARGEST:
        return states.to(dtype), None
    states = states.float()
    scales = states.abs().amax(-1) / _LARGEST[dtype]
    scaled = states / torch.where(scales > 0, scales, 1)[..., None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def decode(values: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Convert stored values back to states.

    Args:
        values: Stored values [..., H].
        scales: Their scales [...], or None.
        dtype: Type to compute in.

    Returns:
        States [..., H].
    """
    if scales is None:
        return values.to(dtype)
    return (values.float() * scales[..., None]).to(dtype)
