"""Every recorded draft in every format of its algorithm: bit-equal when read back, or rejected for the right reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import CASES, ROOT
from layouts import layout

from specforge.checkpoints.formats import read_draft
from specforge.checkpoints.layout import StoredDraft
from specforge.checkpoints.verification.rules import file_faults
from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.config import VerifierConfig
from specforge.errors import UsageError
from specforge.hookspecs import CheckpointFormat
from specforge.registry import installed
from specforge.verifier.loading import VerifierLoading
from specforge.verifier.parts import VerifierParts
from specforge_eagle3.config import default_aux_layers

ALGORITHMS = {case: json.loads((case / "case.json").read_text())["algorithm"] for case in CASES}
PAIRS = [
    pytest.param(case, format_.name, id=f"{case.relative_to(ROOT)}-{format_.name}")
    for case in CASES
    for format_ in installed().all(CheckpointFormat).values()
    if format_.algorithm == ALGORITHMS[case]
]


def reason_to_refuse(draft: Any, reader: str) -> str | None:
    """Return why a format cannot represent a draft, from its readers' rules only."""
    config = draft.config
    if reader in ("sglang", "midlayer") and config.speculators_model_type == "eagle3":
        if len(draft.layers) > 1:
            return "one decoder layer"
        if config.transformer_layer_config.model_type != "llama":
            return "builds Llama layers"
        if config.norm_before_residual or config.norm_before_fc or config.fc_norm or config.norm_output:
            return "does not support"
        is_default = draft.aux_layers == default_aux_layers(draft.verifier_parts.config.num_hidden_layers)
        if not is_default and (reader == "midlayer" or draft.aux_layers[0] == 1):
            return "always takes features" if reader == "midlayer" else "reads a first id of 1"
    if reader in ("vllm", "sglang", "eagle", "hass") and config.speculators_model_type == "eagle":
        if config.layernorms:
            return "no names for the norms"
        if reader == "vllm" and config.fusion_bias and bool(draft.fusion_fc.bias.any()):
            return "vLLM would silently ignore"
    if config.speculators_model_type in ("dflash", "dflash2", "dspark"):
        return reason_to_refuse_blocks(config, reader)
    if reader == "native" and config.transformer_layer_config.model_type == "qwen3":
        return "no engine runs"
    return None


def reason_to_refuse_blocks(config: Any, reader: str) -> str | None:
    layers = config.transformer_layer_config
    slides = "sliding_attention" in layers.layer_types
    if reader == "plain" and config.draft_vocab_size != layers.vocab_size:
        return "no draft vocabulary"
    if reader == "plain" and slides:
        return "disagree on sliding layers"
    if reader == "vllm" and getattr(config, "markov_head_type", "vanilla") != "vanilla":
        return "parameters for 'vanilla' only"
    if reader == "vllm" and slides and "full_attention" in layers.layer_types and not config.sliding_window_non_causal:
        return "would run layers with full attention causally"
    return None


@pytest.mark.parametrize(("case", "reader"), PAIRS)
def test_round_trip(case: Path, reader: str, tmp_path: Path) -> None:
    verifier = str(case / "verifier")
    _, draft = read_draft(str(case / "draft"), VerifierConfig.from_pretrained(verifier))
    draft.attach_verifier(VerifierParts.from_pretrained(verifier))
    chosen = layout(f"{ALGORITHMS[case]}/{reader}")
    if reason := reason_to_refuse(draft, reader):
        with pytest.raises(UsageError, match=reason):
            chosen.write(draft)
        return
    before = draft.state_dict()
    chosen.prepare(draft)
    stored = chosen.write(draft)
    chosen.save(stored, tmp_path, verifier, VerifierLoading())
    on_disk = chosen.part_of(tmp_path) or StoredDraft.read(tmp_path)
    facts = VerifierFacts.read(verifier)
    assert [*file_faults(on_disk), *chosen.faults(on_disk, facts)] == []
    again = chosen.read(on_disk, VerifierConfig.from_pretrained(verifier))
    again.attach_verifier(draft.verifier_parts)
    assert again.aux_layers == draft.aux_layers
    theirs, ours = before, again.state_dict()
    embeddings = draft.verifier_parts.embed_tokens.weight
    for name in ours.keys() - theirs.keys():
        assert torch.equal(ours[name], torch.zeros_like(ours[name])) or torch.equal(ours[name], embeddings), name
    for name in theirs.keys() - ours.keys():
        assert torch.equal(theirs[name], embeddings), f"{name} is lost"
    for name in theirs.keys() & ours.keys():
        assert theirs[name].dtype == ours[name].dtype and torch.equal(theirs[name], ours[name]), name
