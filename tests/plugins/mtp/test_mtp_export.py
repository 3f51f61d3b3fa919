"""Heads exported in their verifier's folder: what is linked, what is written, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mtp_verifiers
import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge.__main__ import main
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.loading import VerifierLoading, load_config, load_verifier
from specforge_mtp.model import MtpDraftModel
from specforge_mtp.native import read_head
from specforge_mtp.stitching import HEAD_FILE, write_with_head

INDEX = "model.safetensors.index.json"


def trained(verifier: Path, folder: Path, fresh: bool = False) -> Path:
    """Store heads that differ from the verifier's, in bfloat16."""
    draft = MtpDraftModel.from_training_args(
        load_config(str(verifier)), verifier_name_or_path=str(verifier), fresh=fresh, mtp_steps=2
    )
    if not fresh:
        draft.load_state_dict(read_head(draft.config, str(verifier), VerifierLoading()))
    with torch.no_grad():
        for one in draft.parameters():
            one.add_(0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(0)))
    draft.cast(torch.bfloat16).save_pretrained(folder)
    return folder


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    return {name: one for file in files for name, one in load_file(folder / file).items()}


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mtp_verifiers.write("deepseek_v3", tmp_path_factory.mktemp("deepseek") / "verifier", torch.bfloat16)


@pytest.fixture(scope="module")
def draft(verifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(verifier, tmp_path_factory.mktemp("drafts") / "draft")


@pytest.fixture(scope="module")
def exported(draft: Path) -> Path:
    assert main(["export", str(draft), "--format", "native"]) == 0
    return draft.with_name("draft-native")


def test_the_folder_is_the_verifier_with_another_head(exported: Path, verifier: Path, draft: Path) -> None:
    ours, theirs = all_tensors(exported), all_tensors(verifier)
    head = {name for name in theirs if name.startswith(("model.layers.2.", "model.layers.3."))}
    changed = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert ours.keys() == theirs.keys() and all(ours[name].dtype == theirs[name].dtype for name in theirs)
    assert changed == {name for name in head if not name.endswith("e_score_correction_bias")}
    assert json.loads((exported / INDEX).read_text()) == json.loads((verifier / INDEX).read_text())
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (exported / name).read_bytes() == (verifier / name).read_bytes()
    linked = {path.name for path in exported.glob("*.safetensors") if os.path.samefile(path, verifier / path.name)}
    assert linked == {"model-00001-of-00002.safetensors"}
    # Transformers loads it as the verifier.
    assert load_verifier(str(exported)).config.num_hidden_layers == 2


def test_an_export_is_verified_and_read_back(
    exported: Path, verifier: Path, draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(exported), "--verifier", str(verifier)]) == 0
    words = ["--verifier", str(verifier), "--format", "native"]
    assert main(["convert", str(exported), *words, "--output", str(tmp_path / "again")]) == 0
    again, stored = (SpeculatorModel.from_pretrained(one).state_dict() for one in (tmp_path / "again", draft))
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    assert main(["convert", str(verifier), *words, "--output", str(tmp_path / "untouched")]) == 0
    shutil.copytree(exported, tmp_path / "changed")
    path = tmp_path / "changed" / "model-of-the-head.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.enorm.weight"] += 1
    save_file(tensors, path)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "changed")]) == 1
    assert "tensors differ from those that were exported: mtp_layers.0.token_layernorm" in capsys.readouterr().out
    path.unlink()
    assert main(["verify", str(tmp_path / "changed")]) == 1


def test_another_dtype_is_refused(draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--format", "native", "--dtype", "fp32", "--skip_verifier", "--output", str(tmp_path / "export")]
    assert main(["export", str(draft), *words]) == 2
    assert "give the dtype of the verifier as --dtype" in capsys.readouterr().err and not (tmp_path / "export").exists()


def test_verifiers_whose_heads_no_engine_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verifier = mtp_verifiers.write("qwen3", tmp_path / "verifier", torch.bfloat16)
    source = trained(verifier, tmp_path / "draft")
    assert main(["export", str(source), "--format", "native", "--skip_verifier"]) == 2
    assert "no engine runs a prediction head of qwen3 verifiers" in capsys.readouterr().err
    assert main(["export", str(source), "--format", "speculators", "--skip_verifier"]) == 0


def test_a_new_head_is_added_to_a_verifier_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verifier = mtp_verifiers.write("glm4_moe", tmp_path / "verifier", torch.bfloat16)
    (verifier / "model-of-the-head.safetensors").unlink()
    index = json.loads((verifier / INDEX).read_text())
    index["weight_map"] = {name: one for name, one in index["weight_map"].items() if "layers.2." not in name}
    (verifier / INDEX).write_text(json.dumps(index))
    source = trained(verifier, tmp_path / "draft", fresh=True)
    words = ["export", str(source), "--format", "native", "--skip_verifier", "--output", str(tmp_path / "export")]
    assert main(words) == 0
    added = json.loads((tmp_path / "export" / INDEX).read_text())["weight_map"]
    assert added["model.layers.2.hnorm.weight"] == HEAD_FILE and (tmp_path / "export" / HEAD_FILE).is_file()
    assert main(["verify", str(tmp_path / "export")]) == 0
    config = json.loads((verifier / "config.json").read_text())
    (verifier / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    capsys.readouterr()
    source = trained(verifier, tmp_path / "another", fresh=True)
    assert main(["export", str(source), "--format", "native", "--skip_verifier"]) == 2
    assert "gives no number of heads" in capsys.readouterr().err


def test_a_verifier_in_one_file_is_written_again(tmp_path: Path) -> None:
    source, target = tmp_path / "verifier", tmp_path / "export"
    source.mkdir(), target.mkdir()
    tensors = {"model.embed_tokens.weight": torch.ones(3, 2), "mtp.fc.weight": torch.zeros(2, 4)}
    save_file(tensors, source / "model.safetensors")
    head: dict[str, Any] = {"mtp.fc.weight": torch.ones(2, 4), "mtp.norm.weight": torch.ones(2)}
    write_with_head(target, str(source), None, head)
    written = load_file(target / "model.safetensors")
    assert written.keys() == tensors.keys() | head.keys()
    assert torch.equal(written["mtp.fc.weight"], head["mtp.fc.weight"])
    assert not torch.equal(load_file(source / "model.safetensors")["mtp.fc.weight"], head["mtp.fc.weight"])


def test_files_are_copied_where_nothing_links(
    draft: Path, verifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    name = "model-00001-of-00002.safetensors"
    for kinds in (("link",), ("link", "symlink")):
        target = tmp_path / str(len(kinds))
        target.mkdir()
        with monkeypatch.context() as patch:
            for kind in kinds:
                patch.setattr(os, kind, refuse)
            write_with_head(target, str(verifier), None, {})
        assert (target / name).is_symlink() is (len(kinds) == 1)
        assert (target / name).read_bytes() == (verifier / name).read_bytes()
