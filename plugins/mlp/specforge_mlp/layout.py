"""The ``mlp_speculator`` layout, in which IBM's released speculators for Llama and Granite are stored.

Names begin with ``speculator.``; everything else is as in ``MLPSpeculator``. No current serving engine runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge.config import CONFIG_NAME, VerifierConfig, find_file, read_json
from specforge.errors import UsageError
from specforge.models.storage import read_weights, write_checkpoint
from specforge.verifier.parts import WEIGHTS
from specforge_mlp.config import MLPSpeculatorConfig
from specforge_mlp.model import MLPSpeculator, proposals_of

MODEL_TYPE = "mlp_speculator"
PREFIX = "speculator."
# Our names of the fields, and the deployed ones.
FIELDS = {
    "hidden_size": "emb_dim",
    "intermediate_size": "inner_dim",
    "num_layers": "n_predict",
    "inputs_hidden_states_normalized": "scale_input",
    "vocab_size": "vocab_size",
    "tie_weights": "tie_weights",
    "top_k_tokens_per_head": "top_k_tokens_per_head",
    "n_candidates": "n_candidates",
}
# What the deployed layout takes for granted where a field is missing.
DEPLOYED_DEFAULTS = {
    "vocab_size": 32000,
    "emb_dim": 4096,
    "inner_dim": 0,
    "n_predict": 3,
    "n_candidates": 5,
    "tie_weights": False,
    "scale_input": False,
}


def from_deployed(values: dict[str, Any], where: str = "config") -> MLPSpeculatorConfig:
    """Turn a deployed configuration into ours; fields that neither knows are kept.

    Args:
        values: The parsed ``config.json``.
        where: What to name in error messages.

    Raises:
        UsageError: It is of another model type, or a field is wrong.
    """
    for name, deployed in FIELDS.items():
        if name in values and values[name] != values.get(deployed, values[name]):
            raise UsageError(
                f"{where}: {name} is {values[name]} and {deployed} {values[deployed]}, but both are one field; keep one"
            )
    values = {**DEPLOYED_DEFAULTS, **values}
    if values.pop("model_type", MODEL_TYPE) != MODEL_TYPE:
        raise UsageError(f"{where}: model_type is not {MODEL_TYPE!r}; this is no checkpoint of that layout")
    values.pop("architectures", None)
    if "hidden_size" in values:
        values["emb_dim"] = values.pop("hidden_size")
    ours = {deployed: name for name, deployed in FIELDS.items()}
    return MLPSpeculatorConfig.from_dict({ours.get(name, name): value for name, value in values.items()}, where)


def to_deployed(config: MLPSpeculatorConfig) -> dict[str, Any]:
    """Turn our configuration into a deployed one."""
    return {
        **(config.model_extra or {}),
        **{deployed: getattr(config, name) for name, deployed in FIELDS.items()},
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": MODEL_TYPE,
        "dtype": config.dtype,
    }


def read(folder: Path, verifier: str | None) -> MLPSpeculator:
    """Read a published speculator.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.
        verifier: Folder or hub id of its verifier, stored in the draft's configuration; None when not known.

    Returns:
        The draft, detached.

    Raises:
        UsageError: A file is missing or damaged, a tensor is missing, unknown or of the wrong shape, or tensors that
            should be shared differ.
    """
    path = find_file(folder, CONFIG_NAME)
    config = from_deployed(read_json(path), str(path))
    known = VerifierConfig.from_pretrained(verifier) if verifier else VerifierConfig()
    config.speculators_config = proposals_of(config, known)
    weights = read_weights(find_file(folder, WEIGHTS))
    if unknown := sorted(name for name in weights if not name.startswith(PREFIX)):
        raise UsageError(f"{folder} does not fit MLPSpeculator: unknown: {', '.join(unknown[:8])}")
    state = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    if config.tie_weights:
        state = _without_copies(state, config.num_layers, str(folder))
    return MLPSpeculator.from_state(config, state, where=str(folder))


def write(model: MLPSpeculator, folder: Path) -> None:
    """Write a draft under the published names; shared tensors once, as released.

    Args:
        model: The draft.
        folder: Is created if need be.

    Raises:
        SpecforgeError: It cannot be written; an earlier checkpoint in the folder is left as it was.
    """
    config = model.config.model_copy(update={"dtype": str(model.proj[0].weight.dtype).removeprefix("torch.")})
    write_checkpoint(
        folder, to_deployed(config), {PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    )


def _without_copies(state: dict[str, Tensor], heads: int, where: str) -> dict[str, Tensor]:
    """Leave out the copies of shared tensors, which some writers store for every head."""
    kept = {}
    for name, tensor in state.items():
        kind, number, rest = (*name.split("."), "", "")[:3]
        shared = "1" if kind == "proj" else "0"
        original = state.get(f"{kind}.{shared}.{rest}")
        if original is None or not number.isdigit() or not int(shared) < int(number) < heads:
            kept[name] = tensor
        elif not torch.equal(tensor, original):
            raise UsageError(f"{where}: config.json says tie_weights, but {name} differs from {kind}.{shared}.{rest}")
    return kept
