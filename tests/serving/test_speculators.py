"""The published package ``speculators`` loads our EAGLE-3 export, and computes the same logits."""

from __future__ import annotations

from pathlib import Path

import torch
from serving import Served
from speculators import SpeculatorModel as PublishedModel
from speculators.models.eagle3 import Eagle3SpeculatorConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from specforge import SpeculatorModel
from specforge.__main__ import main
from specforge.verifier.features import capture

STEPS = 3


@torch.no_grad()
def test_logits_equal_ours(served: Served, tmp_path: Path) -> None:
    export = tmp_path / "export"
    words = ["--format", "speculators", "--output", str(export), "--skip_verifier"]
    assert main(["export", str(served.runs["eagle3"]), *words]) == 0
    verifier = AutoModelForCausalLM.from_pretrained(served.verifier, dtype=torch.float32).eval()
    ours = SpeculatorModel.from_pretrained(served.runs["eagle3"] / "draft", verifier=verifier)
    config = Eagle3SpeculatorConfig.from_pretrained(export)
    config.transformer_layer_config._attn_implementation = "eager"  # its default needs a compiler
    theirs = PublishedModel.from_pretrained(export, config=config).float().eval()
    logits_of_steps: list[Tensor] = []
    theirs.lm_head.register_forward_hook(lambda _module, _arguments, logits: logits_of_steps.append(logits))

    tokens = torch.tensor(served.prompts[0])[None]
    positions = torch.arange(tokens.shape[1])[None]
    features = capture(verifier, tokens, positions, ours.aux_layers)
    documents = torch.zeros_like(tokens)
    # Their row t reads x_{t+1}; the last row has none.
    theirs(features.aux.flatten(2), tokens.roll(-1), documents, ttt_steps=STEPS)
    expected = ours.logits(ours.unroll(tokens, features, positions, documents, STEPS))
    assert len(logits_of_steps) == STEPS
    for step in range(STEPS):
        rows = tokens.shape[1] - 1 - step
        torch.testing.assert_close(logits_of_steps[step][:, :rows], expected[step][:, :rows], atol=1e-4, rtol=1e-4)
