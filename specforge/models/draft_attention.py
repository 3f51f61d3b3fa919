"""The attention of transformers' layers inside a draft, which is passed with each call.

In training it is a ``TrainingTimeTest``, in decoding a ``TreeCache``: the layers are the same, what a row sees differs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

IMPLEMENTATION = "specforge_draft"


class DraftAttention(Protocol):
    """The argument ``draft_attention`` of layers whose ``_attn_implementation`` is ``IMPLEMENTATION``."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """Attend in one layer.

        Args:
            layer: Index of the layer.
            query: [B, heads, T, D], with rotary positions applied.
            key: [B, key-value heads, T, D], with rotary positions applied.
            value: [B, key-value heads, T, D].
            scale: Factor of the logits.
            window: Number of last rows that a row sees; None for all.

        Returns:
            [B, heads, T, D].
        """


def attention_window(config: PreTrainedConfig, layer: int = 0) -> int | None:
    """Return the sliding window of a layer by its configuration; None for full attention."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        slides = layer < len(kinds) and kinds[layer] == "sliding_attention"
    else:
        # Families without layer types use their window, if any, in every layer.
        slides = hasattr(type(config), "sliding_window")
    return config.sliding_window if slides else None


def cache_argument(function: Callable[..., Any]) -> str:
    """Return the name of the cache argument of a function or class of transformers, which 5.24 renamed."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def attend_as_draft(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    draft_attention: DraftAttention,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend with the passed ``draft_attention``; registered as an attention implementation of transformers."""
    config: Any = module.config
    layer: Any = module.layer_idx
    width = value.shape[-1]
    if width < key.shape[-1]:
        # Values may be narrower, as in latent attention; the padding stays zero.
        value = F.pad(value, (0, key.shape[-1] - width))
    output = draft_attention.attend(layer, query, key, value, scaling, attention_window(config, layer))
    return output[..., :width].transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, attend_as_draft)
