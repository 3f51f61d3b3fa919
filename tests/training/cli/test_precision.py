"""Precisions that train a draft correctly: gradients, metrics, recomputed steps, means of optimizer steps."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from small_runs import ALGORITHMS, SmallRuns, logged
from torch import Tensor, nn
from torch.optim import Optimizer

from specforge.__main__ import main
from specforge.decoding.replay import AcceptanceLength
from specforge.errors import UsageError
from specforge.hookspecs import Algorithm
from specforge.models import SpeculatorModel
from specforge.registry import installed
from specforge.training.cli.command_line import TrainingCLI
from specforge.training.cli.precision import check_precision
from specforge.training.metrics import StepMeans

# Rounding error of the dtype over some layers, relative to a gradient's norm.
CLOSE = {"32-true": 1e-5, "bf16-mixed": 0.15}
NO_VALIDATION = "--trainer.limit_val_batches=0"
# An objective that reads no mean over the batch, and one stage.
PLAIN = {"eagle3": ['--model.objective={"kl": 1.0}'], "mlp": ["--model.stage_two=null"]}

Gradients = list[dict[str, Tensor]]


class KeepGradients(Callback):
    """Records the gradients of each optimizer step."""

    def __init__(self) -> None:
        self.steps: Gradients = []

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        parameters = module.draft.named_parameters()
        self.steps.append(
            {name: parameter.grad.double() for name, parameter in parameters if parameter.grad is not None}
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_verifiers: Mapping[str, Any]) -> SmallRuns:
    """Ten rows of different length, in steps of 4, 4 and 2."""
    draw = random.Random(0)
    trainer = {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, "enable_progress_bar": False}
    values = {"trainer": trainer, "data": {"max_length": 48, "batch_size": 4, "packing": False}}
    made = SmallRuns(tmp_path_factory.mktemp("precision"), tiny_verifiers["llama"].folder, values)
    for split, number in (("train", 10), ("validation", 2)):
        lengths = [draw.randint(8, 40) for _ in range(number)]
        made.write(
            split,
            [([draw.randrange(3, 61) for _ in range(length)], [0] * 3 + [1] * (length - 3)) for length in lengths],
        )
    return made


@pytest.fixture(scope="module")
def fit(runs: SmallRuns) -> Callable[..., Gradients]:
    """Return a function that trains, and returns the gradients of each step."""

    def train(name: str, algorithm: str, *more: str) -> Gradients:
        words = runs.words(name, algorithm, *PLAIN.get(algorithm, []), *more)
        cli = TrainingCLI(installed().find(Algorithm, ALGORITHMS[algorithm]["algorithm"]), words[1:], "fit")
        gradients = KeepGradients()
        cli.trainer.callbacks.append(gradients)
        cli.run()
        return gradients.steps

    return train


def worst(found: Gradients, expected: Gradients) -> float:
    """Return the largest relative error of a tensor's gradient."""
    assert len(found) == len(expected) == 3 and all(
        gradients.keys() == expected[0].keys() for gradients in (*found, *expected)
    )
    return max(
        float((ours[name] - other[name]).norm() / other[name].norm())
        for ours, other in zip(found, expected, strict=True)
        for name in other
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_of_each_precision(runs: SmallRuns, fit: Callable[..., Gradients], algorithm: str) -> None:
    """From the same weights, equal to those of 64-true up to the rounding of the dtype; losses and metrics too."""
    fit(f"{algorithm}-first", algorithm, NO_VALIDATION)
    start = f"--model.init_from={runs.run(f'{algorithm}-first') / 'draft'}"
    exact = fit(f"{algorithm}-64", algorithm, start, "--trainer.precision=64-true")
    expected = logged(runs.run(f"{algorithm}-64"))
    for precision, tolerance in CLOSE.items():
        name = f"{algorithm}-{precision}"
        assert worst(fit(name, algorithm, start, f"--trainer.precision={precision}"), exact) < tolerance
        found = logged(runs.run(name))
        assert found["train/loss"] == pytest.approx(expected["train/loss"], rel=tolerance / 10)
        assert found["val/loss"] == pytest.approx(expected["val/loss"], rel=tolerance / 10)
        assert SpeculatorModel.from_pretrained(runs.run(name) / "draft").dtype == torch.float32
    assert SpeculatorModel.from_pretrained(runs.run(f"{algorithm}-64") / "draft").dtype == torch.float64


@pytest.mark.parametrize(("algorithm", "denominator"), [*((name, "valid") for name in ALGORITHMS), ("eagle3", "all")])
def test_accumulated_batches_are_one_large_batch(
    runs: SmallRuns, fit: Callable[..., Gradients], algorithm: str, denominator: str
) -> None:
    """With uneven numbers of supervised tokens, and a shorter step at the end of the epoch."""
    large, small = f"{algorithm}-large-{denominator}", f"{algorithm}-small-{denominator}"
    words = [NO_VALIDATION, f"--model.denominator={denominator}"]
    expected = fit(large, algorithm, *words)
    found = fit(small, algorithm, *words, "--data.batch_size=1", "--trainer.accumulate_grad_batches=4")
    assert worst(found, expected) < 1e-5
    of_large, of_small = logged(runs.run(large)), logged(runs.run(small))
    assert len(of_large["train/loss"]) == 3 and of_small.keys() == of_large.keys()
    for tag, figures in of_large.items():
        assert of_small[tag] == pytest.approx(figures, rel=1e-5, abs=1e-6), tag


def test_recomputed_steps_draw_the_same_random_numbers(
    fit: Callable[..., Gradients], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer with dropout has the same gradients if its activations are kept or recomputed."""
    from specforge_eagle3.module import Eagle3Module

    build = Eagle3Module.build_draft

    def with_dropout(self: Eagle3Module, *inputs: Any) -> Any:
        draft = build(self, *inputs)
        draft.layers[0].mlp = nn.Sequential(draft.layers[0].mlp, nn.Dropout(0.5))
        return draft

    monkeypatch.setattr(Eagle3Module, "build_draft", with_dropout)
    kept = fit("dropout", "eagle3", NO_VALIDATION)
    assert worst(fit("recomputed", "eagle3", NO_VALIDATION, "--model.activation_checkpointing=true"), kept) < 1e-5


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "16-mixed", "16", "transformer-engine"])
def test_other_precisions_are_refused_with_the_alternatives(
    runs: SmallRuns, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, more in (("fit", []), ("estimate", ["--tokens=1000"])):
        words = runs.words("refused", "eagle3", f"--trainer.precision={precision}", *more)
        assert main([command, *words[1:]]) == 2
        error = capsys.readouterr().err
        assert f"trainer.precision: {precision} cannot train drafts" in error and "Set bf16-mixed" in error
    assert not (runs.folder / "refused").exists()


def test_a_plugin_of_the_trainer_cannot_set_them_either(
    runs: SmallRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"precision": "16-mixed", "device": "cpu"}
    plugin = {"class_path": "lightning.pytorch.plugins.MixedPrecision", "init_args": settings}
    (tmp_path / "plugin.json").write_text(json.dumps({"trainer": {"plugins": [plugin]}}))
    assert main([*runs.words("refused", "eagle3"), "--config", str(tmp_path / "plugin.json")]) == 2
    assert "16-mixed cannot train drafts" in capsys.readouterr().err


@pytest.mark.parametrize("given", [None, 32, "32", 64, "64", "bf16", "32-true", "64-true", "bf16-mixed"])
def test_other_spellings_of_the_right_ones_are_read(given: Any) -> None:
    check_precision(given)
    with pytest.raises(UsageError):
        check_precision(16)


def test_metrics_keep_their_dtype_if_the_module_is_cast() -> None:
    """A mean over 600 batches would be rounded to two digits in bfloat16."""
    module = nn.Module()
    module.means, module.length = StepMeans(("kl",), 2), AcceptanceLength(2)
    acceptance, reachable = torch.full((2, 1, 9), 0.7), torch.ones(1, 9, dtype=torch.bool)
    module.length.update(acceptance, reachable)
    expected = module.length.compute()
    for cast in (lambda: module.to(torch.bfloat16), module.half, module.bfloat16, lambda: module.to(torch.float32)):
        cast()
        for _ in range(150):
            module.length.update(acceptance, reachable)
        module.means.reset()
        states = (module.means.sums, module.means.counts, module.length.tokens, module.length.rounds)
        assert {state.dtype for state in states} == {torch.float64}
    assert module.length.compute()[2] == pytest.approx(expected[2], rel=1e-9)
    assert module.to("meta").length.rounds.is_meta
