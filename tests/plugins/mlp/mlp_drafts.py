"""Random verifiers in float64, MLP speculators for them, and what those compute by the equations, number by number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from specforge.verifier.features import Features
from specforge_mlp.config import MLPSpeculatorConfig
from specforge_mlp.model import MLPSpeculator

VOCABULARY = 31
WIDTH = 16
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**SHAPE, **SLIDING, query_pre_attn_scalar=8, final_logit_softcapping=3.0),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "tied": {"tie_weights": True, "scale_input": False},
    "untied": {"tie_weights": False, "scale_input": False},
    "tied, scaled, narrow": {"tie_weights": True, "scale_input": True, "intermediate_size": 12},
    "untied, scaled, wide": {"tie_weights": False, "scale_input": True, "intermediate_size": 20},
}


def fill(model: torch.nn.Module, seed: int) -> None:
    """Give a model weights that are large enough to matter; norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if parameter.ndim == 1 and not name.endswith("bias") else 0.0
            parameter.copy_(centre + 0.3 * noise)


def random_verifier(family: str, seed: int = 0) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    fill(model, seed)
    model.tie_weights()
    return model.double().eval().requires_grad_(False)


def random_draft(verifier: PreTrainedModel, seed: int = 1, num_layers: int = 4, **options: Any) -> MLPSpeculator:
    """Make a draft that knows nothing, attached to its verifier."""
    draft = MLPSpeculator.from_training_args(verifier.config, num_layers=num_layers, **options)
    fill(draft, seed)
    draft.attach_verifier(verifier)
    return draft.double()


def random_rows(batch: int, length: int, seed: int = 2, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and states [B, T, H]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    return tokens, torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


def last_only(last: Tensor) -> Features:
    """Features of a verifier of which only the last state is looked at."""
    return Features(last.new_empty(*last.shape[:2], 0, last.shape[2]), last)


def slow_heads(
    weights: Mapping[str, Tensor], config: MLPSpeculatorConfig, state: Tensor, tokens: Sequence[int]
) -> list[Tensor]:
    """Logits [V] of the first heads at one position, which has a state [H] and the tokens that follow it.

    By the published equations, with the tensors of a checkpoint; where weights are tied, those that are stored once.
    """

    def of(kind: str, head: int, rest: str = "weight") -> Tensor:
        if config.tie_weights:
            head = min(head, 1) if kind == "proj" else 0
        return weights[f"{kind}.{head}.{rest}"]

    def mean_square(vector: Tensor) -> float:
        return sum(float(one) ** 2 for one in vector) / len(vector) + 1e-6

    inner = config.intermediate_size or config.hidden_size
    state_weight = 0.5 ** (0.5 / config.num_layers)
    embedding_weight = math.sqrt((1 - state_weight**2) * inner / 2)
    if config.inputs_hidden_states_normalized:
        state = state / math.sqrt(mean_square(state)) / math.sqrt(2)
    logits = []
    for head, token in enumerate(tokens):
        state = of("proj", head) @ state + embedding_weight / state_weight * of("emb", head)[token]
        state = state / math.sqrt(mean_square(state)) * of("ln", head) + of("ln", head, "bias")
        activated = [0.5 * one * (1 + math.erf(one / math.sqrt(2))) for one in state.tolist()]
        state = torch.tensor(activated, dtype=state.dtype)
        logits.append(of("head", head) @ state)
    return logits
