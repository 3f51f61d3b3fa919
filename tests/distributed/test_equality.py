"""A run is the same for any number of processes: losses, metrics, weights and checkpoints."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from launching import Task, by_srun
from small_runs import ALGORITHMS, SmallRuns, assert_close, logged, weights

from specforge.__main__ import main
from specforge.models import SpeculatorModel
from specforge.models.scaled_linear import folded

STEPS = 16
# Split sums are rounded differently, and AdamW takes a full step for any size of gradient.
SAME_FIGURES = {"rel": 2e-5, "abs": 1e-6}
SAME_WEIGHTS = {"rtol": 1e-4, "atol": 5e-5}
# An objective that reads no mean over the batch.
KL = ["--model.objective={kl: 1.0}"]
SPREADS = ("ddp", "fsdp2")
"""For two processes with batches of 1; one process has batches of 2."""


def task(runs: SmallRuns, name: str, algorithm: str, strategy: str, *more: str) -> Task:
    """Return the task of a run of two processes, one on each of two nodes."""
    spread = ["--trainer.num_nodes=2", "--trainer.devices=1", f"--trainer.strategy={strategy}", "--data.batch_size=1"]
    return "run", runs.words(name, algorithm, *spread, *more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_verifiers: Mapping[str, Any]) -> SmallRuns:
    """All runs: two processes run theirs in sequence, because starting processes takes longest."""
    draw = random.Random(0)
    trainer = {"accelerator": "cpu", "max_steps": STEPS, "max_epochs": 9, "log_every_n_steps": 1}
    trainer |= {"gradient_clip_val": 1.0, "enable_progress_bar": False, "check_val_every_n_epoch": 1}
    values = {"trainer": trainer, "data": {"max_length": 48, "batch_size": 2}}
    made = SmallRuns(tmp_path_factory.mktemp("equality"), tiny_verifiers["llama"].folder, values)
    for split, number in (("train", 24), ("validation", 5)):
        lengths = [draw.randint(8, 40) for _ in range(number)]
        made.write(
            split,
            [([draw.randrange(3, 61) for _ in range(length)], [0] * 3 + [1] * (length - 3)) for length in lengths],
        )
    few, half = "--trainer.max_steps=4", f"--trainer.max_steps={STEPS // 2}"
    muon, by_value = "--model.optimizer.name=muon", "--trainer.gradient_clip_algorithm=value"
    bf16 = "--trainer.precision=bf16-mixed"
    # 24 rows: optimizer steps of 10, 10 and 4 of them.
    # Scaled features leave some gradients so small that AdamW turns their rounding into steps.
    raw = [*KL, "--model.draft.feature_scale=none"]
    by_ten, by_five = ["--data.batch_size=10", *raw], ["--trainer.accumulate_grad_batches=5", *raw]
    for algorithm in ALGORITHMS:
        assert main(made.words(f"{algorithm}-one", algorithm)) == 0
    assert main(made.words("half-one", "eagle3", half)) == 0
    assert main(made.words("muon-one", "eagle3", few, muon)) == 0
    assert main(made.words("by-value-one", "eagle3", few, by_value)) == 0
    assert main(made.words("by-ten-one", "eagle3", few, *by_ten)) == 0
    # Steps that log nothing to a file.
    _, counted = task(made, "counted", "eagle3", "ddp", "--trainer.max_steps=6", *KL, "--trainer.log_every_n_steps=50")
    by_srun(
        2,
        [
            *(task(made, f"{name}-{spread}", name, spread) for name in ALGORITHMS for spread in SPREADS),
            *(task(made, f"by-ten-{spread}", "eagle3", spread, few, *by_five) for spread in SPREADS),
            *(task(made, f"bf16-{spread}", "eagle3", spread, few, bf16) for spread in SPREADS),
            task(made, "sharded-verifier", "eagle3", "ddp", few, "--verifier_sharding=true"),
            task(made, "muon-fsdp2", "eagle3", "fsdp2", few, muon),
            task(made, "by-value-fsdp2", "eagle3", "fsdp2", few, by_value),
            task(made, "half-fsdp2", "eagle3", "fsdp2", half),
            task(made, "resumed-by-fsdp2", "eagle3", "fsdp2", f"--ckpt_path={made.last('half-one')}"),
            ("run_with_one_reduction", counted),
            ("captures_the_same", {name: str(verifier.folder) for name, verifier in tiny_verifiers.items()}),
        ],
    )
    assert main(made.words("resumed-by-one", "eagle3", f"--ckpt_path={made.last('half-fsdp2')}")) == 0
    return made


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_losses_metrics_and_weights_are_those_of_one_process(runs: SmallRuns, algorithm: str, spread: str) -> None:
    expected, found = (logged(runs.run(f"{algorithm}-{name}")) for name in ("one", spread))
    assert len(expected["train/loss"]) == STEPS and expected["val/acceptance_length_proxy"]
    assert found.keys() == expected.keys()
    for tag, figures in expected.items():
        assert found[tag] == pytest.approx(figures, **SAME_FIGURES), tag
    assert expected["val/loss"][-1] < expected["val/loss"][0] - 1e-3
    assert_close(runs.last(f"{algorithm}-one"), runs.last(f"{algorithm}-{spread}"), **SAME_WEIGHTS)


@pytest.mark.parametrize(("name", "like"), [("eagle-ddp", "best"), ("eagle3-fsdp2", "best"), ("muon-fsdp2", "last")])
def test_the_draft_is_written_unsharded_and_once(runs: SmallRuns, name: str, like: str) -> None:
    """Without validation it is the last draft, which is sharded until then."""
    run = runs.run(name)
    assert sorted(path.name for path in (run / "draft").iterdir()) == ["config.json", "model.safetensors"]
    assert (run / "checkpoints" / "best.ckpt").exists() == (like == "best")
    trained = folded(weights(run / "checkpoints" / f"{like}.ckpt"))
    draft = SpeculatorModel.from_pretrained(run / "draft").state_dict()
    assert {f"draft.{key}" for key in draft} == trained.keys()
    assert all(torch.equal(tensor, trained[f"draft.{name}"]) for name, tensor in draft.items())


@pytest.mark.parametrize("spread", SPREADS)
def test_mixed_precision_stays_close_with_masters_in_float32(runs: SmallRuns, spread: str) -> None:
    full, mixed = logged(runs.run("eagle3-one"))["train/loss"][:4], logged(runs.run(f"bf16-{spread}"))["train/loss"]
    assert mixed == pytest.approx(full, rel=0.03) and mixed != pytest.approx(full, rel=1e-6)
    stored = torch.load(runs.last(f"bf16-{spread}"), weights_only=True)
    states = [value for of_one in stored["optimizer_states"][0]["state"].values() for value in of_one.values()]
    assert {state.dtype for state in states} == {torch.float32}
    assert {tensor.dtype for tensor in stored["state_dict"].values() if tensor.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("spread", SPREADS)
def test_accumulated_batches_of_two_processes_are_one_large_batch(runs: SmallRuns, spread: str) -> None:
    """With uneven numbers of supervised tokens, and a shorter window at the end of the epoch."""
    expected, found = (logged(runs.run(f"by-ten-{name}")) for name in ("one", spread))
    assert len(expected["train/loss"]) == 4 and found.keys() == expected.keys()
    for tag, figures in expected.items():
        assert found[tag] == pytest.approx(figures, **SAME_FIGURES), tag
    assert_close(runs.last("by-ten-one"), runs.last(f"by-ten-{spread}"), **SAME_WEIGHTS)


def test_a_sharded_verifier_trains_the_same_draft(runs: SmallRuns) -> None:
    """Nothing of it is trained or saved; the processes compare its states."""
    unsharded = logged(runs.run("eagle3-ddp"))["train/loss"][:4]
    assert logged(runs.run("sharded-verifier"))["train/loss"] == unsharded
    assert weights(runs.last("sharded-verifier")).keys() == weights(runs.last("eagle3-one")).keys()


def test_muon_sees_complete_matrices(runs: SmallRuns) -> None:
    """It iterates in bfloat16, so the rounding of sums shows."""
    assert_close(runs.last("muon-one"), runs.last("muon-fsdp2"), rtol=0, atol=1e-3)


def test_gradients_are_clipped_by_value(runs: SmallRuns) -> None:
    assert_close(runs.last("by-value-one"), runs.last("by-value-fsdp2"), **SAME_WEIGHTS)


@pytest.mark.parametrize("name", ["resumed-by-one", "resumed-by-fsdp2"])
def test_a_checkpoint_is_resumed_with_another_number_of_processes(runs: SmallRuns, name: str) -> None:
    assert_close(runs.last("eagle3-one"), runs.last(name), **SAME_WEIGHTS)
