"""Block drafts under a plain Qwen3 configuration: z-lab's and DeepSpec's loaders, SGLang and llama.cpp read it.

Their layer ids count the *outputs* of decoder layers from 0, one less than ours; whether the anchor predicts follows
from the architecture; and every layer attends to its whole block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from specforge.checkpoints.layout import Layout, StoredDraft
from specforge.checkpoints.plain import NOT_OF_THE_LAYERS, position_faults, width_faults, with_old_rope
from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.config import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from specforge.errors import UsageError
from specforge.models.layer_config import stored_layers
from specforge.models.speculator import SpeculatorModel, network_of
from specforge.proposals import GreedyTokenProposalConfig
from specforge_dflash.config import DFlashSpeculatorConfig
from specforge_dflash.model import DFlashDraftModel
from specforge_dflash.rules import SLIDING, kinds_of, layer_id_faults, mask_token_faults

NESTED = "dflash_config"
LAYER_IDS = "target_layer_ids"
ARCHITECTURES = {"dflash": "DFlashDraftModel", "dflash2": "DFlash2DraftModel", "dspark": "Qwen3DSparkModel"}
# What readers call the networks besides.
OTHER_NAMES = {"DSparkDraftModel": "dspark"}
# Settings of the networks, by the names that both layouts have.
NETWORK = {
    "dflash": ("block_size", "mask_token_id"),
    "dflash2": (
        *("block_size", "mask_token_id", "conv_kernel_size", "conv_group_size"),
        *("selector_rank", "selector_top_k"),
    ),
    "dspark": (
        *("block_size", "mask_token_id", "markov_rank", "markov_head_type"),
        *("enable_confidence_head", "confidence_head_with_markov"),
    ),
}


class PlainBlockLayout(Layout):
    """A Qwen3 configuration with the draft's settings at the top and, again, in ``dflash_config``."""

    def recognises(self, stored: StoredDraft) -> bool:
        """Tell by the architecture, where the file is not in the speculators layout."""
        names = stored.config.get("architectures") or [""]
        known = {architecture: name for name, architecture in ARCHITECTURES.items()} | OTHER_NAMES
        return "speculators_model_type" not in stored.config and known.get(names[0]) == self.format.algorithm

    def read(self, stored: StoredDraft, verifier: VerifierConfig) -> SpeculatorModel:
        """Build the draft."""
        config, algorithm = stored.config, self.format.algorithm
        settings = _settings(config)
        own = (*NETWORK[algorithm], LAYER_IDS, NESTED, "num_target_layers", "num_anchors", "is_causal")
        layers = {name: one for name, one in config.items() if name not in (*NOT_OF_THE_LAYERS, *own)}
        ids = settings.get(LAYER_IDS)
        values = {
            "speculators_model_type": algorithm,
            "transformer_layer_config": layers,
            "draft_vocab_size": config.get("vocab_size"),
            "aux_hidden_state_layer_ids": None if ids is None else [one + 1 for one in ids],
            "sample_from_anchor": algorithm == "dspark",
            "sliding_window_non_causal": True,
            **{name: settings[name] for name in NETWORK[algorithm] if name in settings},
        }
        built = cast(DFlashSpeculatorConfig, SpeculatorModelConfig.from_dict(values, stored.config_where))
        built.speculators_config = SpeculatorsConfig(
            algorithm=algorithm,
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=built.num_drafted)],
            default_proposal_method="greedy",
            verifier=verifier,
        )
        return network_of(built).from_state(built, stored.tensors, stored.where)

    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return tensors and configuration.

        Raises:
            UsageError: A reader would refuse the draft, or run it wrong; the reason is given.
        """
        draft, algorithm = cast(DFlashDraftModel, model), self.format.algorithm
        config = draft.config
        layers = stored_layers(config.transformer_layer_config)
        if draft.draft_ids is not None:
            raise UsageError("readers of the plain layout have no draft vocabulary; --format vllm holds this draft")
        if SLIDING in kinds_of(layers):
            raise UsageError("readers of the plain layout disagree on sliding layers; use --format vllm")
        if config.sample_from_anchor != (algorithm == "dspark"):
            raise UsageError(
                f"sample_from_anchor is {str(config.sample_from_anchor).lower()}, the other way round than readers of "
                f"the plain layout take for granted of {algorithm}; --format speculators holds this draft"
            )
        if config.target_hidden_size not in (None, config.transformer_layer_config.hidden_size):
            raise UsageError("readers of the plain layout take the verifier to be as wide as the draft")
        settings: dict[str, Any] = {name: getattr(config, name) for name in NETWORK[algorithm]}
        settings[LAYER_IDS] = [one - 1 for one in draft.aux_layers]
        values = with_old_rope(layers) | settings
        values |= {
            "architectures": [ARCHITECTURES[algorithm]],
            "dtype": str(draft.dtype).removeprefix("torch."),
            "tie_word_embeddings": False,
            "num_target_layers": draft.verifier_parts.config.num_hidden_layers,
            "is_causal": False,
            NESTED: {**settings, "causal": False},
        }
        return StoredDraft(values, draft.state_dict())

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield what a reader would refuse, or run otherwise."""
        config = stored.config
        expected = ARCHITECTURES[self.format.algorithm]
        if config.get("architectures") != [expected]:
            yield f"architectures is {config.get('architectures')!r}, not [{expected!r}], by which readers choose"
        if config.get("model_type") != "qwen3":
            yield f"model_type is {config.get('model_type')!r}; readers have block drafts with qwen3 layers"
        nested = config.get(NESTED) or {}
        for name in (*NETWORK[self.format.algorithm], LAYER_IDS):
            if name not in nested or name not in config:
                yield f"{name} must be both at the top and in {NESTED}: readers look in one or the other"
            elif nested[name] != config[name]:
                yield f"{name} is {config[name]} at the top and {nested[name]} in {NESTED}"
        if config.get("is_causal") is not False or nested.get("causal") is not False:
            yield f"is_causal and {NESTED}.causal must be false: llama.cpp takes one of them for all layers"
        if SLIDING in kinds_of(config):
            yield "layer_types has sliding layers, on which readers disagree"
        settings = _settings(config)
        ids = settings.get(LAYER_IDS)
        yield from layer_id_faults([one + 1 for one in ids] if isinstance(ids, list) else None, verifier)
        if isinstance(ids, list) and ids and ids[0] < 0 and self.format.algorithm != "dspark":
            yield f"{LAYER_IDS} has {ids[0]}, the embeddings, which only readers of DSpark know"
        yield from mask_token_faults(settings.get("mask_token_id"), config.get("vocab_size"))
        if verifier is not None and config.get("num_target_layers") != verifier.num_hidden_layers:
            yield (
                f"num_target_layers is {config.get('num_target_layers')}, but the verifier has "
                f"{verifier.num_hidden_layers} layers"
            )
        yield from position_faults(config, verifier)
        yield from width_faults(config.get("hidden_size"), verifier)

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return the command of SGLang."""
        name = {"dspark": "DSPARK"}.get(self.format.algorithm, "DFLASH")
        return (
            f"python -m sglang.launch_server --model-path {verifier} --speculative-algorithm {name} "
            f"--speculative-draft-model-path {draft} --speculative-num-draft-tokens {tokens}"
        )


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the draft's settings, from wherever a writer has put them."""
    nested = config.get(NESTED)
    return {**config, **(nested if isinstance(nested, dict) else {})}
