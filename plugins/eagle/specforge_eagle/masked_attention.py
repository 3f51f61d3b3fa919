"""The attention of the draft's layer in ``forward``: with a mask and a cache, as in transformers.

Training and drafting use the attention of all drafts (``specforge.models.draft_attention``). A list passed as
``attention_weights`` receives the weights of each layer, [B, heads, T, S].
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from specforge.models.draft_attention import DraftAttention, attend_as_draft, attention_window, cache_argument
from specforge.private.transformers import set_attention

IMPLEMENTATION = "specforge_eagle"


def causal_mask(
    config: PreTrainedConfig,
    states: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    position_ids: Tensor | None,
    weighted: bool,
) -> Tensor | None:
    """Create the attention mask of a layer.

    Args:
        config: Configuration of the layer, a model's first.
        states: The layer's input, [B, T, H].
        attention_mask: 1 on tokens and 0 on padding, [B, S]; or which slots each row sees, [B, 1, T, S], boolean or
            additive; None for all.
        cache: Keys and values of earlier rows.
        position_ids: Positions [B, T]; without mask and cache, a document starts wherever they restart.
        weighted: Whether attention weights are requested (see ``attention_weights`` above).

    Returns:
        The mask, [B, 1, T, S]; None if plain causal attention is right.
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


def _attention(
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
        return attend_as_draft(module, query, key, value, attention_mask, scaling, draft_attention)
    attend = sdpa_attention_forward if attention_weights is None else eager_attention_forward
    attended, weights = attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout)
    if attention_weights is not None:
        attention_weights.append(weights)
    return attended, weights


AttentionInterface.register(IMPLEMENTATION, _attention)
