"""The EAGLE-3 draft network (https://arxiv.org/abs/2503.01840), with the norm options of EAGLE-3.1.

Letters in shapes: B rows, T tokens per row, n aux layers, H width, S TTT steps, P pairs of row and step that are run,
V verifier and D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from specforge.config import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from specforge.documents import DocumentLayout
from specforge.errors import UsageError
from specforge.models.base_components import Family, draft_layer_config, family, norm_scale, start_norm
from specforge.models.chain.drafter import FeatureDrafter
from specforge.models.chain.ttt_attention import record_keys
from specforge.models.chain.unrolling import run_chain
from specforge.models.draft_attention import IMPLEMENTATION, DraftAttention
from specforge.models.draft_rows import DraftRows
from specforge.models.drafter import Drafter
from specforge.models.lean_blocks import use_memory_saving_blocks
from specforge.models.speculator import SpeculatorModel
from specforge.models.vocabulary import DraftVocabulary, map_faults
from specforge.precision import compute_type
from specforge.private.transformers import set_attention
from specforge.proposals import GreedyTokenProposalConfig
from specforge.verifier.features import Features
from specforge_eagle3.config import Eagle3SpeculatorConfig, default_aux_layers

# Row t has the position of the token that it reads.
FIRST_POSITION = 1
NO_LATENT_ATTENTION = (
    "its decoder layer has multi-head latent attention (MLA); EAGLE-3 drafts have Llama or Qwen3 layers"
)


class FirstLayer(nn.Module):
    """The draft's first decoder layer, whose attention reads the token's embedding concatenated with the feature.

    Args:
        config: Configuration of the decoder layers.
        blocks: The building blocks of their family.
        norm_before_residual: Whether the residual stream starts from the normalised feature.
    """

    def __init__(self, config: PreTrainedConfig, blocks: Family, norm_before_residual: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = blocks.norm(width, eps=config.rms_norm_eps)
        self.hidden_norm = blocks.norm(width, eps=config.rms_norm_eps)
        self.self_attn = blocks.attention(config, layer_idx=0)
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(self.self_attn, name)
            wide = nn.Linear(2 * width, narrow.out_features, bias=narrow.bias is not None)
            setattr(self.self_attn, name, wide)
        self.post_attention_layernorm = blocks.norm(width, eps=config.rms_norm_eps)
        self.mlp = blocks.feed_forward(config)

    def forward(self, embedded: Tensor, feature: Tensor, **attention: Any) -> Tensor:
        """Compute the layer's output [B, T, H] from token embeddings and features [B, T, H]."""
        normalised = self.hidden_norm(feature)
        residual = normalised if self.norm_before_residual else feature
        attended, _ = self.self_attn(self._concatenated(embedded, normalised), attention_mask=None, **attention)
        hidden = residual + attended
        return cast(Tensor, hidden + self.mlp(self.post_attention_layernorm(hidden)))

    def attention_input(self, embedded: Tensor, feature: Tensor) -> Tensor:
        """Return the attention's input from token embeddings and features, [B, T, 2H]."""
        return self._concatenated(embedded, self.hidden_norm(feature))

    def _concatenated(self, embedded: Tensor, normalised: Tensor) -> Tensor:
        return torch.cat([self.input_layernorm(embedded), normalised], dim=-1)


