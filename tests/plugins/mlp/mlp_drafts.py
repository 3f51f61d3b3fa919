"""MLP speculators for random verifiers, and their logits computed from the equations in plain Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from random_verifiers import fill
from torch import Tensor
from transformers import PreTrainedModel

from specforge_mlp.config import MLPSpeculatorConfig
from specforge_mlp.model import MLPSpeculator

FAMILIES = ("llama", "qwen3", "gemma2")
OPTIONS: dict[str, dict[str, Any]] = {
    "tied": {"tie_weights": True, "scale_input": False},
    "untied": {"tie_weights": False, "scale_input": False},
    "tied, scaled, narrow": {"tie_weights": True, "scale_input": True, "intermediate_size": 12},
    "untied, scaled, wide": {"tie_weights": False, "scale_input": True, "intermediate_size": 20},
}


def random_draft(verifier: PreTrainedModel, seed: int = 1, num_layers: int = 4, **options: Any) -> MLPSpeculator:
    """Make an untrained draft, attached to its verifier."""
    draft = MLPSpeculator.from_training_args(verifier.config, num_layers=num_layers, **options)
    fill(draft, seed)
    draft.attach_verifier(verifier)
    return draft.double()


def slow_heads(
    weights: Mapping[str, Tensor], config: MLPSpeculatorConfig, state: Tensor, tokens: Sequence[int]
) -> list[Tensor]:
    """Logits [V] of the first heads at one position, from its state [H] and the tokens that follow it.

    By the published equations, with the tensors of a checkpoint; tied weights are stored once.
    """

    def of(kind: str, head: int, rest: str = "weight") -> Tensor:
        if config.tie_weights:
            head = min(head, 1) if kind == "proj" else 0
        return weights[f"{kind}.{head}.{rest}"]

    def mean_square(vector: Tensor) -> float:
        return sum(float(value) ** 2 for value in vector) / len(vector) + 1e-6

    inner = config.intermediate_size or config.hidden_size
    state_weight = 0.5 ** (0.5 / config.num_layers)
    embedding_weight = math.sqrt((1 - state_weight**2) * inner / 2)
    if config.inputs_hidden_states_normalized:
        state = state / math.sqrt(mean_square(state)) / math.sqrt(2)
    logits = []
    for head, token in enumerate(tokens):
        state = of("proj", head) @ state + embedding_weight / state_weight * of("emb", head)[token]
        state = state / math.sqrt(mean_square(state)) * of("ln", head) + of("ln", head, "bias")
        activated = [0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in state.tolist()]
        state = torch.tensor(activated, dtype=state.dtype)
        logits.append(of("head", head) @ state)
    return logits
