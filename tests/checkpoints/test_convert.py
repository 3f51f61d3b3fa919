"""Published drafts in all their layouts and file types, and everything that may be wrong with them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_drafts import VERIFIER
from safetensors.torch import load_file, save_file

from specforge.__main__ import main
from specforge.checkpoints.convert import convert
from specforge.checkpoints.formats import read_draft
from specforge.errors import UsageError
from specforge.hookspecs import CheckpointFormat
from specforge.models.speculator import SpeculatorModel
from specforge.registry import installed

WEIGHTS = "model.safetensors"
PUBLISHED = ["eagle/eagle", "eagle/sglang", "eagle/speculators", "eagle3/midlayer", "eagle3/speculators"]
PUBLISHED += ["eagle3/sglang", "mlp/mlp_speculator"]
# Formats whose files look like those of another one.
READ_AS = {"eagle3/sglang": "eagle3/midlayer"}


@pytest.fixture
def published(exported: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """A head as others publish it: configuration and weights, without specforge's own files."""

    def publish(key: str) -> Path:
        folder = tmp_path / "published"
        folder.mkdir()
        for name in ("config.json", WEIGHTS):
            (folder / name).write_bytes((exported(key, "--skip_verifier") / name).read_bytes())
        return folder

    return publish


def in_bin(folder: Path, shards: int = 1) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    weight_map = {name: f"pytorch_model-{index % shards}.bin" for index, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def in_shards(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("key", PUBLISHED)
def test_every_published_layout_is_recognised(
    key: str, published: Callable[[str], Path], draft_of: Callable[..., Path], tmp_path: Path
) -> None:
    done = convert(str(published(key)), str(VERIFIER), tmp_path / "ours")
    assert done.format == READ_AS.get(key, key)
    trained = SpeculatorModel.from_pretrained(draft_of(key.split("/")[0]))
    again = SpeculatorModel.from_pretrained(tmp_path / "ours")
    assert again.config.speculators_config.verifier.name_or_path == str(VERIFIER)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("files", [in_bin, lambda folder: in_bin(folder, 2), in_shards], ids=["bin", "bins", "shards"])
def test_every_kind_of_file_is_read(
    files: Callable[[Path], None], published: Callable[[str], Path], draft_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = published("eagle/eagle")
    files(folder)
    convert(str(folder), str(VERIFIER), tmp_path / "ours")
    trained = SpeculatorModel.from_pretrained(draft_of("eagle")).state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in load_file(tmp_path / "ours" / WEIGHTS).items())


def test_a_bin_file_runs_no_code(published: Callable[[str], Path], tmp_path: Path) -> None:
    folder, touched = published("eagle/eagle"), tmp_path / "touched"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (touched,))

    (folder / WEIGHTS).unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"fc.weight": Evil()}, file, protocol=2)
    with pytest.raises(UsageError, match="holds more than tensors"):
        convert(str(folder), str(VERIFIER), tmp_path / "ours")
    assert not touched.exists()


@pytest.mark.parametrize("index", ["pytorch_model.bin.index.json", "model.safetensors.index.json"])
def test_a_missing_shard_is_named(index: str, published: Callable[[str], Path], tmp_path: Path) -> None:
    folder = published("eagle/eagle")
    in_shards(folder) if "safetensors" in index else in_bin(folder, 2)
    shard = next(iter(json.loads((folder / index).read_text())["weight_map"].values()))
    (folder / shard).unlink()
    with pytest.raises(UsageError, match=f"holds no {shard}"):
        convert(str(folder), str(VERIFIER), tmp_path / "ours")


