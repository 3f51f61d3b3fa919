"""Exports: contents of the folder, rejected drafts, and atomic writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_drafts import VERIFIER, break_drafter
from layouts import layout
from safetensors.torch import load_file

from specforge.__main__ import main
from specforge.checkpoints.layout import StoredDraft
from specforge.checkpoints.verification.probe import Probe
from specforge.config import VerifierConfig
from specforge.decoding.loop import Decoder
from specforge.hookspecs import CheckpointFormat
from specforge.models.speculator import SpeculatorModel
from specforge.proposals import GreedyTokenProposalConfig
from specforge.registry import installed
from specforge.verifier.parts import VerifierParts

# A head in its verifier's folder is tested with verifiers that have one.
FORMATS = sorted(installed().all(CheckpointFormat).keys() - {"mtp/native"})
AS_EAGLE = ["--format", "eagle", "--skip_verifier"]
# A language model goes with its tokenizer.
TOKENIZER = {"draft_model/transformers": {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}}
EXPORTS = {"README.md", "config.json", "model.safetensors", "specforge_probe.json"}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("key", FORMATS)
def test_weights_are_bit_equal_when_read_back(
    key: str, exported: Callable[..., Path], draft_of: Callable[..., Path]
) -> None:
    folder = exported(key, "--skip_verifier")
    assert {path.name for path in folder.iterdir()} == EXPORTS | TOKENIZER.get(key, set())
    again = layout(key).read(StoredDraft.read(folder), VerifierConfig()).state_dict()
    trained = SpeculatorModel.from_pretrained(draft_of(key.split("/")[0])).state_dict()
    # Readers that always have a bias get one of zeros; readers that need embeddings get the verifier's.
    added = again.keys() - trained.keys()
    assert added == {"eagle/sglang": {"fusion_fc.bias"}, "eagle/hass": {"fusion_fc.bias"}}.get(
        key, {"embed_tokens.weight"} if key == "eagle3/speculators" else set()
    )
    for name in added:
        borrowed = VerifierParts.from_pretrained(str(VERIFIER)).embed_tokens.weight
        assert torch.equal(again[name], borrowed) if "embed" in name else not bool(again[name].any())
    for name, tensor in trained.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_weights_are_cast_and_the_config_has_the_dtype(
    dtype: str, exported: Callable[..., Path], draft_of: Callable[..., Path]
) -> None:
    folder = exported("eagle3/vllm", "--dtype", dtype, "--skip_verifier")
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    tensors, trained = load_file(folder / "model.safetensors"), SpeculatorModel.from_pretrained(draft_of("eagle3"))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensors[name], tensor.to(expected) if tensor.is_floating_point() else tensor), name
    assert getattr(torch, config_of(folder)["dtype"]) == expected


def test_values_beyond_a_dtypes_range_are_rejected(
    draft_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = SpeculatorModel.from_pretrained(draft_of("mlp"))
    with torch.no_grad():
        next(draft.parameters())[0, 0] = 1e30
    draft.save_pretrained(tmp_path / "draft")
    words = ["export", str(tmp_path / "draft"), "--format", "mlp_speculator", "--dtype", "fp16", "--skip_verifier"]
    assert main(words) == 2
    assert "emb.0.weight holds values that are not finite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_no_other_file_of_an_export_is_loaded_as_weights(exported: Callable[..., Path]) -> None:
    """Engines load every safetensors, bin and pt file of a folder."""
    names = {path.name for path in exported("eagle3/vllm").iterdir()}
    assert [name for name in names if Path(name).suffix in (".safetensors", ".bin", ".pt")] == ["model.safetensors"]


def test_the_verifiers_length_is_written(draft_of: Callable[..., Path], tmp_path: Path) -> None:
    draft = SpeculatorModel.from_pretrained(draft_of("eagle"))
    draft.config.transformer_layer_config.max_position_embeddings = 32
    draft.save_pretrained(tmp_path / "draft")
    assert main(["export", str(tmp_path / "draft"), "--format", "vllm", "--skip_verifier"]) == 0
    assert config_of(tmp_path / "draft-vllm")["max_position_embeddings"] == 512


def test_rotary_embeddings_other_than_the_verifiers_are_kept_with_a_warning(
    draft_of: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draft = SpeculatorModel.from_pretrained(draft_of("eagle"))
    draft.config.transformer_layer_config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    draft.save_pretrained(tmp_path / "draft")
    assert main(["export", str(tmp_path / "draft"), "--format", "vllm", "--skip_verifier"]) == 0
    stored = config_of(tmp_path / "draft-vllm")
    assert stored["rope_theta"] == stored["rope_parameters"]["rope_theta"] == 5.0
    assert "the draft's are written" in caplog.text


def test_a_format_of_another_algorithm_is_rejected_with_the_own_ones(
    draft_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(draft_of("mlp"))]) == 2
    assert "--format: is required; drafts of mlp can be written as:\n" in capsys.readouterr().err
    assert main(["export", str(draft_of("mlp")), "--format", "vllm"]) == 2
    message = capsys.readouterr().err
    assert (
        "drafts of mlp have no format 'vllm'" in message and "mlp_speculator" in message and "midlayer" not in message
    )


def test_the_card_describes_the_run(draft_of: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "version_0"
    SpeculatorModel.from_pretrained(draft_of("eagle3")).save_pretrained(run / "draft")
    validation = VERIFIER.parent / "validation.jsonl"
    settings = {
        "data": {"train": "chats.jsonl", "validation": str(validation), "max_length": 512},
        "model": {"objective": {"kl": 1.0}, "optimizer": {"name": "adamw", "lr": 0.001}},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "checkpoints").mkdir()
    state = {"monitor": "val/acceptance_length", "best_model_score": torch.tensor(2.3456)}
    torch.save({"callbacks": {"Best": state}, "global_step": 77}, run / "checkpoints" / "best.ckpt")
    assert main(["export", str(run), "--format", "vllm"]) == 0
    card = (run / "draft-vllm" / "README.md").read_text()
    for part in (
        "chats.jsonl",
        "1.0 kl",
        "adamw, learning rate 0.001",
        "| steps | 77 |",
        "val/acceptance_length 2.346",
    ):
        assert part in card, part
    assert f"vllm serve {VERIFIER} --speculative-config" in card and '"method": "eagle3"' in card
    # The probe uses the run's validation prompts.
    texts = Probe.load(run / "draft-vllm").served.texts
    assert len(texts) == 4 and len({tuple(text.tokens[: text.begin]) for text in texts}) == 4


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", None], ids=["empty", "cut", "something else"])
def test_a_damaged_best_checkpoint_is_ignored(
    content: bytes | None, draft_of: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "version_0"
    SpeculatorModel.from_pretrained(draft_of("eagle")).save_pretrained(run / "draft")
    (run / "config.yaml").write_text("- no\n- settings\n")
    (run / "checkpoints").mkdir()
    path = run / "checkpoints" / "best.ckpt"
    torch.save([1], path) if content is None else path.write_bytes(content)
    assert main(["export", str(run), "--format", "eagle", "--skip_verifier"]) == 0
    assert str(path) in caplog.text and str(run / "config.yaml") in caplog.text


def test_an_export_with_embeddings_is_exported_again_with_them(exported: Callable[..., Path], tmp_path: Path) -> None:
    source = exported("eagle3/speculators", "--skip_verifier")
    tensors = load_file(source / "model.safetensors")
    for format in ("speculators", "vllm", "midlayer", "sglang"):
        words = ["--format", format, "--output", str(tmp_path / format), "--skip_verifier"]
        assert main(["export", str(source), *words]) == 0
        again = load_file(tmp_path / format / "model.safetensors")
        if format == "sglang":  # it drafts with the verifier's embeddings
            assert "embed_tokens.weight" not in again
        else:
            assert torch.equal(again["embed_tokens.weight"], tensors["embed_tokens.weight"])


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_mode_of_the_umask(mask: int, draft_of: Callable[..., Path], tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        words = ["export", str(draft_of("eagle")), *AS_EAGLE, "--output", str(tmp_path / "out")]
        assert main(words) == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(EXPORTS, 0o666 & ~mask)


def test_a_run_without_a_draft_says_how_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("{}")
    assert main(["export", str(tmp_path), "--format", "vllm"]) == 2
    assert "--ckpt_path last" in capsys.readouterr().err


def test_an_export_replaces_an_earlier_one_and_nothing_else(
    draft_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(draft_of("eagle")), *AS_EAGLE, "--output", str(tmp_path / "out")]
    assert main(words) == 0
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    assert main(words) == 0
    assert load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert main([*words[:-1], str(tmp_path / "mine")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize("fails_at", range(3))
def test_a_failure_keeps_the_earlier_export(
    fails_at: int, draft_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["export", str(draft_of("eagle")), *AS_EAGLE, "--output", str(tmp_path / "out")]
    assert main(words) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    replace, seen = os.replace, []

    def failing(source: Any, target: Any) -> None:
        seen.append(source)
        # Weights, then the configuration, then the earlier folder.
        if len(seen) == fails_at + 1:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    assert main(words) == 1
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_draft_without_a_verifier_requires_one(
    tmp_path: Path, draft_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    draft = SpeculatorModel.from_pretrained(draft_of("eagle"))
    draft.config.speculators_config = None
    draft.save_pretrained(tmp_path / "draft")
    assert main(["export", str(tmp_path / "draft"), "--format", "vllm"]) == 2
    assert "give --verifier" in capsys.readouterr().err


def test_a_verifier_by_a_relative_path_is_found_from_anywhere(
    draft_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(VERIFIER.parent)
    draft = SpeculatorModel.from_pretrained(draft_of("eagle3"))
    draft.config.speculators_config.verifier.name_or_path = "verifier"
    draft.save_pretrained(tmp_path / "draft")
    assert main(["export", str(tmp_path / "draft"), "--format", "speculators", "--skip_verifier"]) == 0
    stored = config_of(tmp_path / "draft-speculators")["speculators_config"]["verifier"]
    assert stored == {"name_or_path": str(VERIFIER), "architectures": ["LlamaForCausalLM"]}


def test_the_expected_acceptance_equals_that_of_decoding(exported: Callable[..., Path]) -> None:
    """The draft is random except for the verifier's head, so some tokens are accepted and most are not."""
    probe = Probe.load(exported("eagle/vllm"))
    assert probe.served is not None and sorted(probe.served.acceptance_length) == list(range(1, 9))
    draft = SpeculatorModel.from_pretrained(exported("eagle/speculators"), verifier=str(VERIFIER))
    decoder = Decoder(draft.verifier, draft, GreedyTokenProposalConfig(speculative_tokens=3))
    prompts = [torch.tensor(text.tokens[: text.begin]) for text in probe.served.texts]
    emissions = [emission for emission in decoder.decode(prompts, 64) if emission.drafted is not None]
    measured = sum(len(emission.tokens) for emission in emissions) / len(emissions)
    assert measured == pytest.approx(probe.served.acceptance_length[3], abs=1e-6)


def test_a_drafter_that_differs_from_training_is_reported(
    draft_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export holds the trained draft, even if decoding here is wrong."""
    words = ["export", str(draft_of("eagle")), "--format", "vllm", "--output", str(tmp_path / "export")]
    assert main(words) == 0
    assert "WARNING" not in capsys.readouterr().out
    break_drafter(SpeculatorModel.from_pretrained(draft_of("eagle")), monkeypatch)
    assert main(words) == 0
    assert "WARNING: real decoding accepts different tokens than replay" in capsys.readouterr().out
