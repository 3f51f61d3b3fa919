"""Figures computed by hand for Llama-3.1-8B; only its configuration is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from transformers import LlamaConfig

from specforge.estimation.step import HEAD, LAYERS, VERIFIER, DryRun, StepCost
from specforge.estimation.text import given_text
from specforge.hookspecs import Algorithm
from specforge.registry import installed
from specforge_mlp.module import MLPDraftSettings

TOKENS = 2048


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only the configuration."""
    folder = tmp_path_factory.mktemp("llama-8b")
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    return folder


def cost_of(folder: Path, name: str, **settings: Any) -> StepCost:
    """Estimate a step on a row of 2,048 tokens, all supervised."""
    module = installed().load(installed().find(Algorithm, name), "module")(verifier=str(folder), **settings)
    trainer = Trainer(accelerator="cpu", devices=1, precision="bf16-mixed", max_steps=1, logger=False)
    text = given_text(10**6, 1.0, Namespace(max_length=TOKENS, batch_size=1))
    return DryRun(module, trainer, torch.bfloat16, on_accelerator=True).run(text.batches[0])


# Draft and heads, forward and backward, GFLOP per token, including the verifier's head for the targets.
PUBLISHED: dict[str, tuple[float, str, dict[str, Any]]] = {
    "eagle3, 1 step": (3.6, "eagle3", {"ttt_steps": 1}),
    "eagle3, 3 steps": (8.1, "eagle3", {"ttt_steps": 3}),
    "eagle3, 7 steps": (17.1, "eagle3", {"ttt_steps": 7}),
    "eagle": (4.7, "eagle", {}),
    "hass": (12.0, "eagle", {"alignment_steps": 3}),
    "mlp, 4 heads": (
        9.7 + 1.05,
        "mlp",
        {"draft": MLPDraftSettings(num_layers=4, intermediate_size=3072, tie_weights=False)},
    ),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_operations(case, llama_8b):
    published, name, settings = PUBLISHED[case]
    cost = cost_of(llama_8b, name, **settings)
    by_part = {part: flops / TOKENS / 1e9 for part, flops in cost.flops.items()}
    assert by_part[VERIFIER] == pytest.approx(15.0, rel=0.01)
    # The figures by hand halve attention, since a query sees half the keys.
    assert by_part[LAYERS] + by_part[HEAD] == pytest.approx(published, rel=0.06)


def test_memory(llama_8b):
    cost = cost_of(llama_8b, "eagle3", ttt_steps=1)
    assert cost.trained == pytest.approx(425e6, rel=0.01)
    weights = cost.memory.draft + cost.memory.gradients + cost.memory.optimizer
    assert weights == pytest.approx(6.8e9, rel=0.01)
    assert cost.memory.verifier == pytest.approx(2 * 8.03e9, rel=0.01)
    # Three aux states and the last one, which shares its storage with the verifier's output.
    assert cost.memory.features == pytest.approx(TOKENS * 4 * 4096 * 2, rel=0.01)
