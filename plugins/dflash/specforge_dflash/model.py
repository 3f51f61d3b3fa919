"""The DFlash draft network (https://arxiv.org/abs/2602.06036), which DFlash2 and DSpark extend.

Features of several verifier layers are fused to one context state a token. A block begins with an anchor, the last
decided token; its other slots read the embedding of a mask token. Each layer lets the slots attend to its own keys and
values of the context before the anchor, and to the block. The verifier's head, frozen, turns states into logits.

Letters in shapes: B rows, T tokens a row, N = B * T, n aux layers, H width, A blocks, K slots a block, S drafted
tokens, P pairs of row and step that are run, Q slots that are wanted, V verifier and D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from specforge.config import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from specforge.data.host_masks import HostMasks
from specforge.models.base_components import Family, draft_layer_config, family, norm_scale, start_norm
from specforge.models.block.attention import BlockAttention, CachedContext, KeysAndValues, PackedBlocks
from specforge.models.block.drafter import BlockDrafter
from specforge.models.block.slots import BlockSlots
from specforge.models.draft_rows import DraftRows
from specforge.models.lean_blocks import use_memory_saving_blocks
from specforge.models.speculator import SpeculatorModel
from specforge.models.vocabulary import DraftVocabulary, map_faults
from specforge.moving import moved
from specforge.proposals import GreedyTokenProposalConfig
from specforge.verifier.features import Features
from specforge_dflash.aux_layers import usual_aux_layers
from specforge_dflash.config import DFlashSpeculatorConfig
from specforge_dflash.layer import BlockLayer, Rotation

# Without a gradient, blocks are run so many at a time: no state of a layer outlives them.
BLOCKS_AT_ONCE = 256


class DFlashDraftModel(SpeculatorModel):
    """DFlash: drafts a block of tokens in one pass.

    Args:
        config: The speculator's configuration.
    """

    config_class: ClassVar[type[SpeculatorModelConfig]] = DFlashSpeculatorConfig
    config: DFlashSpeculatorConfig

    def __init__(self, config: DFlashSpeculatorConfig) -> None:
        super().__init__(config)
        layers = config.transformer_layer_config
        blocks = family(layers.model_type)
        width, eps = layers.hidden_size, layers.rms_norm_eps
        self.fc = nn.Linear(config.num_aux_layers * (config.target_hidden_size or width), width, bias=False)
        self.hidden_norm = blocks.norm(width, eps=eps)
        self.layers = nn.ModuleList(self.make_layer(layers, blocks, index) for index in range(layers.num_hidden_layers))
        self.norm = blocks.norm(width, eps=eps)
        self.rotary_emb = blocks.rotary(layers)
        self.lm_head: nn.Linear | None = None
        if config.draft_vocab_size != config.target_vocab_size:
            self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False).requires_grad_(False)
            self.d2t = nn.Buffer(torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.t2d = nn.Buffer(torch.zeros(config.target_vocab_size, dtype=torch.bool))
        self.make_heads()
        use_memory_saving_blocks(self)
        self._initialise(layers.initializer_range)

    def make_layer(self, config: PreTrainedConfig, blocks: Family, index: int) -> nn.Module:
        """Make one decoder layer."""
        return BlockLayer(config, blocks, index)

    def make_heads(self) -> None:
        """Make what the network has beside the backbone; nothing in DFlash."""

    @classmethod
    def from_training_args(cls, verifier_config: PreTrainedConfig, **kwargs: Any) -> Self:
        """Create the draft for a verifier from training arguments.

        Args:
            verifier_config: The verifier's transformers configuration.
            **kwargs: ``num_layers`` (5), ``intermediate_size``, ``t2d`` (the draft vocabulary; the verifier's whole one
                when absent), ``verifier_name_or_path``, and fields of the configuration, of which ``mask_token_id`` and
                ``aux_hidden_state_layer_ids`` are needed.

        Returns:
            The draft with random weights; its maps hold the given vocabulary.
        """
        layers = draft_layer_config(
            verifier_config, "qwen3", kwargs.pop("num_layers", 5), kwargs.pop("intermediate_size", None)
        )
        t2d, name = kwargs.pop("t2d", None), kwargs.pop("verifier_name_or_path", None)
        config = cast(type[DFlashSpeculatorConfig], cls.config_class)(
            transformer_layer_config=layers,
            draft_vocab_size=layers.vocab_size if t2d is None else int(t2d.sum()),
            sliding_window_non_causal=True,
            **kwargs,
        )
        config.speculators_config = SpeculatorsConfig(
            algorithm=config.speculators_model_type,
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=config.num_drafted)],
            default_proposal_method="greedy",
            verifier=VerifierConfig.from_config(verifier_config, name),
        )
        model = cls(config)
        if model.lm_head is not None:
            vocabulary = DraftVocabulary.from_t2d(t2d)
            model.t2d.copy_(vocabulary.t2d)
            model.d2t.copy_(vocabulary.d2t)
        return model

    def stored_faults(self, state: Mapping[str, Tensor]) -> Iterator[str]:
        """Yield what is wrong with the maps between the vocabularies."""
        if "d2t" in state:
            yield from map_faults(state["d2t"], state["t2d"], self.config.target_vocab_size)

    @property
    def aux_layers(self) -> list[int]:
        """Ids of the verifier layers that features are taken from, ascending."""
        chosen = self.chosen_aux_layers
        return usual_aux_layers(self.verifier_parts.config.num_hidden_layers) if chosen is None else chosen

    @property
    def chosen_aux_layers(self) -> list[int] | None:
        """Those layers as the configuration lists them; None for the default ones."""
        return self.config.aux_hidden_state_layer_ids

    @property
    def draft_ids(self) -> Tensor | None:
        """The verifier's id of each draft token, int64 [D]; None where the vocabularies are the same."""
        d2t = getattr(self, "d2t", None)
        return None if d2t is None else d2t + torch.arange(d2t.numel(), device=d2t.device)

    @property
    def num_drafted(self) -> int:
        """Number S of tokens that a block proposes."""
        return self.config.num_drafted

    @property
    def causal_windows(self) -> bool:
        """Whether layers with a sliding window are causal within a block."""
        return not self.config.sliding_window_non_causal

    def shortened(self, num_drafted: int) -> Self:
        """Return a draft with the same weights whose blocks propose fewer tokens; a server asked for fewer runs it.

        Args:
            num_drafted: Number of tokens.
        """
        config = self.config.shortened(num_drafted)
        short = self.from_state(config, self.state_dict()).to(self.fc.weight.device)
        short.attach_verifier(self.verifier_parts)
        return short

    def borrow_weights(self) -> None:
        """Start from the attached verifier: its head's rows, and its final norm."""
        parts = self.verifier_parts
        with torch.no_grad():
            start_norm(self.norm, norm_scale(parts.norm, parts.lm_head.in_features))
            if self.lm_head is not None and self.draft_ids is not None:
                self.lm_head.weight.copy_(parts.lm_head.weight[self.draft_ids.to(parts.lm_head.weight.device)])

    @property
    def mask_token(self) -> int:
        """The mask token; the last token of a stand-in for the verifier that does not have it."""
        return min(self.config.mask_token_id, self.verifier_parts.embed_tokens.num_embeddings - 1)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed the verifier's tokens [...] as [..., H], by its raw table, as engines do."""
        table = self.verifier_parts.embed_tokens.weight.detach()
        return nn.functional.embedding(tokens, table).to(self.fc.weight.dtype)

    def context_states(self, features: Features, position_ids: Tensor) -> list[KeysAndValues]:
        """Return each layer's keys and values of the context.

        Args:
            features: The verifier's states, [..., T].
            position_ids: Position of each row, [B, T].

        Returns:
            For each layer, [B, T, key-value heads, D] each.
        """
        context = self.hidden_norm(self.fc(features.aux.flatten(-2).to(self.fc.weight.dtype)))
        rotation = self.rotary_emb(context, position_ids)
        return [layer.keys_and_values(context, rotation) for layer in self._layers()]

    def run(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        context: Sequence[KeysAndValues],
        attention: BlockAttention,
        wanted: Tensor,
        of_wanted: BlockAttention,
    ) -> Tensor:
        """Run blocks through all layers.

        Args:
            tokens: Their anchors, the verifier's ids, int64 [A].
            position_ids: Positions of the anchors, int64 [A].
            context: Keys and values of the context, for each layer.
            attention: What all slots see.
            wanted: Slots whose states are wanted, int64 [Q].
            of_wanted: What those see.

        Returns:
            Their states after the final norm, [Q, H].
        """
        size = self.config.block_size
        masks = self.embed(tokens.new_full((1, 1), self.mask_token)).expand(len(tokens), size - 1, -1)
        hidden = torch.cat([self.embed(tokens)[:, None], masks], dim=1).flatten(0, 1)
        positions = position_ids[:, None] + torch.arange(size, device=tokens.device)
        cosines, sines = self.rotary_emb(hidden, positions.view(1, -1))
        rotation = cosines[0], sines[0]
        *others, last = self._layers()
        for layer, own in zip(others, context, strict=False):
            hidden = self.advance(layer, hidden, rotation, own, attention, None)
        return cast(Tensor, self.norm(self.advance(last, hidden, rotation, context[-1], of_wanted, wanted)))

    def advance(
        self,
        layer: BlockLayer,
        hidden: Tensor,
        rotation: Rotation,
        context: KeysAndValues,
        attention: BlockAttention,
        wanted: Tensor | None,
    ) -> Tensor:
        """Run one layer; its arguments are those of ``BlockLayer.forward``."""
        return cast(Tensor, layer(hidden, rotation, context, attention, wanted))

    def run_blocks(
        self, tokens: Tensor, position_ids: Tensor, context: Sequence[KeysAndValues], attention: CachedContext
    ) -> Tensor:
        """Run one block a sequence, in decoding; return the states of its S predicting slots, [B, S, H]."""
        size, begin = self.config.block_size, self.first_wanted
        slots = torch.arange(len(tokens) * size, device=tokens.device).view(-1, size)[:, begin:]
        states = self.run(tokens, position_ids, context, attention, slots.flatten(), attention)
        return states.view(len(tokens), size - begin, -1)[:, self.config.first_slot - begin :]

    @property
    def first_wanted(self) -> int:
        """The first slot whose state after the last layer is wanted: the first that predicts, or one before it."""
        return self.config.first_slot

    def states(self, batch: Mapping[str, Tensor], features: Features, rows: DraftRows) -> Tensor:
        """Run the blocks of a packed batch.

        Args:
            batch: ``input_ids``, ``position_ids`` and ``document_ids``, [B, T] each.
            features: The verifier's states over them.
            rows: The rows that each step runs.

        Returns:
            States after the final norm, one step after the other, [P, H] (see ``DraftRows.state_index``).
        """
        first, size = self.config.first_slot, self.config.block_size
        slots = BlockSlots.of(rows, size, first, self.first_wanted)
        # An anchor follows its row; at the end of a document nothing is supervised.
        anchors, positions = batch["input_ids"].flatten().roll(-1), batch["position_ids"].flatten() + 1
        document_ids, device = HostMasks.of(batch).masks["document_ids"], anchors.device
        context = [
            (key.flatten(0, 1), value.flatten(0, 1))
            for key, value in self.context_states(features, batch["position_ids"])
        ]
        found = []
        for part in slots.parts(len(slots.rows) if torch.is_grad_enabled() else BLOCKS_AT_ONCE):
            attention, of_wanted = (
                PackedBlocks(document_ids, part.rows, size, chosen, self.causal_windows, device)
                for chosen in (None, part.wanted)
            )
            rows_there, wanted = moved((part.rows, part.wanted), device)
            found.append(self.run(anchors[rows_there], positions[rows_there], context, attention, wanted, of_wanted))
        return torch.cat(found)[moved(slots.of_pairs, device)]

    @property
    def head_weights(self) -> Tensor:
        """The head, [D, H]: the verifier's, or its rows of the draft vocabulary; never trained."""
        own = self.lm_head
        return self.verifier_parts.lm_head.weight.detach() if own is None else own.weight

    def slot_logits(self, states: Tensor) -> Tensor:
        """Turn states after the final norm [..., H] into logits [..., D], as engines do: by the head's matrix only."""
        head = self.head_weights
        return nn.functional.linear(states.to(head.dtype), head)

    def logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        """Turn states of any step [..., H] into logits over the draft vocabulary [..., D]."""
        return self.slot_logits(hidden)

    @property
    def memory_size(self) -> int:
        """Width of what a head carries from slot to slot: none."""
        return 0

    def conditioned(self, logits: Tensor, states: Tensor, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits as they are: slots of DFlash know nothing of the tokens before."""
        return logits, memory

    def drafter(self, batch_size: int) -> BlockDrafter:
        """Begin to draft for some sequences."""
        return BlockDrafter(self, batch_size, self.fc.weight.device)

    def reset_constants(self) -> None:
        """Recompute the rotary frequencies, which no checkpoint holds."""
        layers = self.config.transformer_layer_config
        self.rotary_emb = family(layers.model_type).rotary(layers)

    def _layers(self) -> list[BlockLayer]:
        return [cast(BlockLayer, layer) for layer in self.layers]

    def _initialise(self, deviation: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=deviation)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
