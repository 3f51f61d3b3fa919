"""How states are stored: as they are, or in one byte a value, with a scale for each token and layer.

With a scale s = max |x| / 448 (float8_e4m3fn) or max |x| / 127 (int8), what is read back differs from x by at most
max(|x| / 16, s / 1024), or by s / 2; bfloat16 by |x| / 256.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

FeatureType = Literal["bfloat16", "float32", "float8_e4m3fn", "int8"]
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def torch_dtype(name: FeatureType) -> torch.dtype:
    """Return the type of that name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def has_scales(dtype: torch.dtype) -> bool:
    """Tell whether values of a type are multiples of a scale."""
    return dtype in _LARGEST


def state_bytes(width: int, dtype: torch.dtype) -> int:
    """Return the bytes of one stored state, its scale included.

    Args:
        width: Values of a state, H.
        dtype: Type that it is stored in.
    """
    return width * dtype.itemsize + 4 * has_scales(dtype)


def encode(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Turn states into what is stored.

    Args:
        states: States [..., H].
        dtype: Type to store.

    Returns:
        The values [..., H] and, for types of one byte, the float32 scales [...].
    """
    if dtype not in _LARGEST:
        return states.to(dtype), None
    states = states.float()
    scales = states.abs().amax(-1) / _LARGEST[dtype]
    scaled = states / torch.where(scales > 0, scales, 1)[..., None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def decode(values: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Turn what is stored back into states.

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
