"""The layouts of the published EAGLE-3 heads: the output for each reader, and refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import layout, read, write
from safetensors.torch import load_file, save_file

from specforge.checkpoints.layout import StoredDraft
from specforge.config import VerifierConfig
from specforge.errors import UsageError
from specforge.training.identity import start_from
from specforge.verifier.parts import VerifierParts
from specforge_eagle3.model import Eagle3DraftModel

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
DEFAULT = [2, 4, 5]


def make_draft(tiny_verifiers: Mapping[str, Any], **options: Any) -> Eagle3DraftModel:
    made = tiny_verifiers["llama"]
    options = {"t2d": torch.arange(61) % 2 == 0, "verifier_name_or_path": "owner/name", **options}
    draft = Eagle3DraftModel.from_training_args(made.model.config, **options)
    draft.attach_verifier(VerifierParts.of(made.model))
    return draft


@pytest.fixture
def written(tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> tuple[Eagle3DraftModel, Path]:
    draft = make_draft(tiny_verifiers)
    write("eagle3/midlayer", draft, tmp_path / "draft")
    return draft, tmp_path / "draft"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | values))


def change_weights(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    state = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)


def test_a_run_starts_from_a_draft_that_ships_the_verifiers_embeddings(
    tiny_verifiers: Mapping[str, Any], tmp_path: Path
) -> None:
    stored, draft = make_draft(tiny_verifiers), make_draft(tiny_verifiers)
    stored.own_embeddings()
    stored.save_pretrained(tmp_path / "draft")
    assert "embed_tokens.weight" in load_file(tmp_path / "draft" / "model.safetensors")
    start_from(draft, str(tmp_path / "draft"))
    assert torch.equal(draft.fc.weight, stored.fc.weight)
    change_weights(tmp_path / "draft", embed_tokens__weight=torch.randn(61, 16))
    with pytest.raises(UsageError, match=r"embed_tokens\.weight is"):
        start_from(draft, str(tmp_path / "draft"))


@pytest.mark.parametrize("reader", ["midlayer", "sglang", "vllm", "speculators"])
def test_round_trip(reader: str, tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> None:
    draft = make_draft(tiny_verifiers)
    write(f"eagle3/{reader}", draft, tmp_path)
    again = read(f"eagle3/{reader}", tmp_path, str(tiny_verifiers["llama"].folder))
    assert again.state_dict().keys() == draft.state_dict().keys()
    for name, tensor in draft.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    ours, theirs = draft.config.to_dict(), again.config.to_dict()
    assert ours.pop("transformer_layer_config").items() <= theirs.pop("transformer_layer_config").items()
    assert theirs["draft_vocab_size"] == 31
    assert again.config.speculators_config.verifier.architectures == ["LlamaForCausalLM"]
    again.attach_verifier(draft.verifier_parts)
    assert again.aux_layers == draft.aux_layers == DEFAULT


def test_names_of_each_reader(tiny_verifiers: Mapping[str, Any], tmp_path: Path) -> None:
    for reader in ("midlayer", "sglang", "vllm"):
        write(f"eagle3/{reader}", make_draft(tiny_verifiers), tmp_path / reader)
    names = {
        layout: load_file(tmp_path / layout / "model.safetensors").keys() for layout in ("midlayer", "sglang", "vllm")
    }
    assert "midlayer.self_attn.q_proj.weight" in names["sglang"] == names["midlayer"]
    assert "layers.0.self_attn.q_proj.weight" in names["vllm"]
    assert not any("embed" in name for kind in names.values() for name in kind)
    for reader in ("midlayer", "sglang"):
        values = config_of(tmp_path / reader)
        assert values["architectures"] == ["LlamaForCausalLMEagle3"] and values["norm_before_residual"] is False
        assert (values["rope_theta"], values["rope_scaling"]) == (10000.0, None)
    values = config_of(tmp_path / "vllm")
    assert "model_type" not in values and values["norm_before_residual"] is False
    assert values[LAYER_IDS] == DEFAULT and values["transformer_layer_config"]["num_aux_hidden_states"] == 3


@pytest.mark.parametrize(
    ("chosen", "expected"), [(None, None), (DEFAULT, None), ([2, 3, 6], [1, 2, 5]), ([3, 5, 7], [3, 5, 7])]
)
def test_layer_ids_in_the_sense_of_sglang(
    chosen: list[int] | None, expected: list[int] | None, tiny_verifiers: Mapping[str, Any], tmp_path: Path
) -> None:
    """SGLang adds 1 if the first is 1, and uses the published layers if none are set."""
    draft = make_draft(tiny_verifiers, aux_layer_ids=chosen)
    write("eagle3/sglang", draft, tmp_path)
    assert config_of(tmp_path).get("eagle_config", {}).get(LAYER_IDS) == expected and LAYER_IDS not in config_of(
        tmp_path
    )
    again = read("eagle3/sglang", tmp_path)
    again.attach_verifier(draft.verifier_parts)
    assert again.aux_layers == draft.aux_layers
    assert not list(layout("eagle3/sglang").faults(StoredDraft.read(tmp_path), None))


@given(ids=st.sets(st.integers(0, 8), min_size=1, max_size=4).map(sorted))
def test_ids_are_read_back_unchanged(ids: list[int], tiny_verifiers: Mapping[str, Any]) -> None:
    draft, sglang = make_draft(tiny_verifiers, aux_layer_ids=ids), layout("eagle3/sglang")
    if ids[0] == 1:
        with pytest.raises(UsageError, match="reads a first id of 1 as 2"):
            sglang.write(draft)
        return
    again = sglang.read(sglang.write(draft), VerifierConfig())
    again.attach_verifier(draft.verifier_parts)
    assert again.aux_layers == ids


@pytest.mark.parametrize(
    ("reader", "options", "message"),
    [
        ("sglang", {"aux_layer_ids": [1, 3, 5]}, "reads a first id of 1 as 2"),
        ("sglang", {"norm_output": True, "fc_norm": True}, "does not support fc_norm or norm_output"),
        ("sglang", {"layer_type": "qwen3"}, "builds Llama layers"),
        ("sglang", {"embed_requires_grad": True}, "drafts with the verifier's"),
        ("midlayer", {"aux_layer_ids": [2, 3, 5]}, r"before the layers \[2, 4, 5\]"),
        ("midlayer", {"norm_before_residual": True}, "does not support norm_before_residual"),
        ("midlayer", {"num_layers": 2}, "this draft has 2"),
    ],
)
def test_a_draft_that_a_reader_would_run_wrong_is_refused(
    reader: str, options: dict[str, Any], message: str, tiny_verifiers: Mapping[str, Any]
) -> None:
    draft = make_draft(tiny_verifiers, **options)
    with pytest.raises(UsageError, match=message):
        layout(f"eagle3/{reader}").write(draft)
    # vLLM reads all of it.
    vllm = layout("eagle3/vllm")
    assert not list(vllm.faults(vllm.write(draft), None))


@pytest.mark.parametrize("reader", ["vllm", "sglang", "midlayer"])
def test_embeddings_of_the_verifier_are_written_unless_the_reader_takes_its_own(
    reader: str, tiny_verifiers: Mapping[str, Any], tmp_path: Path
) -> None:
    draft = make_draft(tiny_verifiers, embed_requires_grad=True)
    draft.borrow_weights()
    layout(f"eagle3/{reader}").prepare(draft)
    write(f"eagle3/{reader}", draft, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("embed_tokens.weight" in names) == (reader != "sglang")


def test_options_at_the_top_level_are_read(written: tuple[Eagle3DraftModel, Path]) -> None:
    change_config(written[1], norm_before_residual=True, norm_output=True, **{LAYER_IDS: [1, 2, 6]})
    config = read("eagle3/midlayer", written[1]).config
    assert config.norm_before_residual and config.norm_output and not config.fc_norm
    assert config.eagle_aux_hidden_state_layer_ids == [1, 2, 6]


def test_ambiguous_layer_ids_are_refused(written: tuple[Eagle3DraftModel, Path]) -> None:
    change_config(written[1], eagle_config={LAYER_IDS: [1, 3, 4]})
    with pytest.raises(UsageError, match=r"engines disagree.*--format sglang"):
        read("eagle3/midlayer", written[1])
    assert read("eagle3/sglang", written[1]).config.eagle_aux_hidden_state_layer_ids == [2, 4, 5]


def test_the_map_that_engines_ignore_may_be_missing(written: tuple[Eagle3DraftModel, Path]) -> None:
    change_weights(written[1], t2d=None)
    assert torch.equal(read("eagle3/midlayer", written[1]).t2d, written[0].t2d)
    change_weights(written[1], d2t=None)
    with pytest.raises(UsageError, match="missing: d2t"):
        read("eagle3/midlayer", written[1])


def test_the_rotary_base_is_read_from_its_old_key(written: tuple[Eagle3DraftModel, Path]) -> None:
    folder = written[1]
    values = config_of(folder)
    del values["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(values | {"rope_theta": 1234.0, "rope_scaling": None}))
    layers = read("eagle3/midlayer", folder).config.transformer_layer_config
    assert layers.rope_parameters == {"rope_type": "default", "rope_theta": 1234.0}


def test_mismatching_tensors_are_named(written: tuple[Eagle3DraftModel, Path]) -> None:
    change_weights(written[1], norm__weight=None, midlayer__unknown=torch.ones(1))
    with pytest.raises(UsageError, match=r"missing: norm\.weight; unknown: layers\.0\.unknown"):
        read("eagle3/midlayer", written[1])


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_config_is_named(content: str, written: tuple[Eagle3DraftModel, Path]) -> None:
    (written[1] / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config\.json|draft: "):
        read("eagle3/midlayer", written[1])
