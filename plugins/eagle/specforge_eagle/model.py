"""The draft network of EAGLE-1, EAGLE-2 (https://arxiv.org/abs/2401.15077, 2406.16858) and HASS (2408.15766).

A decoder layer reads the embedding of a token, fused with the verifier's feature of the previous token: its last state
*after* the final norm. The layer's output is the predicted feature of the token itself, from which the verifier's head
computes logits, and which the next step reads.

Letters in shapes: B rows, T tokens per row, S slots of keys, H width, K steps, P pairs of row and step that are run,
V vocabulary.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from specforge.config import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from specforge.errors import UsageError
from specforge.models.base_components import norm_scale, rotary_options, single_layer_config, start_norm
from specforge.models.chain.drafter import FeatureDrafter
from specforge.models.chain.ttt_attention import record_keys
from specforge.models.chain.unrolling import run_chain
from specforge.models.draft_attention import DraftAttention, cache_argument
from specforge.models.draft_rows import DraftRows
from specforge.models.lean_blocks import use_memory_saving_blocks
from specforge.models.speculator import AttachmentMode, SpeculatorModel
from specforge.precision import compute_type
from specforge.private.transformers import set_attention
from specforge.proposals import GreedyTokenProposalConfig
from specforge.verifier.features import Features
from specforge.verifier.parts import VerifierParts, decoder
from specforge_eagle.config import EagleSpeculatorConfig
from specforge_eagle.masked_attention import IMPLEMENTATION, causal_mask

# Row t has the position of token t.
FIRST_POSITION = 0


class EagleSpeculator(SpeculatorModel):
    """EAGLE-1, EAGLE-2 or HASS: drafts features with one decoder layer between the verifier's embeddings and head.

    ``embed_tokens``, ``rotary_emb`` and ``lm_head`` are the attached verifier's, or None without a verifier; they are
    shared with it and not trained, moved or saved with the draft.

    Example:
        Draft for a verifier that is loaded with it::

            config = EagleSpeculatorConfig(transformer_layer_config=AutoConfig.from_pretrained(name))
            speculator = EagleSpeculator(config, verifier=name, verifier_attachment_mode="full")

    Args:
        config: The speculator's configuration.
        verifier: The verifier to attach: a folder, a hub id, or a loaded model; None for no verifier.
        verifier_attachment_mode: ``"full"`` (the default) keeps the whole verifier, ``"train_only"`` only the parts
            that ``forward`` needs, and ``"detached"`` attaches nothing.
    """

    config_class: ClassVar[type[SpeculatorModelConfig]] = EagleSpeculatorConfig
    config: EagleSpeculatorConfig

    def __init__(
        self,
        config: EagleSpeculatorConfig,
        verifier: str | os.PathLike[str] | PreTrainedModel | None = None,
        verifier_attachment_mode: AttachmentMode | None = None,
    ) -> None:
        super().__init__(config)
        self._layer_config = _drafting(config.transformer_layer_config)
        self._verifier_rotary: tuple[nn.Module | None] | None = None
        self.stored_embeddings: Tensor | None = None
        """Token embeddings [V, H] that were stored with the draft in another layout, to be written back."""
        width = self._layer_config.hidden_size

        self.fusion_fc = nn.Linear(2 * width, width, bias=config.fusion_bias)
        self.transformer: Any = config.decoder_layer.build(self._layer_config)
        self._attends_to_normed = hasattr(self.transformer, "input_layernorm")
        self.rotary: nn.Module = config.decoder_layer.rotary(self._layer_config)
        norms = self._norms() if config.layernorms else [nn.Identity(), nn.Identity(), nn.Identity()]
        self.embedding_layernorm, self.transformer.input_layernorm, self.pre_lm_head_layernorm = norms
        use_memory_saving_blocks(self)
        self._initialise(getattr(self._layer_config, "initializer_range", 0.02))
        if verifier is not None and verifier_attachment_mode != "detached":
            self.attach_verifier(verifier, verifier_attachment_mode)

    @classmethod
    def from_training_args(cls, verifier_config: PreTrainedConfig, **kwargs: Any) -> Self:
        """Create the draft for a verifier from training arguments.

        Args:
            verifier_config: The verifier's transformers configuration.
            **kwargs: ``layernorms`` (False), ``fusion_bias`` (False), ``transformer_layer_architecture`` (``"auto"``:
                a layer of the verifier's own family, or a Llama layer if that has none for drafts),
                ``verifier_name_or_path``, ``speculative_tokens`` (5, the length of the proposed greedy chain).

        Returns:
            The draft with random weights.
        """
        architecture = kwargs.get("transformer_layer_architecture", "auto")
        return cls(
            EagleSpeculatorConfig(
                transformer_layer_config=single_layer_config(verifier_config, architecture),
                transformer_layer_architecture=architecture,
                layernorms=kwargs.get("layernorms", False),
                fusion_bias=kwargs.get("fusion_bias", False),
                speculators_config=SpeculatorsConfig(
                    algorithm=EagleSpeculatorConfig.model_type_name,
                    proposal_methods=[
                        GreedyTokenProposalConfig(speculative_tokens=kwargs.get("speculative_tokens", 5))
                    ],
                    default_proposal_method="greedy",
                    verifier=VerifierConfig.from_config(verifier_config, kwargs.get("verifier_name_or_path")),
                ),
            )
        )

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arguments of ``forward`` that depend on training settings: none, in training and validation.

        Args:
            **kwargs: Training arguments; all are ignored.
        """
        return {}, {}

    @property
    def embed_tokens(self) -> nn.Module | None:
        """The attached verifier's token embeddings."""
        return self._attached[1].embed_tokens if self._attached else None

    @property
    def lm_head(self) -> nn.Module | None:
        """The attached verifier's head."""
        return self._attached[1].lm_head if self._attached else None

    @property
    def rotary_emb(self) -> nn.Module | None:
        """The attached verifier's rotary embedding; the draft's own if no whole model is attached.

        The draft always uses its own, which follows the configuration of its layer, like serving engines.
        """
        return None if self._verifier_rotary is None else (self._verifier_rotary[0] or self.rotary)

    def attach_verifier(
        self,
        verifier: str | os.PathLike[str] | PreTrainedModel | VerifierParts,
        mode: Literal["full", "train_only"] | None = None,
    ) -> PreTrainedModel | VerifierParts:
        """Attach the verifier whose embeddings, final norm and head the draft uses.

        Example:
            For generation, then for training::

                speculator.attach_verifier(verifier)
                tokens = speculator.generate(input_ids)
                speculator.detach_verifier()

                speculator.attach_verifier(verifier, mode="train_only")
                outputs = speculator(input_ids, hidden_states)

        Args:
            verifier: A folder, a hub id, a loaded model, or its parts.
            mode: ``"full"`` (the default) keeps the whole model; ``"train_only"`` only the parts that ``forward``
                needs, and reads nothing else from files. ``generate`` is then not available.

        Returns:
            The attached verifier: the model, or its parts if only those were read.

        Raises:
            ValueError: There is no such mode.
            UsageError: The verifier cannot be loaded, or its width differs from the draft's.
        """
        if mode not in (None, "full", "train_only"):
            raise ValueError(f"mode {mode!r} is not one of: 'full', 'train_only'")
        attached = super().attach_verifier(verifier, mode)
        is_model = isinstance(attached, PreTrainedModel)
        self._verifier_rotary = (getattr(decoder(attached), "rotary_emb", None) if is_model else None,)
        width, expected = self.verifier_parts.config.hidden_size, self._layer_config.hidden_size
        if width != expected:
            self.detach_verifier()
            raise UsageError(f"the draft was made for a verifier with a width of {expected:,}; this one has {width:,}")
        return attached

    def detach_verifier(self) -> None:
        """Detach the verifier; the draft cannot run until another is attached."""
        super().detach_verifier()
        self._verifier_rotary = None

    def borrow_weights(self) -> None:
        """Initialise the norm before the head at the scale of the verifier's features, which the head expects.

        Features have already passed the verifier's final norm: the scale is a single number, the root mean square of
        that norm's factors.
        """
        norm, parts = self.pre_lm_head_layernorm, self.verifier_parts
        if getattr(norm, "weight", None) is not None:
            scale = norm_scale(parts.norm, parts.lm_head.in_features)
            start_norm(norm, scale.square().mean().sqrt().expand_as(scale))

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens [...] as [..., H] with the verifier's embeddings."""
        with torch.no_grad():
            embedded = self.verifier_parts.embed_tokens(tokens)
        return cast(Tensor, embedded.to(compute_type(self.fusion_fc.weight)))

    def fuse(self, tokens: Tensor, feature: Tensor) -> Tensor:
        """Fuse the embeddings of tokens [B, T] with features [B, T, H] into the decoder layer's input, [B, T, H]."""
        embedded = self.embedding_layernorm(self.embed(tokens))
        return cast(Tensor, self.fusion_fc(torch.cat([embedded, feature.to(embedded.dtype)], dim=-1)))

    def first_feature(self, features: Features) -> Tensor:
        """Return the first step's input, [B, T, H]: the verifier's last state after its final norm."""
        with torch.no_grad():
            return cast(Tensor, self.verifier_parts.norm(features.last))

    def forward(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Tensor | CausalLMOutputWithPast:
        """Predict the feature of each row's token and the token after it, in one teacher-forced step.

        Args:
            input_ids: Shifted tokens, [B, T]: row i holds token x_{i+1}.
            hidden_states: The verifier's last states after its final norm, [B, T, H]: row i holds that of x_i.
            attention_mask: 1 on tokens and 0 on padding, [B, S], including rows in the cache; or which slots each row
                sees, [B, 1, T, S], boolean or additive. Causal if None.
            position_ids: Positions [B, T]; by default they continue those of the cache, from 0.
            past_key_values: A cache of transformers with the keys and values of earlier rows; it is extended.
            use_cache: Whether to return the cache; by default if one is given.
            output_attentions: Whether to return the attention weights, [B, heads, T, S].
            output_hidden_states: Whether to return the decoder layer's input and the predicted feature, [B, T, H].
            return_dict: Whether to return all of these instead of only the logits; by default as configured in the
                layer's configuration.

        Returns:
            Logits [B, T, V], those of row i for token x_{i+2}; a tensor or ``CausalLMOutputWithPast``.

        Raises:
            ValueError: No verifier is attached, or the cache is not a cache of transformers.
        """
        if not isinstance(past_key_values, Cache | None):
            raise ValueError(
                f"past_key_values must be a Cache of transformers, such as DynamicCache, not a "
                f"{type(past_key_values).__name__}"
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden = self.fuse(input_ids, hidden_states)
        weights: list[Tensor] | None = [] if output_attentions else None
        mask = causal_mask(
            self._layer_config, hidden, attention_mask, past_key_values, position_ids, weighted=weights is not None
        )
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        cache = {cache_argument(self.transformer.forward): past_key_values}
        predicted = self._transform(hidden, position_ids, attention_mask=mask, attention_weights=weights, **cache)
        logits = self.logits(predicted)
        if not (self._layer_config.return_dict if return_dict is None else return_dict):
            return logits
        returned = None if use_cache is False else past_key_values
        return CausalLMOutputWithPast(
            logits=logits,
            **{cache_argument(CausalLMOutputWithPast): returned},
            hidden_states=(hidden, predicted) if output_hidden_states else None,
            attentions=None if weights is None else tuple(weights),
        )

    def advance(
        self,
        tokens: Tensor,
        feature: Tensor,
        position_ids: Tensor,
        attention: DraftAttention,
        wanted: int | None = None,
    ) -> Tensor:
        """Run the draft once.

        Args:
            tokens: Tokens [B, T].
            feature: The feature of the token before each token, [B, T, H].
            position_ids: Positions [B, T].
            attention: The attention of the rows.
            wanted: Number of first rows to return; None for all.

        Returns:
            The predicted feature of each token, [B, wanted, H].
        """
        hidden = self.fuse(tokens, feature)
        if wanted is None or wanted == hidden.shape[1]:
            return self._transform(hidden, position_ids, draft_attention=attention)
        if not self._attends_to_normed:
            # Only the layer itself knows the attention's input in such a family.
            return self._transform(hidden, position_ids, draft_attention=attention)[:, :wanted]
        # The other rows only provide keys and values.
        rest, positions = hidden[:, wanted:], position_ids[:, wanted:]
        read = self.transformer.input_layernorm(rest)
        rotated = self._rotated(rest, positions)
        record_keys(self.transformer.self_attn, read, attention, position_embeddings=rotated, position_ids=positions)
        return self._transform(hidden[:, :wanted], position_ids[:, :wanted], draft_attention=attention)

    def fed_back(self, states: Tensor) -> Tensor:
        """Return the next step's input: the predicted features themselves, [..., H]."""
        return states

    def before_head(self, states: Tensor) -> Tensor:
        """Return the input of the verifier's head for predicted features, [..., H]."""
        return cast(Tensor, self.pre_lm_head_layernorm(states))

    @property
    def head_weights(self) -> Tensor:
        """The verifier's head, [V, H]."""
        return self.verifier_parts.lm_head.weight

    @property
    def finish(self) -> Callable[[Tensor], Tensor]:
        """The function that the verifier applies to logits after its head."""
        return self.verifier_parts.finish

    def state_logits(self, states: Tensor) -> Tensor:
        """Compute logits [..., V] from predicted features [..., H]."""
        return self.logits(states)

    def logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        """Compute logits [..., V] from predicted features [..., H] of any step with the verifier's head."""
        parts = self.verifier_parts
        return parts.head(self.before_head(hidden).to(parts.lm_head.weight.dtype))

    def chain(
        self,
        input_ids: Tensor,
        feature: Tensor,
        position_ids: Tensor,
        rows: DraftRows,
        detached: bool = False,
    ) -> Tensor:
        """Run the steps of a chain at the rows that are needed, fed with the true tokens.

        Rows are those of ``specforge.models.chain.alignment``: row t at step k reads token x_{t+1+k} at position t + k,
        and the feature of token t (step 0) or its own prediction of step k - 1.

        Args:
            input_ids: The verifier's tokens x, [B, T].
            feature: The first step's input from the verifier, [B, T, H] (see ``first_feature``).
            position_ids: Positions that restart at 0 with each document, [B, T].
            rows: The rows that each step runs.
            detached: Whether to stop gradients through the features that are fed back.

        Returns:
            Predicted features, concatenated step by step, [P, H] (see ``DraftRows.state_index``); row t at step k
            predicts the feature of token x_{t+1+k}.
        """
        return run_chain(self, input_ids, feature, position_ids, rows, FIRST_POSITION, detached)

    def states(self, batch: Mapping[str, Tensor], features: Features, rows: DraftRows) -> Tensor:
        """Predict features step by step, without gradients through those that are fed back."""
        read = self.first_feature(features)
        return self.chain(batch["input_ids"], read, batch["position_ids"], rows, detached=True)

    def drafter(self, batch_size: int) -> FeatureDrafter:
        """Create a drafter; row t has position t."""
        return FeatureDrafter(self, batch_size, self.fusion_fc.weight.device, FIRST_POSITION)

    def stored_config(self) -> dict[str, Any]:
        """Return the content of ``config.json`` in the ``speculators`` layout.

        It lists only the network among the architectures; the layer is added when the file is read.
        """
        return super().stored_config() | {"architectures": [type(self).__name__]}

    def reset_constants(self) -> None:
        """Recompute the rotary frequencies, which are not stored in checkpoints."""
        self.rotary = self.config.decoder_layer.rotary(self._layer_config)

    def _transform(self, hidden: Tensor, position_ids: Tensor, **attention: Any) -> Tensor:
        rotated = self._rotated(hidden, position_ids)
        output = self.transformer(hidden, position_embeddings=rotated, position_ids=position_ids, **attention)
        return cast(Tensor, output if isinstance(output, Tensor) else output[0])

    def _rotated(self, hidden: Tensor, position_ids: Tensor) -> Any:
        """Return the rotary embedding of positions in the form that the layer expects."""
        return self.rotary(hidden, position_ids, **rotary_options(self.rotary, self._layer_config))

    def _norms(self) -> Sequence[nn.Module]:
        """Create three norms of the layer's family."""
        norm = getattr(self.transformer, "input_layernorm", None)
        if norm is None:
            name = type(self.transformer).__name__
            raise UsageError(f"{name} has no norm before its attention, so layernorms=True is not possible")
        return [copy.deepcopy(norm), norm, copy.deepcopy(norm)]

    def _initialise(self, deviation: float) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=deviation)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def _drafting(config: PreTrainedConfig) -> PreTrainedConfig:
    """Copy a layer's configuration for a layer that attends with ``specforge_eagle.masked_attention``."""
    config = copy.deepcopy(config)
    set_attention(config, IMPLEMENTATION)
    if getattr(config, "attn_logit_softcapping", None):
        # Fused attention does not cap its logits, and a draft learns without it.
        config.attn_logit_softcapping = None
    return config
