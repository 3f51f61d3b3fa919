"""The quickstart's verifier with wider heads, since engines have no kernels for heads of 16.

Each head is padded with zeros, which does not change the output: entry i of a head moves to 2 i, where the rotary
frequencies of a head of twice the width equal those of the narrow one, and queries are scaled for the other root in the
softmax.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"


def write_wide_verifier(folder: Path) -> None:
    """Write the verifier with heads of 32, in float32, with its tokenizer."""
    narrow = AutoModelForCausalLM.from_pretrained(QUICKSTART / "verifier", dtype=torch.float32)
    config = narrow.config.__class__.from_dict({**narrow.config.to_dict(), "head_dim": 2 * narrow.config.head_dim})
    wide = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    size = narrow.config.head_dim
    state = narrow.state_dict()
    for name, weight in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            scale = 2**0.5 if "q_proj" in name else 1.0
            state[name] = scale * _widened(weight, size)
        elif name.endswith("o_proj.weight"):
            state[name] = _widened(weight.T, size).T.contiguous()
    wide.load_state_dict(state)
    wide.save_pretrained(folder)
    AutoTokenizer.from_pretrained(QUICKSTART / "verifier").save_pretrained(folder)


def _widened(weight: Tensor, size: int) -> Tensor:
    """Spread the rows of each head, [heads x size, H], over twice the number."""
    heads = weight.view(-1, size, weight.shape[-1])
    spread = heads.new_zeros(len(heads), 2 * size, weight.shape[-1])
    spread[:, ::2] = heads
    return spread.flatten(0, 1)
