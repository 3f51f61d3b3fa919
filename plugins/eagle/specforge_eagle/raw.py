"""The layout of the published EAGLE-1 and HASS heads: ``fc.*``, ``layers.0.*``, a plain decoder's configuration.

Four programs read it, each in a slightly different form, above all of the fusion's bias:

* SafeAILab's EAGLE expects one unless the configuration has ``"bias": false``;
* the published HASS code likewise; its heads have one;
* vLLM has none, and silently ignores one in the file;
* SGLang always has one, and leaves it random if the file has none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from specforge.checkpoints.layout import Layout, StoredDraft
from specforge.checkpoints.plain import NON_LAYER_FIELDS, position_faults, width_faults, with_legacy_rope
from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.config import SpeculatorsConfig, VerifierConfig
from specforge.errors import UsageError
from specforge.models.speculator import SpeculatorModel
from specforge.proposals import GreedyTokenProposalConfig
from specforge.verifier.parts import VerifierParts
from specforge_eagle.config import EagleSpeculatorConfig
from specforge_eagle.model import EagleSpeculator

# Name prefixes: ours and the published ones.
NAMES = {"fusion_fc.": "fc.", "transformer.": "layers.0."}
EMBEDDINGS = "embed_tokens.weight"
BIAS = "fc.bias"
FUSION = "fc.weight"
SGLANG_ARCHITECTURE = "LlamaForCausalLMEagle"
# vLLM prefixes these with "Eagle"; it has no drafts of other families.
VLLM_ARCHITECTURES = (
    "LlamaForCausalLM",
    "Llama4ForCausalLM",
    "MistralForCausalLM",
    "MiniCPMForCausalLM",
    "CohereForCausalLM",
)


class SafeAILabLayout(Layout):
    """The form that SafeAILab's EAGLE reads."""

    def recognises(self, stored: StoredDraft) -> bool:
        """Recognise it by the names: one fusion of two states, and one layer without a norm of the feature."""
        return _has_raw_names(stored) and stored.config.get("architectures") != [SGLANG_ARCHITECTURE]

    def read(self, stored: StoredDraft, verifier: VerifierConfig) -> EagleSpeculator:
        """Build the draft.

        Token embeddings in the file must be the verifier's; they are kept, to be written back.
        """
        weights = dict(stored.tensors)
        embeddings = weights.pop(EMBEDDINGS, None)
        # "bias" is not a field of decoders, and missing from heads that have none: the tensors decide.
        layers = {name: one for name, one in stored.config.items() if name not in (*NON_LAYER_FIELDS, "bias")}
        config = EagleSpeculatorConfig.from_dict(
            {
                "transformer_layer_config": layers,
                "fusion_bias": BIAS in weights,
                "speculators_config": SpeculatorsConfig(
                    algorithm=EagleSpeculatorConfig.model_type_name,
                    proposal_methods=[GreedyTokenProposalConfig()],
                    default_proposal_method="greedy",
                    verifier=verifier,
                ),
            },
            where=stored.config_where,
        )
        published = {theirs: ours for ours, theirs in NAMES.items()}
        state = {_renamed(name, published): tensor for name, tensor in weights.items()}
        model = EagleSpeculator.from_state(config, state, where=stored.where)
        if embeddings is not None and verifier.name_or_path:
            own = VerifierParts.from_pretrained(verifier.name_or_path).embed_tokens.weight
            _check_embeddings(
                embeddings, own, f"{stored.where}: its token embeddings are not those of {verifier.name_or_path}"
            )
        model.stored_embeddings = embeddings
        return model

    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return tensors and configuration, including embeddings that were stored with the draft.

        Raises:
            UsageError: The draft has layernorms, for which this layout has no names.
        """
        draft = cast(EagleSpeculator, model)
        if draft.config.layernorms:
            raise UsageError(
                f"the {self.format.name} format has no names for the norms of a draft with layernorms, so its readers "
                "would drop them; use --format speculators"
            )
        tensors = {_renamed(name, NAMES): tensor for name, tensor in draft.state_dict().items()}
        if draft.stored_embeddings is not None:
            tensors[EMBEDDINGS] = draft.stored_embeddings.to(draft.dtype)
        self.settle_bias(tensors)
        return StoredDraft(_plain_config(draft) | {"bias": BIAS in tensors}, tensors)

    def settle_bias(self, tensors: dict[str, Tensor]) -> None:
        """Adapt the bias to the reader; here the configuration states whether there is one.

        Args:
            tensors: The tensors to write; changed in place.
        """

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield what readers would drop, add, or compute differently."""
        stated = stored.config.get("bias", True)
        if bool(stated) != (BIAS in stored.tensors):
            what = "holds none, so it stays random" if stated else "holds one, which is ignored"
            yield f'"bias" is {json.dumps(stated)} or not set in config.json, but the file {what}'
        if stored.config.get("num_hidden_layers") != 1:
            yield f"num_hidden_layers is {stored.config.get('num_hidden_layers')}, not 1: readers build this many"
        yield from position_faults(stored.config, verifier)
        yield from width_faults(stored.config.get("hidden_size"), verifier)

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return Python code that uses SafeAILab's package."""
        return (
            "from eagle.model.ea_model import EaModel\n\n"
            f'model = EaModel.from_pretrained(base_model_path="{verifier}", ea_model_path="{draft}", use_eagle3=False)'
        )


