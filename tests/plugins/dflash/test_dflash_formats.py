"""Block drafts as files: the settings that each reader needs, and a rule for each known trap."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from block_drafts import random_draft
from checkpoint_drafts import BLOCKS, VERIFIER, make
from layouts import layout

from specforge.__main__ import main
from specforge.checkpoints.layout import StoredDraft
from specforge.checkpoints.verification.rules import file_faults
from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.config import VerifierConfig
from specforge.errors import UsageError
from specforge.models.speculator import SpeculatorModel
from specforge.models.storage import write_checkpoint

FACTS = VerifierFacts.read(str(VERIFIER))


def stored_as(algorithm: str, reader: str, **options: Any) -> StoredDraft:
    draft = make(algorithm, **options)
    return layout(f"{algorithm}/{reader}").write(draft)


def faults_of(algorithm: str, reader: str, stored: StoredDraft) -> list[str]:
    return list(layout(f"{algorithm}/{reader}").faults(stored, FACTS))


@pytest.mark.parametrize("algorithm", BLOCKS)
def test_all_settings_of_readers_are_written(algorithm: str) -> None:
    config = stored_as(algorithm, "vllm").config
    assert config["sample_from_anchor"] is (algorithm == "dspark") and config["sliding_window_non_causal"] is True
    assert config["aux_hidden_state_layer_ids"] == [2, 4, 5] and config["mask_token_id"] == 0
    assert "confidence_temperatures" not in config and "model_type" not in config
    assert config["transformer_layer_config"]["rope_theta"] > 0
    plain = stored_as(algorithm, "plain").config
    for settings in (plain, plain["dflash_config"]):
        assert settings["target_layer_ids"] == [1, 3, 4] and settings["mask_token_id"] == 0
        assert settings["block_size"] == 4
    assert plain["is_causal"] is False and plain["dflash_config"]["causal"] is False
    assert plain["num_target_layers"] == FACTS.num_hidden_layers and plain["model_type"] == "qwen3"


# A change of a stored configuration, and the fault reported by the rules of speculators and vLLM ...
TRAPS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "the anchor's slot is not mentioned": (
        "dflash",
        lambda config: config.pop("sample_from_anchor"),
        "sample_from_anchor is not set; readers assume different defaults",
    ),
    "the anchor predicts": (
        "dflash2",
        lambda config: config.update(sample_from_anchor=True),
        "sample_from_anchor is true, which vLLM refuses for dflash2",
    ),
    "blocks would be causal": (
        "dflash",
        lambda config: config.update(sliding_window_non_causal=False),
        "vLLM would run layers with full attention causally",
    ),
    "causality is not mentioned": (
        "dspark",
        lambda config: config.pop("sliding_window_non_causal"),
        "sliding_window_non_causal is not set",
    ),
    "sliding layers see the complete block": (
        "dspark",
        lambda config: config["transformer_layer_config"].update(
            layer_types=["sliding_attention"] * 2, sliding_window=9
        ),
        "vLLM runs sliding layers of dspark causally within a block",
    ),
    "layers slide without a window": (
        "dflash",
        lambda config: config["transformer_layer_config"].update(layer_types=["sliding_attention"] * 2),
        "sliding_window is not set",
    ),
    "no layer ids": ("dflash", lambda config: config.pop("aux_hidden_state_layer_ids"), "layers .* are not listed"),
    "the state after the final norm": (
        "dflash",
        lambda config: config.update(aux_hidden_state_layer_ids=[2, 4, 8]),
        "features are taken after the last layer, 8",
    ),
    "a layer that is not there": (
        "dflash",
        lambda config: config.update(aux_hidden_state_layer_ids=[2, 4, 9]),
        "must be ascending ids in 0..8",
    ),
    "no mask": ("dspark", lambda config: config.pop("mask_token_id"), "mask_token_id is missing"),
    "a mask outside the table": (
        "dspark",
        lambda config: config.update(mask_token_id=5000),
        "mask_token_id 5000 is outside the verifier's table of 1280",
    ),
    "a gated head": (
        "dspark",
        lambda config: config.update(markov_head_type="gated"),
        "vLLM has parameters for 'vanilla' only",
    ),
    "a part of each head is rotated": (
        "dflash",
        lambda config: config["transformer_layer_config"]["rope_parameters"].update(partial_rotary_factor=0.5),
        "partial_rotary_factor is 0.5",
    ),
    "no positions": (
        "dflash",
        lambda config: [config["transformer_layer_config"].pop(name) for name in ("rope_parameters", "rope_theta")],
        "the rotary embeddings are not set",
    ),
    "other layers": (
        "dflash",
        lambda config: config["transformer_layer_config"].update(model_type="llama"),
        "readers have block drafts with qwen3 layers",
    ),
}
# ... and by those for readers of a plain configuration.
PLAIN_TRAPS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "ids under one key only": (
        "dflash",
        lambda config: config.pop("target_layer_ids"),
        "target_layer_ids must be both at the top and in dflash_config",
    ),
    "two block sizes": ("dspark", lambda config: config.update(block_size=9), "block_size is 9 at the top and 4 in"),
    "ids one too high": (
        "dflash",
        lambda config: [part.update(target_layer_ids=[2, 4, 7]) for part in (config, config["dflash_config"])],
        "features are taken after the last layer, 8",
    ),
    "the embeddings": (
        "dflash",
        lambda config: [part.update(target_layer_ids=[-1, 4]) for part in (config, config["dflash_config"])],
        "target_layer_ids has -1, the embeddings",
    ),
    "causality": ("dflash2", lambda config: config.pop("is_causal"), "is_causal and dflash_config.causal must be"),
    "another network": (
        "dflash2",
        lambda config: config.update(architectures=["DFlashDraftModel"]),
        r"not \['DFlash2DraftModel'\], by which readers choose",
    ),
    "another verifier": ("dspark", lambda config: config.update(num_target_layers=9), "num_target_layers is 9, but"),
    "sliding layers": (
        "dflash",
        lambda config: config.update(layer_types=["sliding_attention"] * 2),
        "sliding layers, on which readers disagree",
    ),
}


@pytest.mark.parametrize(
    ("reader", "trap"), [*(("vllm", name) for name in TRAPS), *(("plain", name) for name in PLAIN_TRAPS)]
)
def test_each_trap_is_a_rule(reader: str, trap: str) -> None:
    algorithm, change, message = (TRAPS if reader == "vllm" else PLAIN_TRAPS)[trap]
    stored = stored_as(algorithm, reader)
    assert faults_of(algorithm, reader, stored) == [*file_faults(stored)] == []
    change(stored.config)
    found = [*faults_of(algorithm, reader, stored), *file_faults(stored)]
    assert any(re.search(message, fault) for fault in found), found


def test_a_draft_vocabulary_without_its_head_is_reported() -> None:
    stored = stored_as("dflash", "vllm", t2d=torch.arange(1280) % 3 == 0)
    assert faults_of("dflash", "vllm", stored) == []
    del stored.tensors["lm_head.weight"]
    assert any(
        "lm_head.weight, the head of the draft vocabulary, is missing" in fault
        for fault in faults_of("dflash", "vllm", stored)
    )
    stored.tensors["embed_tokens.weight"] = torch.zeros(1)
    assert any("the verifier's own embeddings or head" in fault for fault in faults_of("dflash", "vllm", stored))


@pytest.mark.parametrize(
    ("algorithm", "options", "reader", "message"),
    [
        ("dspark", {"markov_head_type": "rnn"}, "vllm", "parameters for 'vanilla' only; --format speculators"),
        ("dspark", {"sample_from_anchor": False}, "plain", "sample_from_anchor is false, the other way round"),
        ("dflash", {"t2d": torch.arange(1280) < 500}, "plain", "have no draft vocabulary; --format vllm"),
    ],
)
def test_a_draft_that_a_reader_cannot_run_is_refused(
    algorithm: str, options: dict[str, Any], reader: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        stored_as(algorithm, reader, **options)


def test_sliding_layers_are_written_for_readers_that_support_them(verifier_of: Any) -> None:
    draft = random_draft(verifier_of("llama"), "dflash, sliding")
    with pytest.raises(UsageError, match="would run layers with full attention causally"):
        layout("dflash/vllm").write(draft)
    with pytest.raises(UsageError, match="disagree on sliding layers"):
        layout("dflash/plain").write(draft)
    assert layout("dflash/speculators").write(draft).config["sliding_window_non_causal"] is False


@pytest.mark.parametrize("algorithm", BLOCKS)
def test_a_published_draft_is_converted_without_a_change(
    algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In z-lab's earlier form, with all settings nested; the converted draft computes the same."""
    draft = make(algorithm)
    stored = layout(f"{algorithm}/plain").write(draft)
    published = {name: value for name, value in stored.config.items() if name not in stored.config["dflash_config"]}
    write_checkpoint(tmp_path / "published", published, stored.tensors)
    words = ["convert", str(tmp_path / "published"), "--verifier", str(VERIFIER), "--output", str(tmp_path / "here")]
    assert main(words) == 0
    again = SpeculatorModel.from_pretrained(tmp_path / "here")
    assert type(again) is type(draft) and again.config.aux_hidden_state_layer_ids == [2, 4, 5]
    ours, theirs = draft.config.to_dict(), again.config.to_dict()
    for values in (ours, theirs):
        values.pop("speculators_config"), values.pop("dtype")
        values["transformer_layer_config"].pop("rope_theta", None)
    known = {name: theirs["transformer_layer_config"].get(name) for name in ours["transformer_layer_config"]}
    assert {**theirs, "transformer_layer_config": known} == ours
    for name, tensor in draft.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("key", ["dflash/vllm", "dflash2/plain", "dspark/vllm", "dspark/plain"])
def test_an_export_is_verified_with_its_verifier(key: str, tmp_path: Path) -> None:
    """With chains of seven tokens, or of the block's length; a changed mask token is found."""
    algorithm, reader = key.split("/")
    make(algorithm).save_pretrained(tmp_path / "draft")
    export = tmp_path / "export"
    assert main(["export", str(tmp_path / "draft"), "--format", reader, "--output", str(export)]) == 0
    assert main(["verify", str(export), "--verifier", str(VERIFIER)]) == 0
    served = json.loads((export / "specforge_probe.json").read_text())["served"]
    assert len(served["accept_rates"]) == (4 if algorithm == "dspark" else 3)
    config = json.loads((export / "config.json").read_text())
    for values in (config, config.get("dflash_config", {})):
        if "mask_token_id" in values:
            values["mask_token_id"] = 7
    (export / "config.json").write_text(json.dumps(config))
    assert main(["verify", str(export), "--verifier", str(VERIFIER)]) == 1


def test_the_verifier_of_a_converted_draft_is_stored() -> None:
    stored = stored_as("dflash", "plain")
    draft = layout("dflash/plain").read(stored, VerifierConfig(name_or_path="some/verifier"))
    assert draft.config.speculators_config.verifier.name_or_path == "some/verifier"
