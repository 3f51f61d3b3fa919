"""The layout of the published EAGLE-1 and HASS heads: ``fc.*``, ``layers.0.*``, a plain decoder's configuration.

Four programs read it and want it a little different each, above all in the bias where embedding and feature meet:

* SafeAILab's EAGLE expects one unless the configuration says ``"bias": false``;
* the published HASS code likewise; its heads have one;
* vLLM has none, and leaves one in the file out without a word;
* SGLang always has one, and leaves it at random where the file has none.
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

# Beginnings of names: ours, and the published ones.
NAMES = {"fusion_fc.": "fc.", "transformer.": "layers.0."}
EMBEDDINGS = "embed_tokens.weight"
BIAS = "fc.bias"
FUSION = "fc.weight"
SGLANG_ARCHITECTURE = "LlamaForCausalLMEagle"
# vLLM puts "Eagle" before these; it has no draft of another family.
VLLM_ARCHITECTURES = (
    "LlamaForCausalLM",
    "Llama4ForCausalLM",
    "MistralForCausalLM",
    "MiniCPMForCausalLM",
    "CohereForCausalLM",
)


class SafeAILabLayout(Layout):
    """What SafeAILab's EAGLE reads."""

    def recognises(self, stored: StoredDraft) -> bool:
        """Tell by the names: one fusion of two states, and one layer without a norm of the feature."""
        return _has_raw_names(stored) and stored.config.get("architectures") != [SGLANG_ARCHITECTURE]

    def read(self, stored: StoredDraft, verifier: VerifierConfig) -> EagleSpeculator:
        """Build the draft.

        Token embeddings that the file may hold have to be the verifier's; they are kept aside, to be written back.
        """
        weights = dict(stored.tensors)
        embeddings = weights.pop(EMBEDDINGS, None)
        # "bias" is no field of a decoder's, and is missing from heads that have none: the tensors tell.
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
        """Return tensors and configuration; embeddings that came with the draft are among them.

        Raises:
            UsageError: The draft has layernorms, for which readers have no names.
        """
        draft = cast(EagleSpeculator, model)
        if draft.config.layernorms:
            raise UsageError(
                f"the {self.format.name} format has no names for the norms of a draft with layernorms, and its readers "
                "would leave them out; --format speculators holds them"
            )
        tensors = {_renamed(name, NAMES): tensor for name, tensor in draft.state_dict().items()}
        if draft.stored_embeddings is not None:
            tensors[EMBEDDINGS] = draft.stored_embeddings.to(draft.dtype)
        self.settle_bias(tensors)
        return StoredDraft(_plain_config(draft) | {"bias": BIAS in tensors}, tensors)

    def settle_bias(self, tensors: dict[str, Tensor]) -> None:
        """Make the bias what the reader wants it to be; here the configuration says whether there is one.

        Args:
            tensors: What is to be written; changed in place.
        """

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield what readers would leave out, add, or compute otherwise."""
        said = stored.config.get("bias", True)
        if bool(said) != (BIAS in stored.tensors):
            what = "holds none, which leaves it at random" if said else "holds one, which is left out"
            yield f'"bias" is {json.dumps(said)} or not said in config.json, but the file {what}'
        if stored.config.get("num_hidden_layers") != 1:
            yield f"num_hidden_layers is {stored.config.get('num_hidden_layers')}, not 1: readers build so many layers"
        yield from position_faults(stored.config, verifier)
        yield from width_faults(stored.config.get("hidden_size"), verifier)

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return a piece of Python with SafeAILab's package."""
        return (
            "from eagle.model.ea_model import EaModel\n\n"
            f'model = EaModel.from_pretrained(base_model_path="{verifier}", ea_model_path="{draft}", use_eagle3=False)'
        )