@pytest.mark.parametrize("key", PUBLISHED)
@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_no_tensor_is_filled_in_or_dropped(
    change: str, key: str, published: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = published(key)
    tensors = load_file(folder / WEIGHTS)
    name = max(candidate for candidate, tensor in tensors.items() if tensor.ndim == 2 and tensor.is_floating_point())
    ours = next(part for part in reversed(name.split(".")) if not part.isdigit() and part != "weight")
    if change == "missing":
        del tensors[name]
    elif change == "unknown":
        tensors[name.replace(ours, "surprise")] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, folder / WEIGHTS)
    expected = {"missing": "missing: ", "unknown": "unknown: .*surprise", "shape": rf"{ours}.* is \[.*\], not \["}[
        change
    ]
    with pytest.raises(UsageError, match=expected):
        convert(str(folder), str(VERIFIER), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("key", PUBLISHED)
def test_a_head_of_another_verifier_is_rejected(
    key: str, published: Callable[[str], Path], tiny_verifiers: Any, tmp_path: Path
) -> None:
    folder = published(key)
    with pytest.raises(UsageError, match="vocabulary of 1,280"):
        convert(str(folder), str(tiny_verifiers["llama"].folder), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_missing_verifier_is_named(published: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere/at/all"):
        convert(str(published("eagle/eagle")), "nowhere/at/all", tmp_path / "ours")


def test_no_folder_is_ever_replaced(published: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="already exists"):
        convert(str(published("eagle/eagle")), str(VERIFIER), tmp_path / "ours")
    assert (tmp_path / "ours" / "config.json").read_text() == "{}"


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    # A causal language model would be a draft model.
    shutil.copytree(VERIFIER, tmp_path / "classifier")
    path = tmp_path / "classifier" / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "LlamaForSequenceClassification"))
    with pytest.raises(
        UsageError, match=r"the format of .* is unknown: config.json has model_type 'llama'.*Known formats: .*vllm"
    ):
        convert(str(path.parent), str(VERIFIER), tmp_path / "ours")


def test_a_draft_whose_plugin_has_no_format_is_told_so(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported("mlp/speculators", "--skip_verifier")
    [plugin] = [one for one in installed().plugins if one.name == "mlp"]
    others = [one for one in plugin.descriptors if not isinstance(one, CheckpointFormat)]
    monkeypatch.setattr(plugin, "descriptors", others)
    with pytest.raises(UsageError, match="is a draft of 'mlp', and no installed plugin has a checkpoint format"):
        read_draft(str(folder))


def test_ambiguous_layer_ids_require_a_format(published: Callable[[str], Path], tmp_path: Path) -> None:
    folder = published("eagle3/sglang")
    values = json.loads((folder / "config.json").read_text())
    values["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match="--format sglang"):
        convert(str(folder), str(VERIFIER), tmp_path / "ours")
    convert(str(folder), str(VERIFIER), tmp_path / "ours", "sglang")
    assert SpeculatorModel.from_pretrained(tmp_path / "ours").config.eagle_aux_hidden_state_layer_ids == [2, 4, 5]
    with pytest.raises(UsageError, match="there is no format 'sglan'"):
        convert(str(folder), str(VERIFIER), tmp_path / "ours", "sglan")


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    stored = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in stored.items() if value is not ...}))


def change_tensors(folder: Path, **tensors: Any) -> None:
    stored = load_file(folder / WEIGHTS) | tensors
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, folder / WEIGHTS)


@pytest.mark.parametrize("theta", [..., None])
def test_a_head_published_without_its_rotary_base_gets_the_default(
    theta: Any, published: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = published("eagle3/midlayer")
    change_config(folder, rope_theta=theta, rope_parameters=..., rope_scaling=theta)
    convert(str(folder), str(VERIFIER), tmp_path / "ours")
    assert main(["export", str(tmp_path / "ours"), "--format", "midlayer", "--skip_verifier"]) == 0
    assert json.loads((tmp_path / "ours-midlayer" / "config.json").read_text())["rope_theta"] == 10000.0


def test_a_rotary_base_inside_the_scaling_is_read(published: Callable[[str], Path], tmp_path: Path) -> None:
    folder = published("eagle3/midlayer")
    scaling = {"rope_type": "default", "rope_theta": 12345.0}
    change_config(folder, rope_theta=None, rope_parameters=..., rope_scaling=scaling)
    done = convert(str(folder), str(VERIFIER), tmp_path / "ours")
    assert done.model.config.transformer_layer_config.rope_parameters["rope_theta"] == 12345.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "asks for mrope"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 0}, "transformers refuses it"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but there are tensors of 1 "),
        ({"eagle_aux_hidden_state_layer_ids": []}, "eagle_aux_hidden_state_layer_ids: must be ascending layer ids"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4, 99]}, r"aux layers \[2, 4, 99\] must be ascending ids in 0..8"),
        ({"vocab_size": "1280"}, "vocab_size"),
        ({"model_type": "deepseek_v3"}, "no installed plugin provides the layer family 'deepseek_v3'"),
    ],
)
def test_invalid_settings_are_named(
    config: dict[str, Any], message: str, published: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = published("eagle3/midlayer")
    change_config(folder, **config)
    with pytest.raises(UsageError, match=message):
        convert(str(folder), str(VERIFIER), tmp_path / "ours")


LSTM = {"model_type": "mlp_speculator", "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"], "method": "sum_lstm"}
LATENT = {"midlayer.hidden_norm.weight": (8,), "midlayer.self_attn.kv_a_proj_with_mqa.weight": (8, 8)}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (LSTM, {"speculator.forget_emb.0.weight": (8, 8)}, "an LSTM speculator"),
        ({"model_type": "mlp_speculator"}, {"forget_emb.0.weight": (8, 8)}, "an LSTM speculator"),
        (
            {"architectures": ["ArcticMLPSpeculatorPreTrainedModel"]},
            {"emb.0.weight": (8, 8)},
            "MLP speculator of Arctic",
        ),
        ({"model_type": "deepseek_v3"}, LATENT, r"multi-head latent attention \(MLA\)"),
        ({"model_type": "llama"}, {"fc.weight": (8, 8), "fc.weight_scale": (1,)}, "quantised weights .*FP8"),
    ],
)
def test_heads_of_another_network_are_named(
    config: dict[str, Any], tensors: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, folder / WEIGHTS)
    with pytest.raises(UsageError, match=message):
        convert(str(folder), str(VERIFIER), tmp_path / "ours")


