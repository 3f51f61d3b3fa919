"""Tiny random verifiers of several families, on disk and in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

VOCABULARY = 61
LAYERS = 8
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class TinyVerifier:
    """A random verifier: its folder, and the model before it was saved."""

    folder: Path
    model: PreTrainedModel


def random_verifier(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Make a model whose layers matter and whose norm weights are far from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.tie_weights()
    return model.eval()


def save_tiny_verifiers(root: Path) -> dict[str, TinyVerifier]:
    """Save llama, llama-sharded (both untied), llama-tied, qwen3, gemma2, gemma3 and gemma3-images into a folder."""
    windows = {"sliding_window": 4, "query_pre_attn_scalar": 8}
    configs: dict[str, PreTrainedConfig] = {
        "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
        "llama-sharded": LlamaConfig(**SHAPE, tie_word_embeddings=False),
        "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
        "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=False),
        "gemma2": Gemma2Config(**SHAPE, **windows, final_logit_softcapping=3.0),
        "gemma3": Gemma3TextConfig(**SHAPE, **windows),
        "gemma3-images": Gemma3Config(text_config={**SHAPE, **windows}, vision_config=VISION, mm_tokens_per_image=4),
    }
    made = {}
    for seed, (name, config) in enumerate(configs.items()):
        model = random_verifier(config, seed)
        shards = {"max_shard_size": "6KB"} if name == "llama-sharded" else {}
        model.save_pretrained(root / name, **shards)
        made[name] = TinyVerifier(root / name, model)
    return made