class HassLayout(SafeAILabLayout):
    """What the published HASS code reads: always with a bias, of zeros where there is none."""

    def recognises(self, stored: StoredDraft) -> bool:
        """Never: nothing tells such a head from SafeAILab's."""
        return False

    def settle_bias(self, tensors: dict[str, Tensor]) -> None:
        """Add zeros."""
        tensors.setdefault(BIAS, torch.zeros_like(tensors[FUSION][:, 0]))

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return what the published evaluation scripts are given."""
        return f"# scripts of the published HASS code: --base-model-path {verifier} --ea-model-path {draft}"


class VLLMLayout(SafeAILabLayout):
    """What vLLM reads as ``method: eagle``: no bias, and no embeddings, which are the verifier's."""

    def recognises(self, stored: StoredDraft) -> bool:
        """Never: what vLLM reads looks like SafeAILab's."""
        return False

    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return tensors and configuration.

        Raises:
            UsageError: The draft has layernorms, a bias that does something, or a layer that vLLM does not draft with.
        """
        stored = super().write(model)
        _leave_out_embeddings(stored.tensors, model)
        architecture = stored.config["architectures"][0]
        if architecture not in VLLM_ARCHITECTURES:
            raise UsageError(
                f"vLLM has no such draft for {architecture}; it has for: {', '.join(VLLM_ARCHITECTURES)}. Train with "
                "model.draft.transformer_layer_architecture LlamaDecoderLayer"
            )
        return stored

    def settle_bias(self, tensors: dict[str, Tensor]) -> None:
        """Leave out zeros, which do nothing.

        Raises:
            UsageError: The bias does something: nothing else in the network could take it over.
        """
        bias = tensors.pop(BIAS, None)
        if bias is not None and bool(bias.any()):
            raise UsageError(
                "this draft has a fusion bias, which vLLM would leave out without a word, and the draft would be "
                "wrong; train it with model.draft.fusion_bias false, or serve it with SGLang (--format sglang)"
            )

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield what vLLM would leave out or refuse."""
        if BIAS in stored.tensors:
            yield f"the file holds {BIAS}, which vLLM leaves out without a word"
        yield from super().faults(stored, verifier)
        if (architectures := stored.config.get("architectures")) not in [[one] for one in VLLM_ARCHITECTURES]:
            yield f"architectures is {architectures}; vLLM has drafts of this kind for {', '.join(VLLM_ARCHITECTURES)}"

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return the command; the method is always said, since vLLM guesses it from the path otherwise."""
        speculative = json.dumps({"model": draft, "method": "eagle", "num_speculative_tokens": tokens})
        return f"vllm serve {verifier} --speculative-config '{speculative}'"


class SGLangLayout(SafeAILabLayout):
    """What SGLang reads as ``LlamaForCausalLMEagle``: always a bias, and no embeddings, which are the verifier's."""

    def recognises(self, stored: StoredDraft) -> bool:
        """Tell by the architecture."""
        return _has_raw_names(stored) and stored.config.get("architectures") == [SGLANG_ARCHITECTURE]

    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return tensors and configuration.

        Raises:
            UsageError: The draft has layernorms, or a layer that is not Llama's.
        """
        stored = super().write(model)
        _leave_out_embeddings(stored.tensors, model)
        if stored.config["architectures"] != ["LlamaForCausalLM"]:
            raise UsageError(
                f"SGLang has such a draft for Llama layers alone, and this one is {stored.config['model_type']}; train "
                "with model.draft.transformer_layer_architecture LlamaDecoderLayer"
            )
        return StoredDraft(stored.config | {"architectures": [SGLANG_ARCHITECTURE]}, stored.tensors)

    def settle_bias(self, tensors: dict[str, Tensor]) -> None:
        """Add zeros: SGLang would leave a missing bias at random."""
        tensors.setdefault(BIAS, torch.zeros_like(tensors[FUSION][:, 0]))

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield what SGLang would leave at random, or run as something else."""
        if BIAS not in stored.tensors:
            yield f"the file holds no {BIAS}: SGLang always has one, and leaves it at random"
        yield from super().faults(stored, verifier)
        if (architectures := stored.config.get("architectures")) != [SGLANG_ARCHITECTURE]:
            yield f"architectures is {architectures}; SGLang runs such a draft as {SGLANG_ARCHITECTURE} alone"

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
    """Return the configuration of a decoder with one layer, as a causal language model of the family stores it."""
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


def _leave_out_embeddings(tensors: dict[str, Tensor], model: SpeculatorModel) -> None:
    """Leave out embeddings for a reader that takes the verifier's; refuse others than those."""
    embeddings = tensors.pop(EMBEDDINGS, None)
    if embeddings is not None:
        own = model.verifier_parts.embed_tokens.weight
        _check_embeddings(embeddings, own, "the token embeddings that came with the draft are not the verifier's")


def _check_embeddings(embeddings: Tensor, own: Tensor, otherwise: str) -> None:
    """Refuse a head that was made for other embeddings than its verifier's."""
    # Both may have been rounded, to different types.
    same = own.shape == embeddings.shape and torch.allclose(embeddings.float(), own.float(), rtol=1e-2, atol=1e-6)
    if not same:
        raise UsageError(f"{otherwise}; the draft belongs to another verifier")