class HassLayout(SafeAILabLayout):
    """The form that the published HASS code reads: always with a bias, zeros if the draft has none."""

    def recognises(self, stored: StoredDraft) -> bool:
        """Never: such a head cannot be distinguished from SafeAILab's."""
        return False

    def settle_bias(self, tensors: dict[str, Tensor]) -> None:
        """Add zeros."""
        tensors.setdefault(BIAS, torch.zeros_like(tensors[FUSION][:, 0]))

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return the arguments of the published evaluation scripts."""
        return f"# scripts of the published HASS code: --base-model-path {verifier} --ea-model-path {draft}"


class VLLMLayout(SafeAILabLayout):
    """The form that vLLM reads as ``method: eagle``: no bias, and no embeddings, which are the verifier's."""

    def recognises(self, stored: StoredDraft) -> bool:
        """Never: it cannot be distinguished from SafeAILab's."""
        return False

    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return tensors and configuration.

        Raises:
            UsageError: The draft has layernorms, a nonzero bias, or a layer that vLLM has no draft for.
        """
        stored = super().write(model)
        _drop_embeddings(stored.tensors, model)
        architecture = stored.config["architectures"][0]
        if architecture not in VLLM_ARCHITECTURES:
            raise UsageError(
                f"vLLM has no such draft for {architecture}, only for {', '.join(VLLM_ARCHITECTURES)}. Train with "
                "model.draft.transformer_layer_architecture LlamaDecoderLayer"
            )
        return stored

    def settle_bias(self, tensors: dict[str, Tensor]) -> None:
        """Drop a bias of zeros, which has no effect.

        Raises:
            UsageError: The bias is not zero: no other part of the network could replace it.
        """
        bias = tensors.pop(BIAS, None)
        if bias is not None and bool(bias.any()):
            raise UsageError(
                "this draft has a fusion bias, which vLLM would silently ignore, and the draft would be "
                "wrong; train it with model.draft.fusion_bias false, or serve it with SGLang (--format sglang)"
            )

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield what vLLM would ignore or refuse."""
        if BIAS in stored.tensors:
            yield f"the file holds {BIAS}, which vLLM silently ignores"
        yield from super().faults(stored, verifier)
        if (architectures := stored.config.get("architectures")) not in [[one] for one in VLLM_ARCHITECTURES]:
            yield f"architectures is {architectures}; vLLM has drafts of this kind for {', '.join(VLLM_ARCHITECTURES)}"

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return the command; the method is always given, because vLLM otherwise guesses it from the path."""
        speculative = json.dumps({"model": draft, "method": "eagle", "num_speculative_tokens": tokens})
        return f"vllm serve {verifier} --speculative-config '{speculative}'"


class SGLangLayout(SafeAILabLayout):
    """The form that SGLang reads as ``LlamaForCausalLMEagle``: always a bias, no embeddings."""

    def recognises(self, stored: StoredDraft) -> bool:
        """Recognise it by the architecture."""
        return _has_raw_names(stored) and stored.config.get("architectures") == [SGLANG_ARCHITECTURE]

    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return tensors and configuration.

        Raises:
            UsageError: The draft has layernorms, or a layer other than Llama's.
        """
        stored = super().write(model)
        _drop_embeddings(stored.tensors, model)
        if stored.config["architectures"] != ["LlamaForCausalLM"]:
            raise UsageError(
                f"SGLang has such a draft only for Llama layers, and this one is {stored.config['model_type']}; train "
                "with model.draft.transformer_layer_architecture LlamaDecoderLayer"
            )
        return StoredDraft(stored.config | {"architectures": [SGLANG_ARCHITECTURE]}, stored.tensors)

    def settle_bias(self, tensors: dict[str, Tensor]) -> None:
        """Add a bias of zeros: SGLang would leave a missing one random."""
        tensors.setdefault(BIAS, torch.zeros_like(tensors[FUSION][:, 0]))

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield what SGLang would leave random or run differently."""
        if BIAS not in stored.tensors:
            yield f"the file holds no {BIAS}: SGLang always has one, and would leave it random"
        yield from super().faults(stored, verifier)
        if (architectures := stored.config.get("architectures")) != [SGLANG_ARCHITECTURE]:
            yield f"architectures is {architectures}; SGLang runs such a draft only as {SGLANG_ARCHITECTURE}"

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return the command for a chain."""
        return (
            f"python3 -m sglang.launch_server --model-path {verifier} --speculative-algorithm EAGLE "
            f"--speculative-draft-model-path {draft} --speculative-num-steps {tokens} --speculative-eagle-topk 1 "
            f"--speculative-num-draft-tokens {tokens + 1}"
        )