class Eagle3DraftModel(SpeculatorModel):
    """EAGLE-3: fuses features of several verifier layers and drafts with one or more decoder layers.

    Args:
        config: The speculator's configuration.
        own_embeddings: Whether the draft has its own token embeddings; otherwise it borrows the verifier's. By default
            ``config.embed_requires_grad``.
    """

    config_class: ClassVar[type[SpeculatorModelConfig]] = Eagle3SpeculatorConfig
    config: Eagle3SpeculatorConfig

    def __init__(self, config: Eagle3SpeculatorConfig, own_embeddings: bool | None = None) -> None:
        super().__init__(config)
        layers = config.transformer_layer_config
        set_attention(layers, IMPLEMENTATION)
        blocks = family(layers.model_type)
        width, eps, aux = layers.hidden_size, layers.rms_norm_eps, config.num_aux_layers
        feature_width = config.target_hidden_size or width
        own = config.embed_requires_grad if own_embeddings is None else own_embeddings

        self.embed_tokens = nn.Embedding(layers.vocab_size, width) if own else None
        if self.embed_tokens is not None:
            self.embed_tokens.requires_grad_(config.embed_requires_grad)
        self.input_norm = blocks.norm(aux * feature_width, eps=eps) if config.norm_before_fc else None
        self.fc_norm = (
            nn.ModuleList(blocks.norm(feature_width, eps=eps) for _ in range(aux)) if config.fc_norm else None
        )
        self.fc = nn.Linear(aux * feature_width, width, bias=False)
        first = FirstLayer(layers, blocks, config.norm_before_residual)
        others = (blocks.decoder_layer(layers, index) for index in range(1, layers.num_hidden_layers))
        self.layers = nn.ModuleList([first, *others])
        self.norm = blocks.norm(width, eps=eps)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.rotary_emb = blocks.rotary(layers)
        if config.draft_vocab_size != config.target_vocab_size:
            self.d2t = nn.Buffer(torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.t2d = nn.Buffer(torch.zeros(config.target_vocab_size, dtype=torch.bool))
        use_memory_saving_blocks(self)
        self._initialise(layers.initializer_range)

    @classmethod
    def for_state(cls, config: SpeculatorModelConfig, state: Mapping[str, Tensor]) -> Self:
        """Build the network, with its own embeddings if the checkpoint holds some."""
        if any(".kv_a_proj_with_mqa." in name for name in state):
            raise UsageError(NO_LATENT_ATTENTION)
        layers = {name.split(".")[1] for name in state if name.startswith("layers.")}
        number = cast(Eagle3SpeculatorConfig, config).transformer_layer_config.num_hidden_layers
        if number > max(len(layers), 1):
            raise UsageError(f"num_hidden_layers is {number}, but there are tensors of {len(layers)} decoder layers")
        return cls(cast(Eagle3SpeculatorConfig, config), own_embeddings="embed_tokens.weight" in state)

    def stored_faults(self, state: Mapping[str, Tensor]) -> Iterator[str]:
        """Yield faults of the maps between the vocabularies."""
        if "d2t" in state:
            yield from map_faults(state["d2t"], state["t2d"], self.config.target_vocab_size)

    @classmethod
    def from_training_args(cls, verifier_config: PreTrainedConfig, **kwargs: Any) -> Self:
        """Create the draft for a verifier from training arguments.

        Args:
            verifier_config: The verifier's transformers configuration.
            **kwargs: ``num_layers`` (1), ``norm_before_residual`` (False), ``norm_before_fc``, ``fc_norm``,
                ``norm_output``, ``t2d`` and ``d2t`` (the draft vocabulary; by default the verifier's),
                ``ttt_steps`` (7), ``verifier_name_or_path``, ``layer_type`` (``"llama"``), ``intermediate_size``,
                ``aux_layer_ids``, ``embed_requires_grad``, and ``further_fields`` of the configuration.

        Returns:
            The draft with random weights; its maps hold the given vocabulary.
        """
        layers = draft_layer_config(
            verifier_config,
            kwargs.get("layer_type", "llama"),
            kwargs.get("num_layers", 1),
            kwargs.get("intermediate_size"),
        )
        t2d = kwargs.get("t2d")
        config_class = cast(type[Eagle3SpeculatorConfig], cls.config_class)
        config = config_class(
            **kwargs.get("further_fields", {}),
            transformer_layer_config=layers,
            draft_vocab_size=layers.vocab_size if t2d is None else int(t2d.sum()),
            **{
                flag: kwargs.get(flag, False)
                for flag in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad")
            },
            eagle_aux_hidden_state_layer_ids=kwargs.get("aux_layer_ids"),
            speculators_config=SpeculatorsConfig(
                algorithm=config_class.model_type_name,
                proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=kwargs.get("ttt_steps", 7))],
                default_proposal_method="greedy",
                verifier=VerifierConfig.from_config(verifier_config, kwargs.get("verifier_name_or_path")),
            ),
        )
        model = cls(config)
        if t2d is not None and config.draft_vocab_size != config.target_vocab_size:
            vocabulary = DraftVocabulary.from_t2d(t2d)
            model.t2d.copy_(vocabulary.t2d)
            model.d2t.copy_(vocabulary.d2t if kwargs.get("d2t") is None else kwargs["d2t"])
        return model

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arguments of ``forward`` that depend on training settings, for training and validation.

        Args:
            **kwargs: Training arguments; ``ttt_steps`` (7) is read.
        """
        steps = {"steps": kwargs.get("ttt_steps", 7)}
        return steps, dict(steps)

    @property
    def aux_layers(self) -> list[int]:
        """Ids of the verifier layers that features are taken from, ascending."""
        chosen = self.chosen_aux_layers
        return default_aux_layers(self.verifier_parts.config.num_hidden_layers) if chosen is None else chosen

    @property
    def chosen_aux_layers(self) -> list[int] | None:
        """The layers of the configuration; None for the default ones."""
        return self.config.eagle_aux_hidden_state_layer_ids

    @property
    def draft_ids(self) -> Tensor | None:
        """The verifier's id of each draft token, int64 [D]; None if the vocabularies are the same."""
        d2t = getattr(self, "d2t", None)
        return None if d2t is None else d2t + torch.arange(d2t.numel(), device=d2t.device)

    def borrow_weights(self) -> None:
        """Initialise from the verifier: the rows of its head, and its embeddings if the draft has its own."""
        parts = self.verifier_parts
        rows = parts.lm_head.weight if self.draft_ids is None else parts.lm_head.weight[self.draft_ids.cpu()]
        with torch.no_grad():
            self.lm_head.weight.copy_(rows)
            start_norm(self.norm, norm_scale(parts.norm, parts.lm_head.in_features))
            if self.embed_tokens is not None:
                self.embed_tokens.weight.copy_(parts.embed_tokens.weight)

    def own_embeddings(self) -> None:
        """Copy the attached verifier's token embeddings, frozen, unless the draft has its own."""
        if self.embed_tokens is None:
            table = self.verifier_parts.embed_tokens.weight.detach().to(self.dtype, copy=True)
            self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=True)

    def borrow_embeddings(self) -> None:
        """Share the attached verifier's token embeddings if the draft's own are equal to them."""
        own, verifier = self.embed_tokens, self.verifier_parts.embed_tokens.weight
        if own is None or own.weight.shape != verifier.shape:
            return
        # Both may have been rounded, to different dtypes.
        rounded = verifier.to(own.weight.dtype).to(verifier.dtype)
        if torch.equal(own.weight.to(verifier.dtype), rounded):
            self.embed_tokens = None

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed the verifier's tokens [...] as [..., H] with the draft's own embeddings or the verifier's."""
        own = self.embed_tokens
        table = self.verifier_parts.embed_tokens.weight.detach() if own is None else own.weight
        return nn.functional.embedding(tokens, table).to(compute_type(self.fc.weight))

    def fuse(self, aux: Tensor) -> Tensor:
        """Fuse features of the aux layers [B, T, n, H] into one [B, T, H]."""
        aux = aux.to(compute_type(self.fc.weight))
        if self.fc_norm is not None:
            aux = torch.stack([norm(aux[..., index, :]) for index, norm in enumerate(self.fc_norm)], dim=-2)
        joined = aux.flatten(-2)
        return cast(Tensor, self.fc(joined if self.input_norm is None else self.input_norm(joined)))

    def forward(
        self, input_ids: Tensor, aux: Tensor, position_ids: Tensor, document_ids: Tensor, steps: int = 7
    ) -> Tensor:
        """Run the training-time test over packed documents, fed with the true tokens.

        Args:
            input_ids: The verifier's tokens x, [B, T].
            aux: Features of the aux layers in ascending order, [B, T, n, H].
            position_ids: Positions that restart at 0 with each document, [B, T].
            document_ids: Which document a token belongs to, -1 for padding, [B, T].
            steps: Number S of TTT steps.

        Returns:
            States after the final norm, [S, B, T, H]: ``lm_head`` maps them to logits over the draft vocabulary;
            those of row t at step k predict x_{t+2+k} (see ``specforge.models.chain.alignment``).
        """
        rows = DraftRows.all(steps, input_ids.numel(), DocumentLayout.of(document_ids)).to(input_ids.device)
        return self.chain(input_ids, aux, position_ids, rows).view(steps, *input_ids.shape, -1)

    def chain(self, input_ids: Tensor, aux: Tensor, position_ids: Tensor, rows: DraftRows) -> Tensor:
        """Run the training-time test at the rows that are needed.

        Args:
            input_ids: As in ``forward``.
            aux: As in ``forward``.
            position_ids: As in ``forward``.
            rows: The rows that each step runs.

        Returns:
            Their states after the final norm, concatenated step by step, [P, H] (see ``DraftRows.state_index``).
        """
        states = run_chain(self, input_ids, self.fuse(aux), position_ids, rows, FIRST_POSITION)
        return cast(Tensor, self.norm(states))

    def advance(
        self,
        tokens: Tensor,
        feature: Tensor,
        position_ids: Tensor,
        attention: DraftAttention,
        wanted: int | None = None,
    ) -> Tensor:
        """Run the draft's layers once.

        Args:
            tokens: The verifier's tokens, [B, T].
            feature: Fused features, or states fed back, [B, T, H].
            position_ids: Position of each token, [B, T].
            attention: The attention of the rows.
            wanted: Number of first rows to return; None for all.

        Returns:
            States before the final norm, [B, wanted, H].
        """
        rotary = self.rotary_emb(feature, position_ids)
        states = [self.embed(tokens), feature]
        *others, last = self.layers
        for layer in others:
            states = [run_layer(layer, states, rotary, attention)]
        return run_layer(last, states, rotary, attention, wanted)

    def fed_back(self, states: Tensor) -> Tensor:
        """Return the next step's input from states before the final norm, [..., H]."""
        return cast(Tensor, self.norm(states)) if self.config.norm_output else states

    def first_feature(self, features: Features) -> Tensor:
        """Fuse the verifier's features into the first step's input, [B, T, H]."""
        return self.fuse(features.aux)

    def state_logits(self, states: Tensor) -> Tensor:
        """Compute logits over the draft vocabulary [..., D] from states before the final norm [..., H]."""
        return self.logits(self.norm(states))

    def states(self, batch: Mapping[str, Tensor], features: Features, rows: DraftRows) -> Tensor:
        """Run the training-time test; return states after the final norm."""
        return self.chain(batch["input_ids"], features.aux, batch["position_ids"], rows)

    @property
    def head_weights(self) -> Tensor:
        """The head of all steps, [D, H]."""
        return self.lm_head.weight

    def drafter(self, batch_size: int) -> Drafter:
        """Create a drafter; row t has position t + 1."""
        return FeatureDrafter(self, batch_size, self.fc.weight.device, FIRST_POSITION)

    def reset_constants(self) -> None:
        """Recompute the rotary frequencies, which are not stored in checkpoints."""
        layers = self.config.transformer_layer_config
        self.rotary_emb = family(layers.model_type).rotary(layers)

    def _initialise(self, deviation: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=deviation)


