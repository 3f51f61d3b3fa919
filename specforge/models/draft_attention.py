"""How the attention layers of transformers, inside a draft, attend: by whatever is passed along with the batch.

In training that is ``TrainingTimeTest``, in decoding ``TreeCache``: the layers are the same, what a row sees is not.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

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


def _transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    draft_attention: DraftAttention,
    **_: Any,
) -> tuple[Tensor, None]:
    config: Any = module.config
    layer: Any = module.layer_idx
    kinds = getattr(config, "layer_types", None) or []
    slides = layer < len(kinds) and kinds[layer] == "sliding_attention"
    window = config.sliding_window if slides else None
    output = draft_attention.attend(layer, query, key, value, scaling, window)
    return output.transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, _transformers_attention)
