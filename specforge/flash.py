"""FlashAttention over sequences of different lengths in one call, which torch has for CUDA devices and short dtypes.

Letters in shapes: T tokens of all sequences, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.private.torch import FLASH_ATTENTION, FLASH_ATTENTION_BACKWARD


@dataclass(frozen=True)
class Ends:
    """Where sequences begin and end among all tokens.

    Attributes:
        bounds: Begin of each sequence, and the end of the last one, int32 [sequences + 1].
        longest: Length of the longest sequence.
    """

    bounds: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Tensor) -> Self:
        """Join sequences of some lengths, at least one sequence and none of them empty, on the CPU."""
        return cls(F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max()))


def has_flash(device: torch.device) -> bool:
    """Return whether a device has this kernel."""
    return (
        device.type == "cuda"
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def takes(query: Tensor) -> bool:
    """Return whether the kernel takes queries [..., D] of this device, dtype and width."""
    width, is_short = query.shape[-1], query.dtype in (torch.bfloat16, torch.float16)
    return is_short and width % 8 == 0 and width <= 256 and has_flash(query.device)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_queries: Ends,
    of_keys: Ends,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend causally in each sequence; the last query sees all keys, and each one before it one key less.

    Args:
        query: [T, heads, D].
        key: [T, key-value heads, D].
        value: The same.
        of_queries: The sequences of the queries.
        of_keys: Those of the keys, none of them shorter.
        scale: Factor of the logits; None for 1 / sqrt(D).
        window: Number of last keys that a query sees, its own included; None for all.

    Returns:
        Output [T, heads, D], with gradient, and log-sum-exps of the logits, float32 [heads, T].
    """
    output, logsumexp, *_ = FLASH_ATTENTION(
        *(query, key, value, of_queries.bounds, of_keys.bounds, of_queries.longest, of_keys.longest),
        *(0.0, True, False),
        **_options(scale, window),
    )
    return output, logsumexp


def gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    of_queries: Ends,
    of_keys: Ends,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value from that of the output, for any output and log-sum-exp."""
    without_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
    found = FLASH_ATTENTION_BACKWARD(
        *(gradient, query, key, value, output, logsumexp, of_queries.bounds, of_keys.bounds),
        *(of_queries.longest, of_keys.longest, 0.0, True, *without_dropout),
        **_options(scale, window),
    )
    return cast(tuple[Tensor, Tensor, Tensor], tuple(found))


def _options(scale: float | None, window: int | None) -> dict[str, float | int | None]:
    if window is None:
        return {"scale": scale}
    return {"scale": scale, "window_size_left": window - 1, "window_size_right": 0}
