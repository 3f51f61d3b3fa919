"""Drafts trained on scaled features: the scale, the written draft, and what must not change."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quickstart_runs import VERIFIER, Workshop
from safetensors.torch import load_file
from training_runs import assert_same_weights

from specforge import SpeculatorModel
from specforge.__main__ import main
from specforge.models.scaled_linear import folded

NONE = "--model.draft.feature_scale=none"
SHORT = ("--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--trainer.logger=false")


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """The state of a run's last checkpoint, with its scale."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def scale_of(run: Path) -> torch.Tensor:
    """The constant of each aux layer in a run's last checkpoint, [n]."""
    by_channel = state_of(run)["draft.fc.input_scale"].view(3, -1)
    assert torch.equal(by_channel, by_channel[:, :1].expand_as(by_channel))
    return by_channel[:, 0]


def test_the_draft_that_is_written_is_the_published_network(
    fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit("runs", *SHORT)
    shown = capsys.readouterr().out
    found = re.search(r"they are divided by ([\d.]+), ([\d.]+), ([\d.]+)", shown)
    assert found is not None and "its first layer adds" in shown
    scale = scale_of(run)
    assert [float(group) for group in found.groups()] == pytest.approx(scale.tolist(), rel=1e-2)
    # Root mean squares of the states before layers 2, 4 and 5 are 22 to 30 here; their sum has the size of one of them.
    assert all(20 * 3**0.5 * 0.8 < factor < 30 * 3**0.5 * 1.2 for factor in scale.tolist())
    stored = load_file(run / "draft" / "model.safetensors")
    trained = {name.removeprefix("draft."): tensor for name, tensor in state_of(run).items()}
    assert "fc.input_scale" not in stored
    assert_same_weights(stored, folded(trained))
    torch.testing.assert_close(stored["fc.weight"] * trained["fc.input_scale"], trained["fc.weight"])


def test_the_scale_does_not_depend_on_how_rows_are_batched(fit: Callable[..., Path]) -> None:
    scales = [
        scale_of(fit(f"runs-{size}-{number}", *SHORT, f"--data.batch_size={size}", f"--trainer.{key}={number}"))
        for size, key, number in ((2, "accumulate_grad_batches", 1), (1, "accumulate_grad_batches", 2))
    ]
    torch.testing.assert_close(*scales)


def test_numbers_are_used_unchanged(fit: Callable[..., Path]) -> None:
    run = fit("runs", *SHORT, "--model.draft.feature_scale=[10,20,40]")
    assert scale_of(run).tolist() == [10, 20, 40]


def test_without_a_scale_nothing_is_divided(fit: Callable[..., Path]) -> None:
    assert "draft.fc.input_scale" not in state_of(fit("runs", *SHORT, NONE))


@pytest.mark.parametrize("norm", ["norm_before_fc", "fc_norm"])
def test_features_that_are_normalised_need_no_scale(norm: str, fit: Callable[..., Path]) -> None:
    run = fit("runs", *SHORT, f"--model.draft.{norm}=true")
    assert "draft.fc.input_scale" not in state_of(run)


def test_training_starts_from_a_stored_draft_unchanged(fit: Callable[..., Path]) -> None:
    start = fit("start", *SHORT, NONE) / "draft"
    # At a learning rate of almost 0, the first step shows what the loaded draft computes.
    still = ("--model.optimizer.lr=1e-12", f"--model.init_from={start}", *SHORT)
    run = fit("on", *still)
    assert min(scale_of(run).tolist()) > 10
    before, after = (load_file(folder / "model.safetensors") for folder in (start, run / "draft"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_of_raw_features_is_not_resumed_with_scaled_ones(
    fit: Callable[..., Path], workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit("runs", *SHORT, NONE)
    last = run / "checkpoints" / "last.ckpt"
    assert main(["fit", *workshop.words("runs", "--trainer.max_steps=3", f"--ckpt_path={last}")]) == 2
    assert "fc.input_scale is None there and [192] here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "[1,2]",
            r"model\.draft\.feature_scale has 2 numbers; give one for each of layer 2, layer 4, layer 5",
        ),
        ("[1,2,-3]", "greater than 0"),
        ("[1,2,nan]", "feature_scale"),
        ("[]", r"has 0 numbers"),
        ("some", "feature_scale"),
        ("null", "feature_scale"),
    ],
)
def test_an_invalid_scale_is_refused(
    value: str, message: str, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *workshop.words("runs", f"--model.draft.feature_scale={value}")]) == 2
    shown = capsys.readouterr().err
    assert re.search(message, shown) and shown.count("\n") == 1


def test_numbers_and_a_norm_contradict_each_other(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model.draft.feature_scale=[1,2,3]", "--model.draft.fc_norm=true")
    assert main(["fit", *workshop.words("runs", *flags)]) == 2
    assert "feature_scale has no effect if" in capsys.readouterr().err


def test_evaluation_and_export_are_not_affected(fit: Callable[..., Path], tmp_path: Path) -> None:
    run = fit("runs", *SHORT)
    draft = SpeculatorModel.from_pretrained(run / "draft", verifier=str(VERIFIER))
    assert type(draft.fc) is torch.nn.Linear
    for name in ("sglang", "vllm"):
        folder = tmp_path / name
        assert main(["export", str(run), "--format", name, "--output", str(folder)]) == 0
        assert main(["verify", str(folder)]) == 0


def eagle(workshop: Workshop) -> Workshop:
    workshop.values["algorithm"] = "eagle"
    workshop.values["model"] = {"alignment_steps": 2, "optimizer": {"lr": 4e-3}}
    return workshop


@pytest.mark.parametrize("layernorms", [False, True])
def test_eagle_1_is_written_as_the_published_network(
    layernorms: bool, workshop: Workshop, fit: Callable[..., Path]
) -> None:
    eagle(workshop)
    run = fit("runs", *SHORT, f"--model.draft.layernorms={layernorms}")
    trained = {name.removeprefix("draft."): tensor for name, tensor in state_of(run).items()}
    embedding, feature = trained["fusion_fc.input_scale"].view(2, -1)[:, 0].tolist()
    # Here the root mean square of embeddings is 0.22, that of features 1.95.
    assert embedding == pytest.approx(2**0.5 if layernorms else 0.22 * 2**0.5, rel=0.2)
    assert feature == pytest.approx(1.95 * 2**0.5, rel=0.2)
    stored = load_file(run / "draft" / "model.safetensors")
    assert "fusion_fc.input_scale" not in stored
    assert_same_weights(stored, folded(trained))


def test_eagle_1_starts_from_a_stored_draft_unchanged(workshop: Workshop, fit: Callable[..., Path]) -> None:
    eagle(workshop)
    start = fit("start", *SHORT, NONE) / "draft"
    run = fit("on", "--model.optimizer.lr=1e-12", f"--model.init_from={start}", *SHORT)
    before, after = (load_file(folder / "model.safetensors") for folder in (start, run / "draft"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-7)
