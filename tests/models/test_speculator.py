from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import specforge.models
from specforge.config import SpeculatorModelConfig
from specforge.errors import SpecforgeError, UsageError
from specforge.models import storage
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.parts import VerifierParts
from specforge_eagle3.config import Eagle3SpeculatorConfig
from specforge_eagle3.model import Eagle3DraftModel


class SmallConfig(SpeculatorModelConfig):
    model_type_name: ClassVar[str] = "small"
    width: int = 3


class Small(SpeculatorModel):
    config_class: ClassVar[type[SpeculatorModelConfig]] = SmallConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.first = nn.Linear(config.width, config.width)
        self.second = nn.Linear(config.width, 2, bias=False)
        self.register_buffer("frequencies", torch.arange(3.0), persistent=False)

    def reset_constants(self) -> None:
        self.frequencies = torch.arange(3.0)


@pytest.fixture
def small() -> Small:
    return Small(SmallConfig())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tiny_eagle3(tiny_verifiers: Mapping[str, Any], **options: Any) -> Eagle3DraftModel:
    return Eagle3DraftModel.from_training_args(tiny_verifiers["llama"].model.config, **options)


def test_round_trip(small: Small, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "draft")
    assert contents(tmp_path / "draft").keys() == {"config.json", "model.safetensors"}
    again = Small.from_pretrained(tmp_path / "draft")
    assert again.state_dict().keys() == small.state_dict().keys()
    for name, tensor in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert again.config.to_dict() == small.config.to_dict()
    assert torch.equal(again.frequencies, torch.arange(3.0))
    assert os.listdir(tmp_path) == ["draft"]


def test_the_network_is_found_by_its_type(tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> None:
    tiny_eagle3(tiny_verifiers).save_pretrained(tmp_path / "draft")
    assert type(SpeculatorModel.from_pretrained(tmp_path / "draft")) is Eagle3DraftModel


def test_a_checkpoint_of_another_type_is_refused(small: Small, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "draft")
    with pytest.raises(UsageError, match="'small'"):
        SpeculatorModel.from_pretrained(tmp_path / "draft")
    with pytest.raises(UsageError, match="speculators_model_type is 'small'"):
        Eagle3DraftModel.from_pretrained(tmp_path / "draft")


def test_mismatching_tensors_are_named(small: Small, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "draft")
    path = tmp_path / "draft" / "model.safetensors"
    state = load_file(path)
    del state["first.bias"]
    state["third.weight"] = torch.zeros(1)
    state["second.weight"] = torch.zeros(2, 4)
    save_file(state, path)
    with pytest.raises(UsageError) as caught:
        Small.from_pretrained(tmp_path / "draft")
    message = str(caught.value)
    assert str(path.parent) in message
    assert "missing: first.bias" in message
    assert "unknown: third.weight" in message
    assert "second.weight is [2, 4], not [2, 3]" in message


def test_many_mismatching_tensors_are_counted(small: Small) -> None:
    state = small.state_dict() | {f"unknown_{number}": torch.zeros(1) for number in range(20)}
    with pytest.raises(UsageError, match="and 12 more"):
        Small.from_state(SmallConfig(), state)


@pytest.mark.parametrize(("other", "widest"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_weights_of_several_dtypes_are_widened_without_loss(
    other: torch.dtype, widest: torch.dtype, small: Small
) -> None:
    state = small.state_dict()
    state["first.bias"] = state["first.bias"].to(other)
    again = Small.from_state(SmallConfig(), state).state_dict()
    assert {tensor.dtype for tensor in again.values()} == {widest}
    assert all(torch.equal(tensor, state[name].to(widest)) for name, tensor in again.items())


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_non_weights_are_refused_by_name(kind: torch.dtype, small: Small) -> None:
    state = small.state_dict()
    state["first.bias"] = state["first.bias"].to(kind)
    with pytest.raises(UsageError, match=r"first\.bias is \w+; quantised weights are not read"):
        Small.from_state(SmallConfig(), state)


def test_settings_that_fit_no_network_are_named(small: Small) -> None:
    with pytest.raises(UsageError, match="weights: cannot build Small from its configuration"):
        Small.from_state(SmallConfig(width=-1), small.state_dict())


@pytest.mark.parametrize("share", [0, 5, 40, 150])
def test_a_truncated_file_is_named(share: int, small: Small, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "draft")
    path = tmp_path / "draft" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:share])
    with pytest.raises(UsageError, match=re.escape(str(path))):
        Small.from_pretrained(tmp_path / "draft")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, small: Small, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "draft")
    (tmp_path / "draft" / name).unlink()
    with pytest.raises(UsageError, match=re.escape(name)):
        Small.from_pretrained(tmp_path / "draft")


def test_an_earlier_checkpoint_is_replaced(small: Small, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "draft")
    with torch.no_grad():
        small.first.weight.zero_()
    small.save_pretrained(tmp_path / "draft")
    assert not Small.from_pretrained(tmp_path / "draft").first.weight.any()
    assert os.listdir(tmp_path) == ["draft"]


