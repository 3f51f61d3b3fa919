"""How the draft's layer attends in ``forward``: as transformers does, by a mask and a cache.

In training and in drafting it attends as every draft (``specforge.models.draft_attention``). A list passed as
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
    """Make the mask that a layer attends by.

    Args:
        config: Configuration of the layer, the first of a model.
        states: What the layer reads, [B, T, H].
        attention_mask: 1 on tokens and 0 on padding, [B, S]; or what each row sees, [B, 1, T, S], as truth values or
            to be added to the logits; None for all.
        cache: Keys and values of earlier rows.
        position_ids: Positions [B, T]; without mask and cache, where they restart, a document begins.
        weighted: Whether the weights are asked for (see ``attention_weights`` above).

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
