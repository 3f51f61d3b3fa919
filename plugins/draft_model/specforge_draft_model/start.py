"""What a draft model begins with: a stored language model, some layers of the verifier, or a fresh network."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from specforge.bounds import Layers, Width
from specforge.config import NOT_COMPUTED
from specforge.data.text.verifier import VerifierTokenizer
from specforge.errors import UsageError
from specforge.models.base_components import LayerType, draft_layer_config
from specforge.verifier.features import check_logits, decoder_layers, packs
from specforge.verifier.loading import VerifierLoading, load_config, load_verifier, skeleton_of
from specforge.verifier.names import stored_names
from specforge.verifier.parts import all_names, decoder, read_tensors
from specforge_draft_model.config import DraftModelConfig
from specforge_draft_model.model import DraftModel

Result = TypeVar("Result")
STORED = VerifierLoading("float32")


class DraftModelSettings(BaseModel):
    """The draft: a stored language model, layers of the verifier, or a fresh network of the verifier's widths."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    init_model: str | None = Field(
        default=None,
        description="Folder or hub id of a causal language model with the verifier's tokenizer, to start from.",
    )
    init_layers: list[int] | None = Field(
        default=None,
        min_length=1,
        description="Layers of the verifier to start from, ascending, with its embeddings, final norm and head.",
    )
    layer_type: LayerType = Field(
        default="llama", description="Of a fresh network: family of its layers, llama, qwen3, or one of a plugin."
    )
    num_layers: Layers = Field(default=2, description="Of a fresh network: number of decoder layers.")
    hidden_size: Width | None = Field(
        default=None, ge=1, description="Of a fresh network: its width; null: the verifier's, and its embeddings."
    )
    intermediate_size: Width | None = Field(
        default=None, ge=1, description="Of a fresh network: width of the MLPs; null: the verifier's."
    )

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.init_model is not None and self.init_layers is not None:
            raise ValueError("init_model and init_layers exclude each other")
        return self


def language_model_config(
    settings: DraftModelSettings, verifier: PreTrainedConfig, name: str, loading: VerifierLoading
) -> PreTrainedConfig:
    """Return the configuration of the draft's language model; no weights are touched.

    Args:
        settings: The draft's settings.
        verifier: The verifier's configuration.
        name: Its folder or hub id.
        loading: How it is loaded.

    Raises:
        UsageError: There is no such model or layer, or its ids are not the verifier's.
    """
    text = verifier.get_text_config()
    if settings.init_model is not None:
        return _named("init_model", lambda: _checked(_config_of(str(settings.init_model), text, name, loading)))
    if settings.init_layers is not None:
        layers = settings.init_layers
        return _named("init_layers", lambda: _checked(_cut(_not_quantised(verifier, name), layers)))
    config = draft_layer_config(verifier, settings.layer_type, settings.num_layers, settings.intermediate_size)
    config.hidden_size = settings.hidden_size or config.hidden_size
    config.tie_word_embeddings = bool(getattr(text, "tie_word_embeddings", False))
    return config


def start(draft: DraftModel, settings: DraftModelSettings, verifier: str, loading: VerifierLoading) -> None:
    """Give a draft the weights that it starts from; those of a fresh network stay as they are.

    Args:
        draft: The draft, attached to its verifier's parts.
        settings: Its settings.
        verifier: Folder or hub id of the verifier.
        loading: How to load the verifier.

    Raises:
        UsageError: They cannot be read, or the model is not one that drafts, or does not keep packed documents apart.
    """
    own = draft.language_model
    _fill(own, settings, verifier, loading)
    if not packs(own):
        raise UsageError(
            f"model.draft: {type(own).__name__} reads across the documents of a packed row, and would be trained on "
            "other states than it drafts with; choose a model of another family"
        )


def _fill(own: PreTrainedModel, settings: DraftModelSettings, verifier: str, loading: VerifierLoading) -> None:
    if settings.init_model is not None:
        stored = _named("init_model", lambda: _stored_model(str(settings.init_model)))
        decoder(own).load_state_dict(decoder(stored).state_dict())
        head = own.get_output_embeddings()
        # A tied head has no tensors of its own.
        head.load_state_dict(stored.get_output_embeddings().state_dict() if head.state_dict() else {})
    elif settings.init_layers is not None:
        layers = settings.init_layers
        state = _named("init_layers", lambda: _layer_tensors(own, verifier, loading, layers))
        decoder(own).load_state_dict(state)