def _has_raw_names(stored: StoredDraft) -> bool:
    names = stored.tensors
    fusion = names.get(FUSION)
    return (
        "speculators_model_type" not in stored.config
        and fusion is not None
        and fusion.ndim == 2
        and any(name.startswith("layers.0.") for name in names)
        and not {"layers.0.hidden_norm.weight", "hidden_norm.weight"} & names.keys()
    )


def _renamed(name: str, beginnings: dict[str, str]) -> str:
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _plain_config(model: EagleSpeculator) -> dict[str, Any]:
    """Return the configuration of a one-layer decoder, in the form of the family's causal language model."""
    config = model.config
    values = config.serialize_transformer_layer_config(config.transformer_layer_config)
    values |= {
        "architectures": [config.decoder_layer.causal_lm],
        "model_type": config.decoder_layer.config.model_type,
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:1]
    return with_legacy_rope(values)


def _drop_embeddings(tensors: dict[str, Tensor], model: SpeculatorModel) -> None:
    """Drop embeddings for a reader that uses the verifier's; refuse embeddings that differ from those."""
    embeddings = tensors.pop(EMBEDDINGS, None)
    if embeddings is not None:
        own = model.verifier_parts.embed_tokens.weight
        _check_embeddings(embeddings, own, "the token embeddings stored with the draft are not the verifier's")


def _check_embeddings(embeddings: Tensor, own: Tensor, otherwise: str) -> None:
    """Refuse a head that was trained with embeddings other than its verifier's."""
    # Both may have been rounded, to different dtypes.
    same = own.shape == embeddings.shape and torch.allclose(embeddings.float(), own.float(), rtol=1e-2, atol=1e-6)
    if not same:
        raise UsageError(f"{otherwise}; the draft belongs to another verifier")
