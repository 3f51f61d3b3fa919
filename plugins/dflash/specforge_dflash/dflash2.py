"""The DFlash2 draft network: DFlash with convolutions along the block, and a selector among each slot's candidates.

What ``states`` returns at each pair is the slot's state and what the selector multiplies successors with: [P, H + r].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from specforge.config import SpeculatorModelConfig
from specforge.models.base_components import Family
from specforge.models.block.attention import BlockAttention, KeysAndValues
from specforge.models.draft_rows import DraftRows
from specforge.verifier.features import Features
from specforge_dflash.config import DFlash2SpeculatorConfig
from specforge_dflash.convolution import BlockConvolution
from specforge_dflash.layer import BlockLayer, Rotation
from specforge_dflash.model import DFlashDraftModel
from specforge_dflash.pairs import tokens_before
from specforge_dflash.selector import CandidateSelector

# Rows of the head are gathered for so many pairs, and again in the backward pass: 64 MiB at 16 candidates of 4096.
PAIRS_AT_ONCE = 256


class ConvolvedLayer(BlockLayer):
    """A layer with a convolution around its attention and another one around its feed-forward block.

    Args:
        config: Configuration of the decoder layers.
        blocks: The building blocks of their family.
        index: Number of the layer.
        taps: Slots that a convolution reads.
        group: Neighbouring features that share what is added to a kernel.
        size: Number of slots a block.
    """

    def __init__(self, config: PreTrainedConfig, blocks: Family, index: int, taps: int, group: int, size: int) -> None:
        super().__init__(config, blocks, index)
        self.size = size
        self.attention_conv = BlockConvolution(config.hidden_size, taps, group)
        self.mlp_conv = BlockConvolution(config.hidden_size, taps, group)

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation,
        context: KeysAndValues,
        attention: BlockAttention,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Run the layer; of each block, the slots that are wanted are its first ones."""
        slots = torch.arange(len(hidden), device=hidden.device) % self.size
        normed = self.input_layernorm(hidden)
        before, after = self.attention_conv.added_kernels(normed)
        normed = self.attention_conv(normed, slots, before, side=0)
        own = self.keys_and_values(normed, rotation)
        if wanted is not None:
            hidden, normed, after, slots = hidden[wanted], normed[wanted], after[wanted], slots[wanted]
            rotation = rotation[0][wanted], rotation[1][wanted]
        attended = self.attend(normed, rotation, context, own, attention)
        hidden = hidden + self.attention_conv(attended, slots, after, side=1)
        normed = self.post_attention_layernorm(hidden)
        before, after = self.mlp_conv.added_kernels(normed)
        transformed = self.mlp(self.mlp_conv(normed, slots, before, side=0))
        return cast(Tensor, hidden + self.mlp_conv(transformed, slots, after, side=1))


class DFlash2DraftModel(DFlashDraftModel):
    """DFlash2: DFlash with convolutions and a candidate selector."""

    config_class: ClassVar[type[SpeculatorModelConfig]] = DFlash2SpeculatorConfig
    config: DFlash2SpeculatorConfig

    def make_layer(self, config: PreTrainedConfig, blocks: Family, index: int) -> nn.Module:
        """Make one decoder layer with its convolutions."""
        own = self.config
        return ConvolvedLayer(config, blocks, index, own.conv_kernel_size, own.conv_group_size, own.block_size)

    def make_heads(self) -> None:
        """Make the selector."""
        config = self.config
        width = config.transformer_layer_config.hidden_size
        self.candidate_selector = CandidateSelector(
            config.draft_vocab_size, width, config.selector_rank, config.selector_top_k
        )

    @property
    def first_wanted(self) -> int:
        """The anchor's slot, which the convolutions of the others read."""
        return 0

    def states(self, batch: Mapping[str, Tensor], features: Features, rows: DraftRows) -> Tensor:
        """Run the blocks of a packed batch, fed with the true tokens before each slot."""
        states = self.backbone(batch, features, rows)
        transitions = self.candidate_selector.transitions(states, tokens_before(batch["input_ids"], rows))
        return torch.cat([states, transitions.to(states.dtype)], dim=1)

    def before_head(self, states: Tensor) -> Tensor:
        """Return what the head reads of states, [..., H]."""
        return states[..., : self.head_weights.shape[1]]

    def logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        """Turn what ``states`` returns into logits [..., V]: scores of the candidates, minus infinity elsewhere."""
        width = self.head_weights.shape[1]
        return self.candidate_selector.selected(self.slot_logits(hidden[..., :width]), hidden[..., width:])

    def candidate_scores(self, states: Tensor, candidates: Tensor) -> Tensor:
        """Score given candidates in training, without logits of all tokens.

        Args:
            states: What ``states`` returns at some pairs, [m, H + r].
            candidates: Tokens, int64 [m, K].

        Returns:
            Scores in float32, [m, K].
        """
        successors = self.candidate_selector.successor_codebook
        scores = [
            checkpoint(_scores, some, tokens, self.head_weights, successors, use_reentrant=False)
            for some, tokens in zip(states.split(PAIRS_AT_ONCE), candidates.split(PAIRS_AT_ONCE), strict=True)
        ]
        return torch.cat(scores)

    def conditioned(self, logits: Tensor, states: Tensor, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Score the candidates by the tokens before."""
        transitions = self.candidate_selector.transitions(states, tokens)
        return self.candidate_selector.selected(logits, transitions), memory

    def _initialise(self, deviation: float) -> None:
        super()._initialise(deviation)
        for codebook in (self.candidate_selector.predecessor_codebook, self.candidate_selector.successor_codebook):
            nn.init.normal_(codebook, std=deviation)
        for module in self.modules():
            if isinstance(module, BlockConvolution):
                module.reset_parameters()


def _scores(states: Tensor, candidates: Tensor, head: Tensor, successors: Tensor) -> Tensor:
    """Multiply states [m, H + r] with the candidates' rows of head [V, H] and codebook [V, r], to [m, K]."""
    width = head.shape[1]
    unary = head[candidates] @ states[:, :width, None].to(head.dtype)
    return (unary + successors[candidates] @ states[:, width:, None].to(successors.dtype)).squeeze(-1).float()
