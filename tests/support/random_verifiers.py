"""Random verifiers of several families in float64, and random rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from specforge.models.drafter import Drafter
from specforge.verifier.features import Features

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
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=5),
    "gemma2": lambda: Gemma2Config(**SHAPE, **SLIDING, query_pre_attn_scalar=8, final_logit_softcapping=3.0),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, **SLIDING, query_pre_attn_scalar=8),
}


def fill(model: torch.nn.Module, seed: int) -> None:
    """Fill a model with weights large enough to matter, including norms and biases."""
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


def random_rows(batch: int, length: int, seed: int = 2, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Return tokens [B, T] and states [B, T, H]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    return tokens, torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


def last_only(last: Tensor) -> Features:
    """Return features that hold only the last state."""
    return Features(last.new_empty(*last.shape[:2], 0, last.shape[2]), last)


def commit(drafter: Drafter, tokens: Tensor, last: Tensor, done: list[int], counts: Sequence[int]) -> None:
    """Commit ``counts`` tokens of each sequence; shorter ones are padded with arbitrary values."""
    longest = max(counts)
    following = torch.full((len(counts), longest), VOCABULARY - 1)
    states = torch.full((len(counts), longest, last.shape[-1]), 7.0, dtype=last.dtype)
    for row, count in enumerate(counts):
        following[row, :count] = tokens[row, done[row] + 1 : done[row] + 1 + count]
        states[row, :count] = last[row, done[row] : done[row] + count]
        done[row] += count
    drafter.commit(following, last_only(states), torch.tensor(counts))
