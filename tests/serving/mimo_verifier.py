"""The quickstart's verifier as a MiMo, whose heads vLLM runs: the same output, and a random head."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from mtp_verifiers import add_heads, as_remote_code
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

WIDTH = 128
SHARED = (
    *("vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "tie_word_embeddings", "rope_parameters", "eos_token_id", "pad_token_id"),
)


def write_mimo_verifier(wide: Path, folder: Path) -> None:
    """Write a verifier of Llama's family as MiMo's, with a head.

    vLLM takes the width of MiMo's heads from that of the states, so the states are padded with zeros. A norm over twice
    the width is larger by the root of two, which its scale makes up for. Qwen2's biases are zero.

    Args:
        wide: Folder of the verifier with heads of 32 (``wide_verifier``).
        folder: Folder to write.
    """
    narrow = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    config, known = narrow.config, narrow.state_dict()
    assert 2 * config.hidden_size == WIDTH
    shared = {name: getattr(config, name) for name in SHARED}
    model = Qwen2ForCausalLM(Qwen2Config(**shared, hidden_size=WIDTH, rms_norm_eps=config.rms_norm_eps / 2))
    for name, tensor in model.state_dict().items():
        tensor.zero_()
        if name in known:
            scale = 0.5**0.5 if "norm" in name else 1.0
            tensor[tuple(slice(size) for size in known[name].shape)] = scale * known[name]
    # In shards, so that an export links some of them.
    model.save_pretrained(folder, max_shard_size="600KB")
    AutoTokenizer.from_pretrained(wide).save_pretrained(folder)
    path = folder / "config.json"
    stated = {**json.loads(path.read_text()), **as_remote_code(folder), "num_nextn_predict_layers": 1}
    path.write_text(json.dumps(stated))
    add_heads(folder, torch.Generator().manual_seed(1), torch.float32)
