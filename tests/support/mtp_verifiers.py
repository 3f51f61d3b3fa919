"""Tiny random verifiers with multi-token-prediction heads under the names of their families."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from specforge_mtp.config import MtpSpeculatorConfig
from specforge_mtp.model import MtpDraftModel
from specforge_mtp.native import NativeNames

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
}


@dataclass(frozen=True)
class TinyFamily:
    """A family's configuration class, and what its configuration has besides the sizes."""

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=lambda: {"num_nextn_predict_layers": 1})


QWEN = {"mtp_num_hidden_layers": 1}
FAMILIES = {
    "qwen3": TinyFamily("Qwen3Config", heads=QWEN),
    "qwen3_5": TinyFamily("Qwen3_5TextConfig", LINEAR, QWEN),
    "qwen3_5_moe": TinyFamily("Qwen3_5MoeTextConfig", {**LINEAR, **EXPERTS}, QWEN),
    "qwen3_next": TinyFamily("Qwen3NextConfig", {**LINEAR, **EXPERTS}, {}),
    "qwen3_two_heads": TinyFamily("Qwen3Config", heads={"mtp_num_hidden_layers": 2}),
    "deepseek_v3": TinyFamily("DeepseekV3Config", {**LATENT, **ROUTED}, {"num_nextn_predict_layers": 2}),
    "glm4_moe": TinyFamily("Glm4MoeConfig", {**ROUTED, "use_qk_norm": True}),
    "glm4_moe_lite": TinyFamily("Glm4MoeLiteConfig", {**LATENT, **ROUTED}),
    "mimo": TinyFamily("Qwen2Config"),
}


def write(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "40KB", vocab_size: int = VOCABULARY
) -> Path:
    """Write a verifier with heads, in shards, with a tokenizer of numbered words.

    Args:
        name: A key of ``FAMILIES``.
        folder: Folder to write.
        dtype: Dtype of all weights.
        shard: Largest size of a shard.
        vocab_size: Number of the verifier's ids.
    """
    family = FAMILIES[name]
    options = {key: one for key, one in SIZES.items() if key != "head_dim" or "head_dim" not in family.options}
    options["vocab_size"] = vocab_size
    config = getattr(transformers, family.config)(**{**options, **family.options, **family.heads})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    _randomise(model.named_parameters(), generator)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    stated = json.loads((folder / "config.json").read_text())
    if name == "mimo":
        stated |= as_remote_code(folder)
    (folder / "config.json").write_text(json.dumps({**stated, **family.heads}))
    add_heads(folder, generator, dtype)
    words = WordLevel({f"<{number}>": number for number in range(VOCABULARY)}, unk_token="<0>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
    return folder


def add_heads(folder: Path, generator: torch.Generator, dtype: torch.dtype) -> None:
    """Add random heads to a verifier's files, in a shard of their own and one tensor among others."""
    config = MtpSpeculatorConfig.of_verifier(json.loads((folder / "config.json").read_text()))
    draft = MtpDraftModel(config)
    _randomise(draft.named_parameters(), generator)
    native = NativeNames(config, ()).split(draft.state_dict())
    tensors = {name: one.to(dtype).contiguous() for name, one in native.items()}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    other = sorted(set(index["weight_map"].values()))[-1]
    apart = sorted(tensors)[0]
    save_file({**load_file(folder / other), apart: tensors[apart]}, folder / other, {"format": "pt"})
    index["weight_map"][apart] = other
    rest = {name: one for name, one in tensors.items() if name != apart}
    save_file(rest, folder / "model-of-the-head.safetensors", {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(rest, "model-of-the-head.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _randomise(parameters: Any, generator: torch.Generator) -> None:
    """Give every parameter values that tell mistakes apart: matrices by their width, norms far from their start."""
    with torch.no_grad():
        for _, one in parameters:
            spread = 0.3 * torch.randn(one.shape, generator=generator)
            one.copy_(one + spread if one.ndim == 1 else 3 * spread / one.shape[-1] ** 0.5)


def as_remote_code(folder: Path) -> dict[str, Any]:
    """Write code as MiMo ships it, a Qwen2 under another name; return what its configuration names."""
    (folder / "configuration_mimo.py").write_text(
        "from transformers import Qwen2Config\n\n\nclass MiMoConfig(Qwen2Config):\n    model_type = 'mimo'\n"
    )
    (folder / "modeling_mimo.py").write_text(
        "from transformers import Qwen2ForCausalLM\n\nfrom .configuration_mimo import MiMoConfig\n\n\n"
        "class MiMoForCausalLM(Qwen2ForCausalLM):\n    config_class = MiMoConfig\n"
    )
    return {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "mimo",
        "auto_map": {
            "AutoConfig": "configuration_mimo.MiMoConfig",
            "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM",
        },
    }
