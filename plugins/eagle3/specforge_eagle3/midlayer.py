"""The layout of the published EAGLE-3 heads: ``midlayer.*`` names and a plain decoder configuration.

SafeAILab's EAGLE and SGLang write and read it; vLLM reads it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specforge.config import CONFIG_NAME, SpeculatorsConfig, VerifierConfig, find_file, read_json
from specforge.errors import UsageError
from specforge.models.storage import read_weights, write_checkpoint
from specforge.proposals import GreedyTokenProposalConfig
from specforge.verifier.parts import WEIGHTS
from specforge_eagle3.config import Eagle3SpeculatorConfig
from specforge_eagle3.model import Eagle3DraftModel

OURS, PUBLISHED = "layers.0.", "midlayer."
ARCHITECTURE = "LlamaForCausalLMEagle3"
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "target_hidden_size")
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


def read(folder: Path, verifier: str | None) -> Eagle3DraftModel:
    """Read a published head.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.
        verifier: Folder or hub id of its verifier, stored in the draft's configuration; None when not known.

    Returns:
        The draft, detached.

    Raises:
        UsageError: A file is missing or damaged, or a tensor is missing, unknown or of the wrong shape.
    """
    path = find_file(folder, CONFIG_NAME)
    values = read_json(path)
    if LAYER_IDS in values.get("eagle_config", {}):
        raise UsageError(
            f"{path}: engines disagree on what layer ids inside eagle_config mean; move them to a top-level "
            f"{LAYER_IDS!r} that counts the layers before which features are taken"
        )
    config = Eagle3SpeculatorConfig.from_dict(
        {
            "transformer_layer_config": _layer_config(values),
            "draft_vocab_size": values.get("draft_vocab_size", values.get("vocab_size")),
            **{flag: values[flag] for flag in (*FLAGS, LAYER_IDS) if flag in values},
            "speculators_config": SpeculatorsConfig(
                algorithm="eagle3",
                proposal_methods=[GreedyTokenProposalConfig()],
                default_proposal_method="greedy",
                verifier=VerifierConfig.from_pretrained(verifier) if verifier else VerifierConfig(),
            ),
        },
        where=str(path),
    )
    weights = read_weights(find_file(folder, WEIGHTS))
    state = {
        OURS + name.removeprefix(PUBLISHED) if name.startswith(PUBLISHED) else name: weights[name] for name in weights
    }
    return Eagle3DraftModel.from_state(config, state, where=str(folder))


def write(model: Eagle3DraftModel, folder: Path) -> None:
    """Write a draft under the published names.

    Args:
        model: A draft of one layer.
        folder: Is created if need be.

    Raises:
        UsageError: The draft has more than one layer, for which the layout has no names.
    """
    config = model.config
    if len(model.layers) != 1:
        raise UsageError(f"the midlayer layout holds one decoder layer; this draft has {len(model.layers)}")
    values = config.serialize_transformer_config(config.transformer_layer_config)
    values |= {"architectures": [ARCHITECTURE], "draft_vocab_size": config.draft_vocab_size}
    values |= {flag: getattr(config, flag) for flag in FLAGS if getattr(config, flag)}
    if config.eagle_aux_hidden_state_layer_ids is not None:
        values[LAYER_IDS] = config.eagle_aux_hidden_state_layer_ids
    state = model.state_dict()
    renamed = {PUBLISHED + name.removeprefix(OURS) if name.startswith(OURS) else name: state[name] for name in state}
    write_checkpoint(folder, values, renamed)


def _layer_config(values: dict[str, Any]) -> dict[str, Any]:
    """Keep what describes the decoder layer; a rotary base from before transformers 5 is moved to its new place."""
    layers = {name: value for name, value in values.items() if name not in (*FLAGS, LAYER_IDS, "draft_vocab_size")}
    if "rope_parameters" not in layers:
        scaling = layers.pop("rope_scaling", None) or {"rope_type": "default"}
        layers["rope_parameters"] = {**scaling, "rope_theta": layers.pop("rope_theta", 10000.0)}
    return layers
