"""The ``mlp_speculator`` layout, in which IBM's released speculators for Llama and Granite are stored.

Names begin with ``speculator.``; everything else is as in ``MLPSpeculator``. No current engine supports it natively;
vLLM runs it with ``specforge_mlp.vllm``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from specforge.checkpoints.layout import Layout, StoredDraft
from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.config import VerifierConfig
from specforge.errors import UsageError
from specforge.models.speculator import SpeculatorModel
from specforge_mlp.config import MLPSpeculatorConfig
from specforge_mlp.model import MLPSpeculator, proposals_of

MODEL_TYPE = "mlp_speculator"
ARCHITECTURE = "MLPSpeculatorPreTrainedModel"
PREFIX = "speculator."
# Our field names and the deployed ones.
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
# Defaults of the deployed layout for missing fields.
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
    """Convert a deployed configuration to ours; unknown fields are kept.

    Args:
        values: The parsed ``config.json``.
        where: Name of the source in error messages.

    Raises:
        UsageError: The model type is another one, or a field is invalid.
    """
    for name, deployed in FIELDS.items():
        if name in values and values[name] != values.get(deployed, values[name]):
            raise UsageError(
                f"{where}: {name} is {values[name]} and {deployed} {values[deployed]}, but both are one field; keep one"
            )
    values = {**DEPLOYED_DEFAULTS, **values}
    if values.pop("model_type", MODEL_TYPE) != MODEL_TYPE:
        raise UsageError(f"{where}: model_type is not {MODEL_TYPE!r}; this is not a checkpoint of that layout")
    values.pop("architectures", None)
    if "hidden_size" in values:
        values["emb_dim"] = values.pop("hidden_size")
    ours = {deployed: name for name, deployed in FIELDS.items()}
    return MLPSpeculatorConfig.from_dict({ours.get(name, name): value for name, value in values.items()}, where)


def to_deployed(config: MLPSpeculatorConfig) -> dict[str, Any]:
    """Convert our configuration to a deployed one."""
    return {
        **(config.model_extra or {}),
        **{deployed: getattr(config, name) for name, deployed in FIELDS.items()},
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "dtype": config.dtype,
        # If it is missing, transformers assumes true.
        "tie_word_embeddings": config.tie_word_embeddings,
    }


class MLPSpeculatorLayout(Layout):
    """The layout of fms, TGI and old releases of vLLM."""

    def recognises(self, stored: StoredDraft) -> bool:
        """Recognise it by the model type, or by the names if that is missing."""
        named = stored.config.get("model_type") == MODEL_TYPE or other_network(stored) is not None
        return named or ("model_type" not in stored.config and f"{PREFIX}emb.0.weight" in stored.tensors)

    def read(self, stored: StoredDraft, verifier: VerifierConfig) -> MLPSpeculator:
        """Build the draft; copies of shared tensors must be equal."""
        if other := other_network(stored):
            raise UsageError(
                f"{stored.where} holds {other}, which is not supported: it is not an MLPSpeculator network"
            )
        config = from_deployed(stored.config, stored.config_where)
        config.speculators_config = proposals_of(config, verifier)
        if unknown := sorted(name for name in stored.tensors if not name.startswith(PREFIX)):
            raise UsageError(f"{stored.where} does not match MLPSpeculator: unknown: {', '.join(unknown[:8])}")
        state = {name.removeprefix(PREFIX): tensor for name, tensor in stored.tensors.items()}
        if config.tie_weights:
            state = _without_copies(state, config.num_layers, stored.where)
        return MLPSpeculator.from_state(config, state, where=stored.where)

    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return tensors and configuration; shared tensors are stored once, as released."""
        draft = cast(MLPSpeculator, model)
        config = draft.config.model_copy(update={"dtype": str(draft.dtype).removeprefix("torch.")})
        return StoredDraft(to_deployed(config), {PREFIX + name: tensor for name, tensor in draft.state_dict().items()})

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield what readers would refuse or read differently."""
        config = stored.config
        if config.get("architectures") != [ARCHITECTURE]:
            yield f"architectures is {config.get('architectures')}, not [{ARCHITECTURE!r}]"
        for name in ("tie_weights", "scale_input", "inner_dim"):
            if name not in config:
                yield f"{name} is not set: readers assume {DEPLOYED_DEFAULTS[name]}"
        if verifier is not None:
            for name, own in (("vocab_size", verifier.vocab_size), ("emb_dim", verifier.hidden_size)):
                if config.get(name) != own:
                    yield f"{name} is {config.get(name)}, but the verifier's is {own}"

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return the command of vLLM with our proposer: its own support has been commented out since 0.10."""
        proposer = "specforge_mlp.vllm.MLPProposer"
        speculative = {"method": "custom_class", "model": proposer, "num_speculative_tokens": tokens}
        return (
            f"vllm serve {verifier} --speculative-config '{json.dumps(speculative)}' "
            f"--additional-config '{json.dumps({MODEL_TYPE: draft})}'"
        )


def other_network(stored: StoredDraft) -> str | None:
    """Name the network of a speculator that only shares the model type; None if it is not one.

    Arctic's have their own layers: an LSTM with four gates between the heads, or an MLP whose widths may differ between
    heads, given by a list in a string.
    """
    listed = stored.config.get("architectures")
    architectures = [str(one) for one in listed] if isinstance(listed, list) else []
    if "lstm" in str(stored.config.get("method")).lower() or any("LSTM" in one for one in architectures):
        return "an LSTM speculator (Arctic's)"
    if any("forget_emb." in name or "cell_ln." in name for name in stored.tensors):
        return "an LSTM speculator (Arctic's)"
    if any(one.startswith(("ArcticMLP", "MLPVariant")) for one in architectures):
        return "an MLP speculator of Arctic's"
    return None


def _without_copies(state: dict[str, Tensor], heads: int, where: str) -> dict[str, Tensor]:
    """Drop the copies of shared tensors, which some writers store for every head."""
    kept = {}
    for name, tensor in state.items():
        kind, number, rest = (*name.split("."), "", "")[:3]
        shared = "1" if kind == "proj" else "0"
        original = state.get(f"{kind}.{shared}.{rest}")
        if original is None or not number.isdigit() or not int(shared) < int(number) < heads:
            kept[name] = tensor
        elif not torch.equal(tensor, original):
            raise UsageError(
                f"{where}: tie_weights is set in config.json, but {name} differs from {kind}.{shared}.{rest}"
            )
    return kept
