"""How the attention layers of transformers, inside a draft, attend: by whatever is passed along with the batch.

In training that is ``TrainingTimeTest``, in decoding ``TreeCache``: the layers are the same, what a row sees is not.
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
    """What is passed as ``draft_attention`` to layers whose ``_attn_implementation`` is ``IMPLEMENTATION``."""

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
            window: A row sees only the last so many rows; None for all.

        Returns:
            [B, heads, T, D].
        """


def attention_window(config: PreTrainedConfig, layer: int = 0) -> int | None:
    """Return how many of the last rows a layer sees by its configuration; None for all."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        slides = layer < len(kinds) and kinds[layer] == "sliding_attention"
    else:
        # Families without kinds slide in every layer, if they know of windows at all.
        slides = hasattr(type(config), "sliding_window")
    return config.sliding_window if slides else None


def cache_argument(function: Callable[..., Any]) -> str:
    """Return what a function or class of transformers calls its cache: 5.24 renamed it."""
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
    """Attend by what is passed along; an attention implementation of transformers, which gives the arguments."""
    config: Any = module.config
    layer: Any = module.layer_idx
    width = value.shape[-1]
    if width < key.shape[-1]:
        # As in latent attention; what is added stays zero.
        value = F.pad(value, (0, key.shape[-1] - width))
    output = draft_attention.attend(layer, query, key, value, scaling, attention_window(config, layer))
    return output[..., :width].transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, attend_as_draft)