def _config_of(model: str, verifier: PreTrainedConfig, name: str, loading: VerifierLoading) -> PreTrainedConfig:
    """Return the configuration of a stored model, once it is clear that its ids are the verifier's."""
    config = _not_quantised(load_config(model), model)
    if config.vocab_size > verifier.vocab_size:
        raise UsageError(
            f"{model} has {config.vocab_size:,} tokens, and the verifier {name} only {verifier.vocab_size:,}; a draft "
            "model needs the verifier's tokenizer, and at most as many tokens"
        )
    _check_tokens(model, name, loading)
    longest = getattr(verifier, "max_position_embeddings", None) or 0
    own = getattr(config, "max_position_embeddings", None) or longest
    if own < longest and not getattr(config, "rope_parameters", None):
        raise UsageError(f"{model} has learnt {own:,} positions, and the verifier's texts may have {longest:,}")
    if own < longest:
        # Rotary positions have no end; engines stop drafting at the length that a configuration gives.
        config.max_position_embeddings = longest
    return config


def _not_quantised(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """Return the text configuration of a model, unless its weights are stored with scales."""
    text: PreTrainedConfig = config.get_text_config()
    if getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None):
        raise UsageError(f"the weights of {name} are quantised; start from a model in bfloat16, float16 or float32")
    return text


def _checked(config: PreTrainedConfig) -> PreTrainedConfig:
    """Refuse the configuration of a model that cannot draft, by building it without values."""
    with torch.device("meta"):
        DraftModel(DraftModelConfig.from_dict({"language_model": config}, config.model_type))
    return config


def _check_tokens(model: str, verifier: str, loading: VerifierLoading) -> None:
    """Refuse a model whose tokenizer has other ids; where one of the two has none, nothing can be compared."""
    own, expected = (
        _tokens(VerifierTokenizer(model)),
        _tokens(VerifierTokenizer(verifier, loading.revision, loading.trust_remote_code)),
    )
    different = [number for number in sorted(own.keys() & expected.keys()) if own[number] != expected[number]]
    if different:
        first = different[0]
        raise UsageError(
            f"{model} has another tokenizer than the verifier {verifier}: id {first} is {own[first]!r} there and "
            f"{expected[first]!r} here, and {len(different):,} ids differ; a draft model needs the verifier's"
        )


def _tokens(text: VerifierTokenizer) -> dict[int, str]:
    try:
        return {number: token for token, number in text.tokenizer.get_vocab().items()}
    except UsageError:
        return {}


def _stored_model(name: str) -> PreTrainedModel:
    """Load a stored model; make sure that it is causal, and that its head gives its logits."""
    model = load_verifier(name, STORED, torch.device("cpu"))
    tokens = torch.arange(1, 9).remainder(model.config.get_text_config().vocab_size)[None]
    with torch.no_grad():
        whole, begun = (model(one).logits[:, :4] for one in (tokens, tokens[:, :4]))
    # Some encoders are listed among the causal language models of transformers.
    if not torch.allclose(whole, begun, atol=1e-4 * float(whole.abs().max()), rtol=0):
        raise UsageError(f"{name} is no causal language model: its prediction at a token depends on later tokens")
    check_logits(model)
    return model


def _cut(verifier: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """Return the configuration of some layers of a verifier."""
    number = verifier.num_hidden_layers
    if not all(0 <= layer < number for layer in layers) or any(low >= high for low, high in pairwise(layers)):
        raise UsageError(f"{list(layers)} must be ascending ids of the verifier's layers, 0..{number - 1}")
    config = copy.deepcopy(verifier)
    for name, value in verifier.to_dict().items():
        # What is given layer by layer.
        if isinstance(value, list) and len(value) == number and name not in NOT_COMPUTED:
            setattr(config, name, [value[layer] for layer in layers])
    config.num_hidden_layers = len(layers)
    return config


def _layer_tensors(
    own: PreTrainedModel, verifier: str, loading: VerifierLoading, layers: Sequence[int]
) -> dict[str, Tensor]:
    """Read the tensors of a decoder that has only some layers of the verifier's, and of its files only those."""
    skeleton = skeleton_of(load_config(verifier, loading), verifier, loading)
    prefix = next(name for name, module in skeleton.named_modules() if module is decoder(skeleton))
    of_layers = next(name for name, child in decoder(own).named_children() if child is decoder_layers(own))
    there = {
        name: f"{prefix}." + re.sub(rf"^({of_layers}\.)(\d+)", lambda one: f"{one[1]}{layers[int(one[2])]}", name)
        for name in decoder(own).state_dict()
    }
    stored = stored_names(skeleton, all_names(verifier, loading.revision))
    if missing := sorted(set(there.values()) - stored.keys()):
        raise UsageError(
            f"{verifier} does not hold {missing[0]} as a tensor of its own; start from a stored model instead"
        )
    tensors = read_tensors(verifier, [stored[name] for name in there.values()], loading.revision)
    return {name: tensors[stored[other]] for name, other in there.items()}


def _named(setting: str, made: Callable[[], Result]) -> Result:
    """Name the setting in what goes wrong with a model that is read as verifiers are."""
    try:
        return made()
    except UsageError as error:
        raise UsageError(f"model.draft.{setting}: {re.sub('^verifier:? ', '', str(error))}") from None
