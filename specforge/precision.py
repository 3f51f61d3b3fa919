"""The dtype of matrix products: autocast's if it is on.

Autocast casts the input of each product, so that one that several read is copied, and kept, once for each.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_type(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a product of a tensor is computed."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def computed(tensor: Tensor) -> Tensor:
    """Cast a tensor to the dtype of its products."""
    return tensor.to(compute_type(tensor))
