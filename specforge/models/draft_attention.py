"""How the attention layers of transformers, inside a draft, attend: by whatever is passed along with the batch.

In training that is ``TrainingTimeTest``, in decoding ``TreeCache``: the layers are the same, what a row sees is not.
Where nothing is passed, they attend as transformers does, by a mask; a list passed as ``attention_weights`` then
receives the weights of each layer, [B, heads, T, S].
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from specforge.private.transformers import set_attention

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


def causal_mask(
    config: PreTrainedConfig,
    states: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    position_ids: Tensor | None,
    weighted: bool,
) -> Tensor | None:
    """Make the mask that a layer attends by where nothing is passed as ``draft_attention``.

    Args:
        config: Configuration of the layer, the first of a model.
        states: What the layer reads, [B, T, H].
        attention_mask: 1 on tokens and 0 on padding, [B, S]; or what each row sees, [B, 1, T, S], as truth values or
            to be added to the logits; None for all.
        cache: Keys and values of earlier rows.
        position_ids: Positions [B, T]; without mask and cache, where they restart, a document begins.
        weighted: Whether the weights are asked for (see ``attention_weights`` below).

    Returns:
        [B, 1, T, S]; None where plain causal attention says it.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        if attention_mask.is_floating_point():
            return attention_mask.to(states.dtype)
        hidden = torch.finfo(states.dtype).min
        return torch.zeros_like(attention_mask, dtype=states.dtype).masked_fill(~attention_mask.bool(), hidden)
    config = copy.copy(config)
    set_attention(config, "eager" if weighted else "sdpa")
    make = create_causal_mask if attention_window(config) is None else create_sliding_window_causal_mask
    options = {cache_argument(make): cache}
    return make(
        config=config, inputs_embeds=states, attention_mask=attention_mask, position_ids=position_ids, **options
    )


def _transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    draft_attention: DraftAttention | None = None,
    attention_weights: list[Tensor] | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    if draft_attention is not None:
        config: Any = module.config
        layer: Any = module.layer_idx
        width = value.shape[-1]
        if width < key.shape[-1]:
            # As in latent attention; what is added stays zero.
            value = F.pad(value, (0, key.shape[-1] - width))
        output = draft_attention.attend(layer, query, key, value, scaling, attention_window(config, layer))
        return output[..., :width].transpose(1, 2), None
    attend = sdpa_attention_forward if attention_weights is None else eager_attention_forward
    attended, weights = attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout)
    if attention_weights is not None:
        attention_weights.append(weights)
    return attended, weights


AttentionInterface.register(IMPLEMENTATION, _transformers_attention)