def run_layer(
    layer: nn.Module,
    states: Sequence[Tensor],
    rotary: Sequence[Tensor],
    attention: DraftAttention,
    wanted: int | None = None,
) -> Tensor:
    """Run a decoder layer of a draft.

    Args:
        layer: The layer.
        states: Token embeddings and features for the first layer, the states of the layer before for others,
            [B, T, H] each.
        rotary: Cosines and sines of the positions, [B, T, D of a head] each.
        attention: The attention of the rows.
        wanted: Number of first rows to run, while the others only provide keys and values; None for all.

    Returns:
        States [B, wanted, H].
    """
    if wanted is not None and wanted < states[0].shape[1]:
        rest = slice(wanted, None)
        attention_module, read = _attention_of(layer, *_rows(states, rest))
        record_keys(attention_module, read, attention, position_embeddings=_rows(rotary, rest))
    first = slice(wanted)
    rotary = _rows(rotary, first)
    return cast(Tensor, layer(*_rows(states, first), position_embeddings=rotary, draft_attention=attention))


def _rows(tensors: Iterable[Tensor], rows: slice) -> list[Tensor]:
    """Return some rows of tensors [B, T, ...]."""
    return [one[:, rows] for one in tensors]


def _attention_of(layer: Any, *states: Tensor) -> tuple[nn.Module, Tensor]:
    """Return the attention module of a draft layer, and its input from the layer's states."""
    reads = layer.attention_input if isinstance(layer, FirstLayer) else layer.input_layernorm
    return layer.self_attn, reads(*states)
