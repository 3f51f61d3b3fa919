"""The layout of the published EAGLE-3 heads: ``midlayer.*`` names and a plain decoder's configuration.

SafeAILab's EAGLE and SGLang write and read it; vLLM also reads it. They disagree about which verifier layers a list of
ids means, and each supports only some of the network's options.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from specforge.checkpoints.layout import Layout, StoredDraft
from specforge.checkpoints.plain import NON_LAYER_FIELDS, position_faults, width_faults, with_legacy_rope
from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.config import SpeculatorsConfig, VerifierConfig
from specforge.errors import UsageError
from specforge.models.layer_config import stored_layers
from specforge.models.speculator import SpeculatorModel
from specforge.proposals import GreedyTokenProposalConfig
from specforge_eagle3.config import Eagle3SpeculatorConfig, default_aux_layers
from specforge_eagle3.model import NO_LATENT_ATTENTION, Eagle3DraftModel
from specforge_eagle3.rules import EMBEDDINGS, LAYER_IDS, layer_id_faults, tensor_faults

OURS, PUBLISHED = "layers.0.", "midlayer."
ARCHITECTURE = "LlamaForCausalLMEagle3"
OPTIONS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
SIZES = ("draft_vocab_size", "target_hidden_size", "num_aux_hidden_states")
NESTED = "eagle_config"


class MidlayerLayout(Layout):
    """The form that SafeAILab's EAGLE reads: the published network with the published choice of layers."""

    reader = "SafeAILab's EAGLE"

    def recognises(self, stored: StoredDraft) -> bool:
        """Recognise it by the names; SGLang's are the same, and ids may be in either sense."""
        names = stored.tensors
        published = any(name.startswith(PUBLISHED) for name in names) or "layers.0.hidden_norm.weight" in names
        return "speculators_model_type" not in stored.config and published

    def read(self, stored: StoredDraft, verifier: VerifierConfig) -> Eagle3DraftModel:
        """Build the draft; ``t2d``, which engines ignore and writers omit, is computed from ``d2t``."""
        if any(".kv_a_proj_with_mqa." in name for name in stored.tensors):
            raise UsageError(f"{stored.where}: {NO_LATENT_ATTENTION}")
        values = stored.config
        draft_size = values.get("draft_vocab_size", values.get("vocab_size"))
        unknown = {*NON_LAYER_FIELDS, *OPTIONS, *SIZES, LAYER_IDS, NESTED}
        config = Eagle3SpeculatorConfig.from_dict(
            {
                "transformer_layer_config": {name: value for name, value in values.items() if name not in unknown},
                "draft_vocab_size": draft_size,
                "target_hidden_size": values.get("target_hidden_size"),
                "eagle_aux_hidden_state_layer_ids": self.layers_before(values),
                **{option: values[option] for option in OPTIONS if option in values},
                "speculators_config": SpeculatorsConfig(
                    algorithm=Eagle3SpeculatorConfig.model_type_name,
                    proposal_methods=[GreedyTokenProposalConfig()],
                    default_proposal_method="greedy",
                    verifier=verifier,
                ),
            },
            where=stored.config_where,
        )
        state = {_renamed(name, PUBLISHED, OURS): tensor for name, tensor in stored.tensors.items()}
        return Eagle3DraftModel.from_state(config, _with_maps(state, config, stored.where), where=stored.where)

    def layers_before(self, values: dict[str, Any]) -> list[int] | None:
        """Return the layers whose inputs are the features, from a ``config.json``; None for the default.

        Raises:
            UsageError: The ids are ambiguous.
        """
        if LAYER_IDS in (values.get(NESTED) or {}):
            raise UsageError(
                f"engines disagree on what layer ids inside {NESTED} mean: SGLang counts the layers after which "
                f"features are taken (--format sglang); otherwise move them to a top-level {LAYER_IDS!r} that counts "
                "the layers before which they are"
            )
        return values.get(LAYER_IDS)

    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return tensors and configuration.

        Raises:
            UsageError: The reader would run a different network.
        """
        draft = cast(Eagle3DraftModel, model)
        config, layers = draft.config, draft.config.transformer_layer_config
        if len(draft.layers) != 1:
            raise UsageError(
                f"the midlayer layout holds one decoder layer, but this draft has {len(draft.layers)}; serve it with "
                "vLLM (--format vllm)"
            )
        if layers.model_type != "llama":
            raise UsageError(
                f"{self.reader} builds Llama layers, but this draft's are {layers.model_type}; serve it with vLLM "
                "(--format vllm), or train with model.draft.layer_type llama"
            )
        if options := [option for option in OPTIONS if getattr(config, option)]:
            raise UsageError(
                f"{self.reader} does not support {' or '.join(options)} and would ignore it; serve it with vLLM "
                "(--format vllm), or train with these options off"
            )
        values = with_legacy_rope(stored_layers(layers)) | {
            "architectures": [ARCHITECTURE],
            "draft_vocab_size": config.draft_vocab_size,
            "dtype": str(draft.dtype).removeprefix("torch."),
            "tie_word_embeddings": False,
            **dict.fromkeys(OPTIONS, False),
        }
        if config.target_hidden_size is not None:
            values["target_hidden_size"] = config.target_hidden_size
        tensors = {_renamed(name, OURS, PUBLISHED): tensor for name, tensor in draft.state_dict().items()}
        return StoredDraft(values | self.layer_config(draft), tensors)

    def layer_config(self, draft: Eagle3DraftModel) -> dict[str, Any]:
        """Return the fields of ``config.json`` for the feature layers; here none.

        Raises:
            UsageError: The reader would use other layers.
        """
        chosen, default = draft.aux_layers, _default_layers(draft.verifier_parts.config.num_hidden_layers)
        if chosen != default:
            raise UsageError(
                f"{self.reader} always takes features before the layers {default}, but this draft's come from "
                f"{chosen}; serve it with vLLM (--format vllm)"
            )
        return {}

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield what the reader would ignore or run differently."""
        if not any(name.startswith(PUBLISHED) for name in stored.tensors):
            yield f"no tensor begins with {PUBLISHED}: {self.reader} would leave the decoder layer random"
        if on := [option for option in OPTIONS if stored.config.get(option)]:
            yield f"{self.reader} does not support {' or '.join(on)} and ignores it"
        if "norm_before_residual" not in stored.config:
            yield "norm_before_residual is not set; readers assume different defaults"
        if stored.config.get("architectures") != [ARCHITECTURE]:
            yield f"architectures is {stored.config.get('architectures')}, not [{ARCHITECTURE!r}]"
        yield from tensor_faults(stored.tensors, stored.config.get("draft_vocab_size"), stored.config.get("vocab_size"))
        yield from position_faults(stored.config, verifier)
        yield from width_faults(stored.config.get("target_hidden_size") or stored.config.get("hidden_size"), verifier)
        yield from self.layer_config_faults(stored, verifier)

    def layer_config_faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield layer ids of ``config.json`` that the reader would read differently."""
        if LAYER_IDS in stored.config or LAYER_IDS in (stored.config.get(NESTED) or {}):
            yield f"{LAYER_IDS} is set, but {self.reader} ignores it and uses the default layers"

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return Python code that uses SafeAILab's package."""
        return (
            "from eagle.model.ea_model import EaModel\n\n"
            f'model = EaModel.from_pretrained(base_model_path="{verifier}", ea_model_path="{draft}", use_eagle3=True)'
        )