def test_quantised_weights_are_rejected(published: Callable[[str], Path], tmp_path: Path) -> None:
    folder = published("eagle3/midlayer")
    fc = load_file(folder / WEIGHTS)["fc.weight"]
    change_tensors(folder, **{"fc.weight": fc.to(torch.float8_e4m3fn)})
    with pytest.raises(UsageError, match=r"quantised weights .fc.weight is torch.float8_e4m3fn"):
        convert(str(folder), str(VERIFIER), tmp_path / "ours")
    change_tensors(folder, **{"fc.weight": fc.to(torch.int8)})
    with pytest.raises(UsageError, match=r"fc\.weight is int8; quantised weights are not read"):
        convert(str(folder), str(VERIFIER), tmp_path / "ours")


@pytest.mark.parametrize(
    "weight_map", [{"fc.weight": 3}, {"fc.weight": "../model.safetensors"}, {"fc.weight": None}, [], {}]
)
def test_a_wrong_index_is_named(weight_map: Any, published: Callable[[str], Path], tmp_path: Path) -> None:
    folder = published("eagle/eagle")
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UsageError, match=r"model\.safetensors\.index\.json.*weight_map"):
        convert(str(folder), str(VERIFIER), tmp_path / "ours")


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run without the permissions of the superuser, who can read every file."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(own)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "."])
def test_an_unreadable_file_is_one_message(
    name: str, published: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory() as shared:  # pytest's own folders are private
        Path(shared).chmod(0o755)
        folder = published("eagle/speculators").rename(Path(shared) / "head")
        (folder / name).chmod(0)
        main(["generate", str(folder / "absent"), "--prompt", "hi"])  # modules may be unreadable later
        capsys.readouterr()
        with unprivileged():
            with pytest.raises(UsageError, match="cannot be read: Permission denied") as error:
                read_draft(str(folder))
            assert str(folder) in str(error.value)
            if name != WEIGHTS:
                assert main(["generate", str(folder), "--prompt", "hi"]) in (1, 2)
                shown = capsys.readouterr().err
                assert str(folder) in shown and "Permission denied" in shown and shown.count("\n") == 1
        folder.chmod(0o755)


def test_fit_starts_from_a_converted_draft(
    published: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published("eagle/eagle")
    in_bin(folder)
    assert main(["convert", str(folder), "--verifier", str(VERIFIER), "--output", str(tmp_path / "ours")]) == 0
    assert f"--model.init_from {tmp_path / 'ours'}" in capsys.readouterr().out
    rows = (VERIFIER.parent / "train.jsonl").read_text().splitlines()[:4]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    words = ["--algorithm", "eagle", "--verifier", str(VERIFIER), "--data.train", str(tmp_path / "rows.jsonl")]
    words += ["--model.init_from", str(tmp_path / "ours"), "--model.optimizer.lr", "1e-12", "--trainer.max_steps", "1"]
    words += ["--data.max_length", "256", "--output_dir", str(tmp_path / "runs"), "--data.cache_dir", str(tmp_path)]
    assert main(["fit", *words, "--data.validation_share", "0", "--trainer.enable_progress_bar", "false"]) == 0
    trained = SpeculatorModel.from_pretrained(tmp_path / "runs" / "version_0" / "draft").state_dict()
    before = SpeculatorModel.from_pretrained(tmp_path / "ours").state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(trained[name], tensor, atol=1e-6, rtol=1e-6)
