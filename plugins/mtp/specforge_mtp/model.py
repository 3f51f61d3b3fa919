"""Multi-token-prediction heads (https://arxiv.org/abs/2412.19437, section 2.2), run as engines draft with them.

A head projects a token's embedding and a state, both normalised, and runs one decoder layer and a norm; the verifier's
head turns the result into logits. In the rows of ``specforge.models.chain.alignment``, row t at step k reads x_{t+1+k},
beside the verifier's state of token t after its final norm (k = 0) or the result of step k - 1, at position t + k.

With a single head, row t at step k attends to step 0 of the rows up to t and to its own later steps, as a draft that
continues its chain does. With several, each step has its own head, whose keys are those of that step at the rows up to
t (see ``specforge_mtp.depths``).

Letters in shapes: B rows, T tokens per row, H width, K steps, P pairs of row and step that are run, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from specforge.config import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from specforge.errors import UsageError
from specforge.models.base_components import norm_scale, rotary_options, start_norm
from specforge.models.chain.drafter import FeatureDrafter
from specforge.models.chain.ttt_attention import record_keys
from specforge.models.chain.unrolling import run_chain
from specforge.models.draft_attention import DraftAttention
from specforge.models.draft_rows import DraftRows
from specforge.models.drafter import Drafter
from specforge.models.lean_blocks import use_memory_saving_blocks
from specforge.models.speculator import SpeculatorModel
from specforge.proposals import GreedyTokenProposalConfig
from specforge.verifier.features import Features
from specforge_mtp.blocks import blocks_of, layer_config
from specforge_mtp.config import MtpSpeculatorConfig
from specforge_mtp.depths import DepthDrafter, run_depths

# Row t has the position of token t.
FIRST_POSITION = 0


class MtpDraftModel(SpeculatorModel):
    """One or several heads; embeddings and vocabulary head are the verifier's.

    Args:
        config: The heads' configuration.
    """

    config_class: ClassVar[type[SpeculatorModelConfig]] = MtpSpeculatorConfig
    config: MtpSpeculatorConfig

    def __init__(self, config: MtpSpeculatorConfig) -> None:
        super().__init__(config)
        self.family = config.family
        self._layer_config = layer_config(config.transformer_layer_config)
        self._blocks = blocks_of(self._layer_config)
        heads = range(config.num_nextn_predict_layers)
        self.mtp_layers = nn.ModuleList(self._head(index) for index in heads)
        self.rotary_emb = self._blocks.rotary(self._layer_config)
        use_memory_saving_blocks(self)
        self._initialise(getattr(self._layer_config, "initializer_range", 0.02))

    @classmethod
    def from_training_args(cls, verifier_config: PreTrainedConfig, **kwargs: Any) -> Self:
        """Create the heads of a verifier, with random weights.

        Args:
            verifier_config: The verifier's transformers configuration.
            **kwargs: ``verifier_name_or_path``, ``mtp_steps`` (3, the length of the proposed chains), and ``fresh``
                (False): new heads, for any verifier.

        Raises:
            UsageError: No family of heads is known for the verifier.
        """
        text = verifier_config.get_text_config().to_dict()
        config = MtpSpeculatorConfig.of_verifier(text, kwargs.get("fresh", False))
        verifier = VerifierConfig.from_config(verifier_config, kwargs.get("verifier_name_or_path"))
        config.speculators_config = proposals_for(verifier, kwargs.get("mtp_steps", 3))
        return cls(config)

    @property
    def num_heads(self) -> int:
        """Number of heads."""
        return len(self.mtp_layers)

    def borrow_weights(self) -> None:
        """Start the final norms of new heads at the scale of the verifier's, which its vocabulary head expects."""
        parts = self.verifier_parts
        for index in range(self.num_heads):
            start_norm(self._fusion(index).final_layernorm, norm_scale(parts.norm, parts.lm_head.in_features))

    def first_feature(self, features: Features) -> Tensor:
        """Return the first step's input, [B, T, H]: the verifier's last state after its final norm."""
        with torch.no_grad():
            return cast(Tensor, self.verifier_parts.norm(features.last))

    def advance(
        self,
        tokens: Tensor,
        feature: Tensor,
        position_ids: Tensor,
        attention: DraftAttention,
        wanted: int | None = None,
        head: int = 0,
    ) -> Tensor:
        """Run a head once.

        Args:
            tokens: Tokens [B, T].
            feature: The state beside each token, [B, T, H].
            position_ids: Positions [B, T].
            attention: The attention of the rows.
            wanted: Number of first rows to return; None for all.
            head: Number of the head.

        Returns:
            States after the head's final norm, [B, wanted, H].
        """
        layer: Any = self.mtp_layers[head]
        around = self._fusion(head)
        hidden = self._fused(around, tokens, feature, position_ids)
        wanted = hidden.shape[1] if wanted is None else wanted
        if wanted < hidden.shape[1]:
            # The other rows only provide keys and values.
            rest, positions = hidden[:, wanted:], position_ids[:, wanted:]
            rotated = self._rotated(rest, positions)
            read = layer.input_layernorm(rest)
            record_keys(layer.self_attn, read, attention, position_embeddings=rotated, position_ids=positions)
        hidden, positions = hidden[:, :wanted], position_ids[:, :wanted]
        output = layer(
            hidden,
            attention_mask=None,
            position_embeddings=self._rotated(hidden, positions),
            position_ids=positions,
            draft_attention=attention,
        )
        return cast(Tensor, around.final_layernorm(output if isinstance(output, Tensor) else output[0]))

    def fed_back(self, states: Tensor) -> Tensor:
        """Return the next step's input: the states themselves, [..., H]."""
        return states

    def chain(self, input_ids: Tensor, feature: Tensor, position_ids: Tensor, rows: DraftRows) -> Tensor:
        """Run the steps at the rows that are needed, fed with the true tokens.

        Args:
            input_ids: The verifier's tokens x, [B, T].
            feature: The first step's input, [B, T, H] (see ``first_feature``).
            position_ids: Positions that restart at 0 with each document, [B, T].
            rows: The rows that each step runs.

        Returns:
            Their states, concatenated step by step, [P, H] (see ``DraftRows.state_index``).

        Raises:
            UsageError: There are more steps than heads, and several heads.
        """
        if self.num_heads == 1:
            return run_chain(self, input_ids, feature, position_ids, rows, FIRST_POSITION)
        if len(rows.counts) > self.num_heads:
            raise UsageError(f"{len(rows.counts)} steps need as many heads, and the verifier has {self.num_heads}")
        return run_depths(self, input_ids, feature, position_ids + FIRST_POSITION, rows)

    def states(self, batch: Mapping[str, Tensor], features: Features, rows: DraftRows) -> Tensor:
        """Run the steps of a chain at the rows that are needed."""
        return self.chain(batch["input_ids"], self.first_feature(features), batch["position_ids"], rows)

    @property
    def head_weights(self) -> Tensor:
        """The verifier's vocabulary head, [V, H]."""
        return self.verifier_parts.lm_head.weight

    @property
    def finish(self) -> Callable[[Tensor], Tensor]:
        """The function that the verifier applies to logits after its head."""
        return self.verifier_parts.finish

    def state_logits(self, states: Tensor) -> Tensor:
        """Compute logits [..., V] from states [..., H]."""
        return self.logits(states)

    def logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        """Compute logits [..., V] from the states of any step [..., H] with the verifier's vocabulary head."""
        parts = self.verifier_parts
        return parts.head(hidden.to(parts.lm_head.weight.dtype))

    def drafter(self, batch_size: int) -> Drafter:
        """Create a drafter; row t has position t."""
        device = self._fusion(0).input_proj.weight.device
        if self.num_heads == 1:
            return FeatureDrafter(self, batch_size, device, FIRST_POSITION)
        return DepthDrafter(self, batch_size, device)

    def reset_constants(self) -> None:
        """Recompute the rotary frequencies, which are not stored in checkpoints."""
        self.rotary_emb = self._blocks.rotary(self._layer_config)

    def _head(self, index: int) -> nn.Module:
        """Build a head: a decoder layer with the projection and the norms around it, if it has its own."""
        layer: Any = self._blocks.build(self._layer_config)
        # The index of its keys in caches.
        layer.self_attn.layer_idx = index
        if index == 0 or not self.family.shares_fusion:
            width = self._layer_config.hidden_size
            layer.input_proj = nn.Linear(2 * width, width, bias=False)
            for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
                setattr(layer, name, copy.deepcopy(layer.input_layernorm))
        return cast(nn.Module, layer)

    def _fusion(self, head: int) -> Any:
        """Return the module with a head's projection and norms."""
        return self.mtp_layers[0 if self.family.shares_fusion else head]

    def _fused(self, around: Any, tokens: Tensor, feature: Tensor, position_ids: Tensor) -> Tensor:
        """Project the embeddings of tokens [B, T] and states [B, T, H] to the decoder layer's input, [B, T, H]."""
        dtype = around.input_proj.weight.dtype
        with torch.no_grad():
            embedded = self.verifier_parts.embed_tokens(tokens).to(dtype)
            if self.family.skips_first:
                embedded = embedded.masked_fill(position_ids[..., None] == 0, 0)
        both = [around.token_layernorm(embedded), around.hidden_layernorm(feature.to(dtype))]
        return cast(Tensor, around.input_proj(torch.cat(both[::-1] if self.family.hidden_first else both, dim=-1)))

    def _rotated(self, hidden: Tensor, position_ids: Tensor) -> Any:
        """Return the rotary embedding of positions in the form that the layers expect."""
        return self.rotary_emb(hidden, position_ids, **rotary_options(self.rotary_emb, self._layer_config))

    def _initialise(self, deviation: float) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=deviation)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def proposals_for(verifier: VerifierConfig, speculative_tokens: int = 3) -> SpeculatorsConfig:
    """Return what heads are meant for: chains."""
    return SpeculatorsConfig(
        algorithm=MtpSpeculatorConfig.model_type_name,
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=speculative_tokens)],
        default_proposal_method="greedy",
        verifier=verifier,
    )
