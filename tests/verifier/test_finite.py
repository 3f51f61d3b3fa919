"""A verifier with non-finite states: the tensor or dtype is named, never the family."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge.__main__ import main
from specforge.decoding.loop import Decoder
from specforge.errors import UsageError
from specforge.verifier.features import check_logits
from specforge.verifier.loading import VerifierLoading, load_verifier

DAMAGED = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def changed(tmp_path: Path, tiny_verifiers: Mapping[str, Any]) -> Callable[..., str]:
    """Return a function that stores a verifier with one tensor changed."""

    def store(name: str, change: Callable[[Tensor], Tensor]) -> str:
        source = tiny_verifiers["llama"].folder
        weights = load_file(source / "model.safetensors")
        weights[name] = change(weights[name])
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text((source / "config.json").read_text())
        return str(tmp_path)

    return store


def with_nan(tensor: Tensor, row: int = 1) -> Tensor:
    return tensor.index_fill(0, torch.tensor(row), torch.nan)


def refusal(folder: str, dtype: Any = "float32") -> str:
    """Return the error of loading a verifier for training or decoding."""
    with pytest.raises(UsageError) as refused:
        check_logits(load_verifier(folder, VerifierLoading(dtype=dtype)))
    assert str(refused.value).startswith(f"verifier {folder}: ") and "family" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", [DAMAGED, "model.norm.weight", "lm_head.weight"])
def test_a_damaged_tensor_is_named(changed: Callable[..., str], name: str) -> None:
    assert f"its tensor {name} holds NaN or infinite values" in refusal(changed(name, with_nan))


def test_an_overflowing_dtype_is_named_with_wider_ones(changed: Callable[..., str]) -> None:
    folder = changed("model.layers.2.mlp.down_proj.weight", lambda tensor: tensor * 3e4)
    message = refusal(folder, "float16")
    assert "its states are not finite in float16" in message and "verifier_dtype to bfloat16 or float32" in message
    check_logits(load_verifier(folder, VerifierLoading(dtype="float32")))


def test_a_weight_outside_the_range_of_the_dtype_is_named(changed: Callable[..., str]) -> None:
    folder = changed(DAMAGED, lambda tensor: tensor + 1e5)
    assert f"its tensor {DAMAGED} is not finite in float16" in refusal(folder, "float16")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_non_finite_states_in_training_end_it_naming_the_tensor(
    changed: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    """The advice is not to lower the learning rate."""
    folder = changed("model.embed_tokens.weight", lambda tensor: with_nan(tensor, 50))
    rows = {name: tmp_path / f"{name}.jsonl" for name in ("train", "validation")}
    for name, path in rows.items():
        token = 50 if name == split else 51
        path.write_text(json.dumps({"input_ids": [5, token, 6, 7, 8, 9], "loss_mask": [0, 0, 1, 1, 1, 1]}))
    trainer = ["--trainer.accelerator=cpu", "--trainer.max_steps=1", "--trainer.enable_progress_bar=false"]
    data = [f"--data.{name}={path}" for name, path in rows.items()]
    words = ["--algorithm=mlp", f"--verifier={folder}", f"--output_dir={tmp_path / 'runs'}", *trainer, *data]
    assert main(["fit", *words, f"--data.cache_dir={tmp_path / 'cache'}"]) == 2
    error = capsys.readouterr().err
    assert f"verifier {folder}: its tensor model.embed_tokens.weight" in error and "optimizer.lr" not in error


def test_non_finite_states_in_decoding_end_it_naming_the_tensor(changed: Callable[..., str]) -> None:
    verifier = load_verifier(changed("model.embed_tokens.weight", lambda tensor: with_nan(tensor, 50)))
    assert sum(len(emission.tokens) for emission in Decoder(verifier).decode([torch.tensor([5, 6])], 2)) == 2
    with pytest.raises(UsageError, match=r"its tensor model\.embed_tokens\.weight"):
        list(Decoder(verifier).decode([torch.tensor([5, 50, 6])], 2))
