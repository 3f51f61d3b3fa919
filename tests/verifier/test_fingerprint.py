"""The fingerprint of a verifier: equal for equal states, different for anything that changes them."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge.config import verifier_difference
from specforge.errors import UsageError
from specforge.verifier.fingerprint import fingerprint
from specforge.verifier.loading import load_verifier


@pytest.fixture
def copy(tiny_verifiers, tmp_path):
    shutil.copytree(tiny_verifiers["llama"].folder, tmp_path / "copy")
    return tmp_path / "copy"


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def change_weights(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: change(name, weight) for name, weight in weights.items()}, folder / "model.safetensors")


class TestEqual:
    def test_for_any_folder(self, tiny_verifiers, copy):
        assert fingerprint(str(copy)) == fingerprint(str(tiny_verifiers["llama"].folder))

    def test_for_any_split_of_the_weights(self, tiny_verifiers, copy):
        tiny_verifiers["llama"].model.save_pretrained(copy.parent / "sharded", max_shard_size="6KB")
        assert len(list((copy.parent / "sharded").glob("*.safetensors"))) > 2
        assert fingerprint(str(copy.parent / "sharded")) == fingerprint(str(copy))

    def test_for_a_loaded_verifier_saved_again(self, copy):
        load_verifier(str(copy)).save_pretrained(copy.parent / "again")
        assert fingerprint(str(copy.parent / "again")) == fingerprint(str(copy))

    def test_for_weights_in_bin_files_whole_or_split(self, copy):
        before = fingerprint(str(copy))
        weights = load_file(copy / "model.safetensors")
        (copy / "model.safetensors").unlink()
        torch.save(weights, copy / "pytorch_model.bin")
        assert fingerprint(str(copy)) == before
        (copy / "pytorch_model.bin").unlink()
        halves = {"a.bin": list(weights)[::2], "b.bin": list(weights)[1::2]}
        for name, kept in halves.items():
            torch.save({key: weights[key] for key in kept}, copy / name)
        index = {"weight_map": {key: name for name, kept in halves.items() for key in kept}}
        (copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert fingerprint(str(copy)) == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda config: config.update(_name_or_path="/elsewhere", transformers_version="5.0.0", architectures=["X"]),
            lambda config: config.update(use_cache=False, eos_token_id=5, initializer_range=0.5, attention_dropout=0.1),
            lambda config: config.update(rope_theta=config.pop("rope_parameters")["rope_theta"]),
            lambda config: config.update(torch_dtype=config.pop("dtype")),
            lambda config: config["rope_parameters"].update(rope_theta=10000),
            lambda config: config.pop("hidden_act"),
            lambda config: [config.update({name: config.pop(name)}) for name in sorted(config)],
        ],
        ids=["names", "no computation", "older form", "older name", "whole number", "default left out", "order"],
    )
    def test_for_configurations_of_the_same_computation(self, copy, change):
        before = fingerprint(str(copy))
        change_config(copy, change)
        assert fingerprint(str(copy)) == before


class TestDifferent:
    def test_for_any_two_verifiers(self, tiny_verifiers):
        by_name = {name: fingerprint(str(verifier.folder)) for name, verifier in tiny_verifiers.items()}
        assert len(set(by_name.values())) == len(tiny_verifiers)

    @pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "model.norm.weight"])
    def test_after_a_little_training_of_one_tensor(self, copy, name):
        before = fingerprint(str(copy))
        change_weights(copy, lambda other, weight: weight + 1e-3 if other == name else weight)
        assert verifier_difference(before, fingerprint(str(copy))) == "different weights"

    def test_after_training_of_any_row_of_a_small_verifier(self, copy):
        seen = {fingerprint(str(copy))}
        for row in range(1, 24, 5):

            def change(name: str, weight: torch.Tensor, row: int = row) -> torch.Tensor:
                return weight.index_add(0, torch.tensor([row]), weight[:1]) if "layers.5.mlp.gate" in name else weight

            change_weights(copy, change)
            seen.add(fingerprint(str(copy)))
        assert len(seen) == 6

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
    def test_for_another_precision_and_quantised_tensors(self, copy, dtype):
        before = fingerprint(str(copy))
        change_weights(copy, lambda name, weight: weight.to(dtype) if weight.ndim > 1 else weight)
        assert fingerprint(str(copy)) != before

    @pytest.mark.parametrize(
        "change",
        [
            lambda config: config["rope_parameters"].update(rope_theta=1e6),
            lambda config: config["rope_parameters"].update(rope_type="yarn", factor=4.0),
            lambda config: config["rope_parameters"].update(partial_rotary_factor=0.5),
            lambda config: config.update(rms_norm_eps=1e-5),
            lambda config: config.update(hidden_act="gelu"),
            lambda config: config.update(dtype="bfloat16"),
            lambda config: config.update(quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]}),
        ],
        ids=["theta", "yarn", "part of the head", "eps", "activation", "dtype", "quantisation"],
    )
    def test_for_another_computation(self, copy, change):
        before = fingerprint(str(copy))
        change_config(copy, change)
        assert verifier_difference(before, fingerprint(str(copy))) == "a different computation in config.json"

    @pytest.mark.parametrize(
        ("field", "value"), [("sliding_window", 5), ("sliding_window", None), ("final_logit_softcapping", 4.0)]
    )
    def test_for_another_window_or_soft_cap(self, tiny_verifiers, tmp_path, field, value):
        shutil.copytree(tiny_verifiers["gemma2"].folder, tmp_path / "copy")
        before = fingerprint(str(tmp_path / "copy"))
        change_config(tmp_path / "copy", lambda config: config.update({field: value}))
        assert fingerprint(str(tmp_path / "copy")) != before

    def test_for_another_text_part_of_a_multimodal_verifier(self, tiny_verifiers, tmp_path):
        shutil.copytree(tiny_verifiers["gemma3-images"].folder, tmp_path / "copy")
        before = fingerprint(str(tmp_path / "copy"))
        change_config(tmp_path / "copy", lambda config: config["text_config"].update(sliding_window=3))
        assert fingerprint(str(tmp_path / "copy")) != before

    def test_those_of_earlier_versions_are_recognised(self):
        assert "earlier version" in verifier_difference("84cc7e1198794151", "1708f55b9e7bd782-ea5d1812")


def sparse_verifier(folder: Path, config: Path, rows: int, columns: int = 4096) -> Path:
    """Make a verifier with one tensor of zeros in a sparse file."""
    folder.mkdir()
    shutil.copy(config, folder / "config.json")
    size = rows * columns * 2
    header = json.dumps({"w": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    return folder


class TestLarge:
    def test_little_of_16_gigabytes_is_read(self, copy, tmp_path):
        folder = sparse_verifier(tmp_path / "large", copy / "config.json", rows=2**21)
        assert (folder / "model.safetensors").stat().st_size > 16e9
        before = resource.getrusage(resource.RUSAGE_SELF)
        first = fingerprint(str(folder))
        after = resource.getrusage(resource.RUSAGE_SELF)
        pages = after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt
        assert pages * os.sysconf("SC_PAGE_SIZE") < 16e9 / 50
        assert fingerprint(str(folder)) == first

    def test_a_change_in_any_band_of_rows_or_columns_is_detected(self, copy, tmp_path):
        folder = sparse_verifier(tmp_path / "large", copy / "config.json", rows=2**12)
        path, seen = folder / "model.safetensors", {fingerprint(str(folder))}
        begin = path.stat().st_size - 2**25
        row = 4096 * 2
        # A band of columns in every row, or a band of rows.
        bands = [[(begin + number * row + column, 512) for number in range(2**12)] for column in (0, 3000, 7680)]
        bands += [[(begin + number * row, row * 300)] for number in (0, 2000, 3796)]
        for band in bands:
            content = bytearray(path.read_bytes())
            for at, size in band:
                content[at : at + size] = b"\1" * size
            path.with_name("other").write_bytes(content)
            original = path.read_bytes()
            path.write_bytes(content)
            seen.add(fingerprint(str(folder)))
            path.write_bytes(original)
        assert len(seen) == 1 + len(bands)


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: b"nothing",
        lambda content: b"",
        lambda content: content[:-100],
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content.replace(b"data_offsets", b"data_offsetz", 1),
    ],
)
def test_a_damaged_file_is_named(copy, harm):
    path = copy / "model.safetensors"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UsageError, match=r"model.safetensors is damaged"):
        fingerprint(str(copy))


def test_a_damaged_bin_file_is_named(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"pytorch_model.bin is damaged"):
        fingerprint(str(copy))


def test_missing_weights_are_named(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"holds no model.safetensors"):
        fingerprint(str(copy))
