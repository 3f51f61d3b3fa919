"""Tiny random verifiers of every tested family, each written to disk in hundredths of a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel

VOCABULARY = 96
LAYERS = 8
# Sizes under the names of most families, then under those of GPT-2 and its successors.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OLD_SIZES = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 128}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MANY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    **ROUTED_EXPERTS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
LINEAR = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
HEADS = {"head_dim": 8}
WINDOW = {"sliding_window": 16}
GEMMA = {**HEADS, **WINDOW, "query_pre_attn_scalar": 8}
EVERY_OTHER = ["mamba", "attention"] * (LAYERS // 2)
SHARED_EXPERT = {"shared_expert_intermediate_size": 16}


@dataclass(frozen=True)
class Family:
    """How to make a tiny verifier.

    Attributes:
        config: Class name of its configuration.
        options: Options in addition to the usual sizes.
        sizes: The usual sizes.
        vision: Configuration of the vision part; the options then belong to the text part.
        model_type: Model type of the text part, if it is not the configuration's default.
        outer: Options of the complete configuration.
    """

    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=lambda: SIZES)
    vision: Mapping[str, Any] | None = None
    model_type: str | None = None
    outer: Mapping[str, Any] = field(default_factory=dict)


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    return {**HEADS, **_rope("default", mrope_section=list(sections), **more)}


def _vision(**options: Any) -> dict[str, Any]:
    return {"hidden_size": 16, "intermediate_size": 24, "image_size": 28, "patch_size": 14, **options}


_TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
_VIT = _vision(num_hidden_layers=1, num_attention_heads=2)

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", {**HEADS, "tie_word_embeddings": True}),
    "llama, biases": Family("LlamaConfig", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "llama, rope llama3": Family(
        "LlamaConfig",
        {
            **HEADS,
            **_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        },
    ),
    "llama, rope yarn": Family(
        "LlamaConfig", {**HEADS, **_rope("yarn", factor=8.0, original_max_position_embeddings=16)}
    ),
    "llama, rope linear": Family("LlamaConfig", {**HEADS, **_rope("linear", factor=2.0)}),
    "llama, rope dynamic": Family("LlamaConfig", {**HEADS, **_rope("dynamic", factor=2.0)}),
    "phi3, rope longrope": Family(
        "Phi3Config",
        {
            **_rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=64),
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": Family("Qwen2Config"),
    "qwen3": Family("Qwen3Config", {"head_dim": 16}),
    "qwen3_moe": Family("Qwen3MoeConfig", {**HEADS, **MANY_EXPERTS}),
    "qwen3_next": Family("Qwen3NextConfig", {**LINEAR, **MANY_EXPERTS, **SHARED_EXPERT}),
    "qwen3_5 text": Family("Qwen3_5TextConfig", LINEAR),
    "qwen3_5_moe text": Family("Qwen3_5MoeTextConfig", {**LINEAR, **MANY_EXPERTS, **SHARED_EXPERT}),
    "mistral": Family("MistralConfig", {**HEADS, **WINDOW}),
    "ministral3": Family("Ministral3Config", HEADS),
    "mixtral": Family("MixtralConfig", {"num_local_experts": 4}),
    "gemma2": Family("Gemma2Config", GEMMA),
    "gemma3 text": Family("Gemma3TextConfig", GEMMA),
    "gemma4 text": Family(
        "Gemma4TextConfig",
        {**HEADS, **WINDOW, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    ),
    "gpt_oss": Family("GptOssConfig", {**HEADS, **WINDOW, **EXPERTS}),
    "phi": Family("PhiConfig"),
    "phimoe": Family("PhimoeConfig", {"num_local_experts": 4}),
    "glm4": Family("Glm4Config", HEADS),
    "glm4_moe": Family("Glm4MoeConfig", {**HEADS, **ROUTED_EXPERTS}),
    "stablelm": Family("StableLmConfig"),
    "cohere": Family("CohereConfig"),
    "cohere2": Family("Cohere2Config", WINDOW),
    "olmo": Family("OlmoConfig"),
    "olmo2": Family("Olmo2Config"),
    "olmo3": Family("Olmo3Config", WINDOW),
    "granite": Family(
        "GraniteConfig", {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
    ),
    "granitemoe": Family("GraniteMoeConfig", {**EXPERTS, "logits_scaling": 8.0}),
    "granitemoehybrid": Family(
        "GraniteMoeHybridConfig",
        {**EXPERTS, **MAMBA, "mamba_expand": 2, "shared_intermediate_size": 16, "layers_block_type": EVERY_OTHER},
    ),
    "starcoder2": Family("Starcoder2Config"),
    "gpt_neox": Family("GPTNeoXConfig", sizes={name: SIZES[name] for name in SIZES if "key_value" not in name}),
    "gpt2": Family("GPT2Config", {"bos_token_id": None, "eos_token_id": 2}, sizes=OLD_SIZES),
    "gptj": Family("GPTJConfig", {"rotary_dim": 4, "bos_token_id": None, "eos_token_id": 2}, sizes=OLD_SIZES),
    "falcon": Family("FalconConfig", {"new_decoder_architecture": False}),
    "bloom": Family("BloomConfig", {"n_layer": LAYERS, "n_head": 4}),
    "opt": Family("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "deepseek_v2": Family("DeepseekV2Config", {**LATENT, "q_lora_rank": None}),
    "deepseek_v3": Family("DeepseekV3Config", {**LATENT, "n_shared_experts": 1, "v_head_dim": 12}),
    "llama4 text": Family(
        "Llama4TextConfig",
        {**HEADS, "intermediate_size_mlp": 48, "num_local_experts": 4, "attention_chunk_size": 16},
    ),
    "smollm3": Family("SmolLM3Config"),
    "exaone4": Family("Exaone4Config", {**WINDOW, "sliding_window_pattern": 4}),
    "nemotron": Family("NemotronConfig"),
    "nemotron_h": Family(
        "NemotronHConfig",
        {
            **HEADS,
            "hybrid_override_pattern": "M*-M*-M*",
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
        },
    ),
    "falcon_h1": Family("FalconH1Config", {**MAMBA, "mamba_n_heads": 4, "mamba_d_ssm": 32, "lm_head_multiplier": 0.5}),
    "hunyuan_v1_dense": Family("HunYuanDenseV1Config", HEADS),
    "ernie4_5": Family("Ernie4_5Config", HEADS),
    "lfm2": Family("Lfm2Config", {"full_attn_idxs": [1, 3, 5, 7]}),
    "minimax_m2": Family("MiniMaxM2Config", {**HEADS, **EXPERTS}),
    "apertus": Family("ApertusConfig"),
    "seed_oss": Family("SeedOssConfig", HEADS),
    "bamba": Family("BambaConfig", {**MAMBA, "attn_layer_indices": [1, 3, 5, 7]}),
    "jamba": Family(
        "JambaConfig",
        {
            "num_experts": 2,
            "use_mamba_kernels": False,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
        },
    ),
    "mamba2": Family(
        "Mamba2Config",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
        sizes={name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "eos_token_id")},
    ),
    "gemma3": Family("Gemma3Config", GEMMA, vision=_VIT, model_type="gemma3_text", outer={"mm_tokens_per_image": 4}),
    "gemma4": Family(
        "Gemma4Config",
        {**HEADS, **WINDOW, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
        vision={},
        model_type="gemma4_text",
    ),
    "qwen2_5_vl": Family("Qwen2_5_VLConfig", _mrope(2, 1, 1), vision={**_TOWER, "fullatt_block_indexes": [0]}),
    "qwen3_vl": Family("Qwen3VLConfig", _mrope(2, 1, 1), vision={**_TOWER, "deepstack_visual_indexes": [0]}),
    "qwen3_5": Family("Qwen3_5Config", LINEAR, vision=_TOWER),
    "llama4": Family(
        "Llama4Config",
        {**HEADS, "intermediate_size_mlp": 48, "num_local_experts": 4, "attention_chunk_size": 16},
        vision={
            **_VIT,
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    ),
    "mistral3": Family(
        "Mistral3Config", HEADS, vision={**_VIT, "model_type": "pixtral", "head_dim": 8}, model_type="mistral"
    ),
    "glm4v": Family("Glm4vConfig", _mrope(1, 1, 0, partial_rotary_factor=0.5), vision=_TOWER),
    "llava_next": Family(
        "LlavaNextConfig",
        HEADS,
        vision={**_VIT, "num_hidden_layers": 2, "model_type": "clip_vision_model"},
        model_type="llama",
    ),
}
"""Every tested family, by its model type and what is special about it."""


def make(name: str, folder: Path) -> PreTrainedModel:
    """Write a tiny random verifier.

    Args:
        name: Its name in ``FAMILIES``.
        folder: Folder to write.

    Returns:
        The model, in evaluation mode.
    """
    family = FAMILIES[name]
    options = {**family.sizes, **family.options}
    if family.vision is not None:
        if family.model_type is not None:
            options["model_type"] = family.model_type
        seen = {"vision_config": dict(family.vision) or None}
        options = {"text_config": options, **seen, **family.outer}
    config = getattr(transformers, family.config)(**options)
    torch.manual_seed(0)
    build = transformers.AutoModelForCausalLM if family.vision is None else transformers.AutoModelForImageTextToText
    model = build.from_config(config)
    # Weights large enough to matter, and norms far from their initial values.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    model.tie_weights()
    model.save_pretrained(folder)
    words = WordLevel({f"<{number}>": number for number in range(VOCABULARY)}, unk_token="<0>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
    return model.eval()
