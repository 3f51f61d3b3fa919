from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge.errors import UsageError
from specforge_eagle3.midlayer import read, write
from specforge_eagle3.model import Eagle3DraftModel


@pytest.fixture
def written(tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> tuple[Eagle3DraftModel, Path]:
    draft = Eagle3DraftModel.from_training_args(
        tiny_verifiers["llama"].model.config,
        t2d=torch.arange(61) % 2 == 0,
        fc_norm=True,
        norm_before_residual=True,
        norm_output=True,
        aux_layer_ids=[1, 2, 6],
    )
    write(draft, tmp_path / "draft")
    return draft, tmp_path / "draft"


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_round_trip(written: tuple[Eagle3DraftModel, Path], tiny_verifiers: Mapping[str, Any]) -> None:
    draft, folder = written
    assert "midlayer.self_attn.q_proj.weight" in load_file(folder / "model.safetensors")
    again = read(folder, str(tiny_verifiers["llama"].folder))
    assert again.state_dict().keys() == draft.state_dict().keys()
    for name, tensor in draft.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    ours, theirs = draft.config.to_dict(), again.config.to_dict()
    assert ours.pop("transformer_layer_config").items() <= theirs.pop("transformer_layer_config").items()
    for name in ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output", "draft_vocab_size"):
        assert theirs[name] == ours[name], name
    assert theirs["eagle_aux_hidden_state_layer_ids"] == [1, 2, 6]
    assert again.config.speculators_config.verifier.architectures == ["LlamaForCausalLM"]


def test_more_than_one_layer_is_refused(tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> None:
    draft = Eagle3DraftModel.from_training_args(tiny_verifiers["llama"].model.config, num_layers=2)
    with pytest.raises(UsageError, match="this draft has 2"):
        write(draft, tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def test_ambiguous_layer_ids_are_refused(written: tuple[Eagle3DraftModel, Path]) -> None:
    change_config(written[1], eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 3]})
    with pytest.raises(UsageError, match="engines disagree"):
        read(written[1], None)


def test_the_rotary_base_is_read_from_its_old_place(written: tuple[Eagle3DraftModel, Path]) -> None:
    folder = written[1]
    values = json.loads((folder / "config.json").read_text())
    del values["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(values | {"rope_theta": 1234.0, "rope_scaling": None}))
    layers = read(folder, None).config.transformer_layer_config
    assert layers.rope_parameters == {"rope_type": "default", "rope_theta": 1234.0}


def test_unfitting_tensors_are_named(written: tuple[Eagle3DraftModel, Path]) -> None:
    path = written[1] / "model.safetensors"
    state = load_file(path)
    state["midlayer.unknown"] = state.pop("norm.weight")
    save_file(state, path)
    with pytest.raises(UsageError, match=r"missing: norm\.weight"):
        read(written[1], None)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_config_is_named(content: str, written: tuple[Eagle3DraftModel, Path]) -> None:
    (written[1] / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config\.json"):
        read(written[1], None)
