"""The layout of the published EAGLE-1 heads: ``fc.*`` and ``layers.0.*`` names and a plain decoder configuration.

SafeAILab's EAGLE and SGLang write and read it; vLLM reads it too, as ``method: eagle``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge.config import CONFIG_NAME, SpeculatorsConfig, VerifierConfig, find_file, read_json
from specforge.errors import UsageError
from specforge.models.storage import read_weights, write_checkpoint
from specforge.proposals import GreedyTokenProposalConfig
from specforge.verifier.parts import WEIGHTS, VerifierParts
from specforge_eagle.config import EagleSpeculatorConfig
from specforge_eagle.model import EagleSpeculator

# Beginnings of names: ours, and the published ones.
NAMES = {"fusion_fc.": "fc.", "transformer.": "layers.0."}
EMBEDDINGS = "embed_tokens.weight"


def read(folder: Path, verifier: str | None) -> EagleSpeculator:
    """Read a published head.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.
        verifier: Folder or hub id of its verifier, stored in the draft's configuration; None when not known.

    Returns:
        The draft, detached. Token embeddings that the file may hold are the verifier's; they are kept aside, to be
        written back.

    Raises:
        UsageError: A file is missing or damaged, a tensor is missing, unknown or of the wrong shape, or the
            embeddings are not the verifier's.
    """
    path = find_file(folder, CONFIG_NAME)
    values = read_json(path)
    weights = read_weights(find_file(folder, WEIGHTS))
    embeddings = weights.pop(EMBEDDINGS, None)
    config = EagleSpeculatorConfig.from_dict(
        {
            # "bias" is no field of a decoder's, and is missing from heads that have none: the tensors tell.
            "transformer_layer_config": {name: value for name, value in values.items() if name != "bias"},
            "fusion_bias": "fc.bias" in weights,
            "speculators_config": SpeculatorsConfig(
                algorithm="eagle",
                proposal_methods=[GreedyTokenProposalConfig()],
                default_proposal_method="greedy",
                verifier=VerifierConfig.from_pretrained(verifier) if verifier else VerifierConfig(),
            ),
        },
        where=str(path),
    )
    published = {theirs: ours for ours, theirs in NAMES.items()}
    state = {_renamed(name, published): tensor for name, tensor in weights.items()}
    model = EagleSpeculator.from_state(config, state, where=str(folder))
    if embeddings is not None and verifier:
        _check_embeddings(embeddings, verifier, folder)
    model.stored_embeddings = embeddings
    return model


def write(model: EagleSpeculator, folder: Path) -> None:
    """Write a draft under the published names.

    Args:
        model: A draft without layernorms and without a bias that does anything.
        folder: Is created if need be.

    Raises:
        UsageError: The draft has what a reader of the layout would leave out without a word.
    """
    config = model.config
    if config.layernorms:
        raise UsageError("the eagle layout has no names for the norms of a draft with layernorms")
    bias = model.fusion_fc.bias
    if bias is not None and bool(bias.any()):
        raise UsageError(
            "this draft has a fusion bias, which vLLM would leave out without a word, and the draft would be wrong; "
            "train it with fusion_bias false"
        )
    state = {_renamed(name, NAMES): tensor for name, tensor in model.state_dict().items()}
    if model.stored_embeddings is not None:
        state[EMBEDDINGS] = model.stored_embeddings.to(model.fusion_fc.weight.dtype)
    write_checkpoint(folder, _plain_config(model), state)


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
        # Without it, SafeAILab's reader expects a bias.
        "bias": config.fusion_bias,
        "dtype": str(model.fusion_fc.weight.dtype).removeprefix("torch."),
    }
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:1]
    rope = values.get("rope_parameters") or {}
    if "rope_theta" in rope:
        # Readers with transformers before version 5 look for the rotary base here.
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        values["rope_theta"] = rope["rope_theta"]
        values["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
    return values


def _check_embeddings(embeddings: Tensor, verifier: str, folder: Path) -> None:
    """Refuse a head that was made for other embeddings than its verifier's."""
    own = VerifierParts.from_pretrained(verifier).embed_tokens.weight
    # Both may have been rounded, to different types.
    same = own.shape == embeddings.shape and torch.allclose(embeddings.float(), own.float(), rtol=1e-2, atol=1e-6)
    if not same:
        raise UsageError(
            f"{folder}: its token embeddings are not those of {verifier}; the draft belongs to another verifier"
        )