def fail_in_save_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_written(_: Any, path: Path, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "save_file", half_written)


def fail_in_config(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_written(path: Path, *_: Any, **__: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half_written)


def fail_in_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(storage.os, "replace", refuse)


FAILURES = {
    "weights": fail_in_save_file,
    "config": fail_in_config,
    "rename": fail_in_rename,
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_write_leaves_the_earlier_checkpoint(
    failure: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.save_pretrained(tmp_path / "draft")
    before = contents(tmp_path / "draft")
    with torch.no_grad():
        small.first.weight.zero_()
    FAILURES[failure](monkeypatch)
    with pytest.raises(SpecforgeError, match=re.escape(str(tmp_path / "draft"))) as caught:
        small.save_pretrained(tmp_path / "draft")
    assert not isinstance(caught.value, UsageError)
    assert os.listdir(tmp_path) == ["draft"]
    assert contents(tmp_path / "draft") == before


def test_a_failed_first_write_leaves_nothing(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in_save_file(monkeypatch)
    with pytest.raises(SpecforgeError, match="No space left"):
        small.save_pretrained(tmp_path / "draft")
    assert os.listdir(tmp_path / "draft") == []


def test_a_file_in_the_way_is_reported(small: Small, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SpecforgeError, match="file"):
        small.save_pretrained(tmp_path / "file" / "draft")


@pytest.mark.parametrize("mode", ["full", "train_only", None])
def test_the_verifier_is_not_part_of_the_draft(mode: Any, tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> None:
    draft = tiny_eagle3(tiny_verifiers)
    names = draft.state_dict().keys()
    attached = draft.attach_verifier(tiny_verifiers["llama"].folder, mode)
    assert (draft.verifier is None) == (mode == "train_only") == isinstance(attached, VerifierParts)
    parts = draft.verifier_parts
    modules = (parts.embed_tokens, parts.norm, parts.lm_head)
    borrowed = {id(parameter) for module in modules for parameter in module.parameters()}
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert draft.state_dict().keys() == names
    assert not borrowed & {id(parameter) for parameter in draft.parameters()}
    assert not {*map(id, modules)} & {id(part) for part in draft.modules()}
    draft.double()
    draft.requires_grad_(True)
    assert parts.embed_tokens.weight.dtype == torch.float32
    assert not parts.embed_tokens.weight.requires_grad
    draft.save_pretrained(tmp_path / "draft")
    assert load_file(tmp_path / "draft" / "model.safetensors").keys() == names
    draft.detach_verifier()
    assert draft.verifier is None
    with pytest.raises(ValueError, match="attach_verifier"):
        draft.embed(torch.zeros(1, dtype=torch.int64))


def test_loading_attaches_the_requested_verifier(tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> None:
    made = tiny_verifiers["llama"]
    tiny_eagle3(tiny_verifiers).save_pretrained(tmp_path / "draft")

    def load(**options: Any) -> SpeculatorModel:
        return SpeculatorModel.from_pretrained(tmp_path / "draft", **options)

    with pytest.raises(ValueError, match="no verifier is attached"):
        _ = load().verifier_parts
    with pytest.raises(ValueError, match="no verifier is attached"):
        _ = load(verifier=made.folder, verifier_attachment_mode="detached").verifier_parts
    assert load(verifier=made.model).verifier is made.model
    full = load(verifier=str(made.folder))
    assert full.verifier is not None
    assert torch.equal(full.verifier_parts.lm_head.weight, made.model.lm_head.weight)
    few = load(verifier=made.folder, verifier_attachment_mode="train_only")
    assert few.verifier is None
    assert torch.equal(few.verifier_parts.lm_head.weight, made.model.lm_head.weight)


def test_casting_on_load_leaves_the_rotary_frequencies(tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> None:
    """Frequencies in a short dtype would change the rotation at every position."""
    draft = tiny_eagle3(tiny_verifiers)
    draft.save_pretrained(tmp_path / "draft")
    again = SpeculatorModel.from_pretrained(tmp_path / "draft", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again.rotary_emb.inv_freq.float(), draft.rotary_emb.inv_freq)


def test_the_stored_dtype_is_that_of_the_weights(tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> None:
    tiny_eagle3(tiny_verifiers).to(torch.bfloat16).save_pretrained(tmp_path / "draft")
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["dtype"] == "bfloat16"


def test_networks_are_found_by_name() -> None:
    assert specforge.models.Eagle3DraftModel is Eagle3DraftModel
    assert specforge.models.Eagle3SpeculatorConfig is Eagle3SpeculatorConfig
    from specforge.models import Eagle3DraftModel as imported

    assert imported is Eagle3DraftModel


def test_an_unknown_network_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(AttributeError, match=r"no installed plugin provides 'Eagle3DraftModle'") as caught:
        _ = specforge.models.Eagle3DraftModle
    assert "Eagle3SpeculatorConfig" in str(caught.value)
    assert "Did you mean 'Eagle3DraftModel'?" in str(caught.value)
    assert not hasattr(specforge.models, "nothing_like_it")