class SGLangLayout(MidlayerLayout):
    """The form that SGLang reads: ids of the layers *after* which features are taken, each one less than here.

    Without ids SGLang uses the published layers. It adds 1 to ids: always before its pull request 25454, and since then
    only if the first one is 1.
    """

    reader = "SGLang"

    def recognises(self, stored: StoredDraft) -> bool:
        """Never: names are the same as SafeAILab's, and ids may be vLLM's; use ``--format sglang``."""
        return False

    def layers_before(self, values: dict[str, Any]) -> list[int] | None:
        """Return the ids in SGLang's sense; None if it uses the published layers."""
        ids = (values.get(NESTED) or {}).get(LAYER_IDS)
        if ids is None:
            return None
        return [layer + 1 for layer in ids] if ids[0] == 1 else list(ids)

    def prepare(self, model: SpeculatorModel) -> None:
        """Share embeddings that equal the verifier's, which SGLang always drafts with."""
        cast(Eagle3DraftModel, model).borrow_embeddings()

    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return tensors and configuration.

        Raises:
            UsageError: SGLang would run a different network.
        """
        stored = super().write(model)
        if EMBEDDINGS in stored.tensors:
            raise UsageError(
                "this draft has its own token embeddings, but SGLang drafts with the verifier's; serve it with vLLM "
                "(--format vllm), or train with model.draft.train_embeddings false"
            )
        return stored

    def layer_config(self, draft: Eagle3DraftModel) -> dict[str, Any]:
        """Return the ids in SGLang's sense; nothing for the published layers, on which all versions agree.

        Raises:
            UsageError: No ids can express these layers.
        """
        chosen = draft.aux_layers
        if chosen == _default_layers(draft.verifier_parts.config.num_hidden_layers):
            return {}
        if chosen[0] == 1:
            raise UsageError(
                f"SGLang cannot take features before the layers {chosen}: it reads a first id of 1 as 2. "
                "Serve the draft with vLLM (--format vllm), or train with model.draft.aux_layers that start elsewhere"
            )
        return {NESTED: {LAYER_IDS: [layer - 1 for layer in chosen] if chosen[0] == 2 else chosen}}

    def layer_config_faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield ids that SGLang ignores, or that it reads as layers that do not exist."""
        if LAYER_IDS in stored.config:
            yield f"{LAYER_IDS} is at the top level, where SGLang ignores it; it belongs in {NESTED}"
        ids = self.layers_before(stored.config)
        if ids is not None:
            yield from layer_id_faults(ids, verifier)
        if EMBEDDINGS in stored.tensors:
            yield f"the file holds {EMBEDDINGS}, but SGLang drafts with the verifier's embeddings"

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return the command for a chain."""
        return (
            f"python3 -m sglang.launch_server --model-path {verifier} --speculative-algorithm EAGLE3 "
            f"--speculative-draft-model-path {draft} --speculative-num-steps {tokens} --speculative-eagle-topk 1 "
            f"--speculative-num-draft-tokens {tokens + 1}"
        )


def _default_layers(number: int) -> list[int] | None:
    try:
        return default_aux_layers(number)
    except UsageError:  # a verifier too small for the published choice
        return None


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _with_maps(state: dict[str, Tensor], config: Eagle3SpeculatorConfig, where: str) -> dict[str, Tensor]:
    """Add ``t2d``, which readers do not need; drop maps of a vocabulary to itself."""
    d2t = state.get("d2t")
    if d2t is None or d2t.is_floating_point():
        return state
    if config.draft_vocab_size == config.target_vocab_size:
        if not bool(d2t.any()) and bool(state.get("t2d", torch.ones(1)).all()):
            del state["d2t"]
            state.pop("t2d", None)
    elif "t2d" not in state and d2t.shape == (config.draft_vocab_size,):
        if not bool(d2t.any()):
            raise UsageError(f"{where}: d2t is all zeros and t2d is missing: the draft's tokens are not known")
        ids = d2t.long() + torch.arange(d2t.numel())
        state["t2d"] = torch.zeros(config.target_vocab_size, dtype=torch.bool)
        state["t2d"][ids[(ids >= 0) & (ids < config.target_vocab_size)]] = True
    return state
