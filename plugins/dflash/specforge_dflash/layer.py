"""A decoder layer of a block drafter: Qwen3's, whose slots attend to the context beside their own block.

Letters in shapes: N context rows, P slots of all blocks, Q slots that are wanted, H width, D width of a head.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.qwen3.modeling_qwen3 import rotate_half

from specforge.models.base_components import Family
from specforge.models.block.attention import BlockAttention, KeysAndValues
from specforge.models.draft_attention import attention_window

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of positions, [..., D] each."""


class BlockLayer(nn.Module):
    """One layer. Every layer makes its own keys and values of the same context, which passes through none of them.

    Args:
        config: Configuration of the decoder layers.
        blocks: The building blocks of their family.
        index: Number of the layer.
    """

    self_attn: Any

    def __init__(self, config: PreTrainedConfig, blocks: Family, index: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.head_dim = config.head_dim
        self.window = attention_window(config, index)
        self.self_attn = blocks.attention(config, layer_idx=index)
        self.mlp = blocks.feed_forward(config)
        self.input_layernorm = blocks.norm(width, eps=eps)
        self.post_attention_layernorm = blocks.norm(width, eps=eps)

    def keys_and_values(self, states: Tensor, rotation: Rotation) -> KeysAndValues:
        """Return keys, rotated, and values of states [..., H], [..., key-value heads, D] each."""
        modules = self.self_attn
        projected = modules.k_proj(states), modules.v_proj(states)
        key, value = (one.unflatten(-1, (-1, self.head_dim)) for one in projected)
        return _rotated(modules.k_norm(key), rotation), value

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation,
        context: KeysAndValues,
        attention: BlockAttention,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            hidden: States of all slots, [P, H].
            rotation: Of their positions.
            context: Keys and values of the context.
            attention: What the slots see.
            wanted: Slots that are wanted, int64 [Q]; the others are only attended to. None for all.

        Returns:
            States of the slots that are wanted, [Q, H].
        """
        normed = self.input_layernorm(hidden)
        own = self.keys_and_values(normed, rotation)
        if wanted is not None:
            hidden, normed, rotation = hidden[wanted], normed[wanted], (rotation[0][wanted], rotation[1][wanted])
        hidden = hidden + self.attend(normed, rotation, context, own, attention)
        return cast(Tensor, hidden + self.mlp(self.post_attention_layernorm(hidden)))

    def attend(
        self,
        states: Tensor,
        rotation: Rotation,
        context: KeysAndValues,
        own: KeysAndValues,
        attention: BlockAttention,
    ) -> Tensor:
        """Let slots attend, [Q, H]; see ``forward`` for what they are."""
        modules = self.self_attn
        query = _rotated(modules.q_norm(modules.q_proj(states).unflatten(-1, (-1, self.head_dim))), rotation)
        attended = attention.attend(query, context, own, self.head_dim**-0.5, self.window)
        return cast(Tensor, modules.o_proj(attended.flatten(-2)))


def _rotated(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotate heads [..., heads, D] by their positions (https://arxiv.org/abs/2104.09864, halves as pairs)."""
    cosines, sines = (one.unsqueeze(-2) for one in rotation)
    return heads * cosines + rotate_half(heads) * sines
