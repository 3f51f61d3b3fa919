"""Random verifiers of several families in float64, and drafts for them whose layers matter."""

from __future__ import annotations

from collections.abc import Callable
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

from specforge.verifier.features import Features
from specforge_eagle.model import EagleSpeculator

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
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fusion bias": {"fusion_bias": True},
    "layernorms": {"layernorms": True},
    "both": {"layernorms": True, "fusion_bias": True},
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


def random_draft(verifier: PreTrainedModel, seed: int = 1, **options: Any) -> EagleSpeculator:
    """Make a draft that knows nothing, attached to its verifier."""
    draft = EagleSpeculator.from_training_args(verifier.config, **options)
    fill(draft, seed)
    draft.attach_verifier(verifier)
    return draft.double()


def random_rows(batch: int, length: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and features [B, T, H]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    return tokens, torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


def last_only(last: Tensor) -> Features:
    """Features of a verifier of which only the last state is looked at."""
    return Features(last.new_empty(*last.shape[:2], 0, last.shape[2]), last)
