"""Processes with different numbers of supervised tokens, or none, give the results of one process on the same rows."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from launching import by_torchrun
from small_runs import SmallRuns, assert_close, logged

from specforge.__main__ import main

PROCESSES = 4
RUNS = {"eagle3": "ddp", "hass": "fsdp2"}
# Supervised tokens of the rows: a draft starts after the first one, so 1 leaves nothing to train on.
TRAINING = [1, 1, 1, 20, 1, 5, 1, 33]
VALIDATION = [1, 1, 24, 1, 1, 9]


def row(draw: random.Random, supervised: int) -> tuple[list[int], list[int]]:
    """Make a row of random tokens that ends in a number of supervised ones."""
    prompt = draw.randint(2, 9)
    return [draw.randrange(3, 61) for _ in range(prompt + supervised)], [0] * prompt + [1] * supervised


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_verifiers: Mapping[str, Any]) -> SmallRuns:
    """Runs of one process with batches of 4, and of four processes with batches of 1."""
    trainer = {"accelerator": "cpu", "max_steps": 6, "max_epochs": 9, "log_every_n_steps": 1}
    values = {
        "trainer": {**trainer, "enable_progress_bar": False},
        "data": {"packing": False, "batch_size": PROCESSES, "max_length": 64},
    }
    made = SmallRuns(tmp_path_factory.mktemp("uneven"), tiny_verifiers["qwen3"].folder, values)
    draw = random.Random(1)
    made.write("train", [row(draw, supervised) for supervised in TRAINING])
    made.write("validation", [row(draw, supervised) for supervised in VALIDATION])
    for algorithm in RUNS:
        assert main(made.words(f"{algorithm}-one", algorithm)) == 0
    spread = ["--trainer.num_nodes=2", "--trainer.devices=2", "--data.batch_size=1"]
    by_torchrun(
        2,
        PROCESSES // 2,
        [
            ("run", made.words(f"{algorithm}-many", algorithm, f"--trainer.strategy={strategy}", *spread))
            for algorithm, strategy in RUNS.items()
        ],
    )
    return made


@pytest.mark.parametrize("algorithm", RUNS)
def test_all_figures_equal_those_of_one_process(runs: SmallRuns, algorithm: str) -> None:
    expected, found = (logged(runs.run(f"{algorithm}-{name}")) for name in ("one", "many"))
    assert found.keys() == expected.keys() and len(expected["train/loss"]) == 6
    for tag, figures in expected.items():
        assert found[tag] == pytest.approx(figures, rel=2e-5, abs=1e-6), tag
    assert_close(runs.last(f"{algorithm}-one"), runs.last(f"{algorithm}-many"), rtol=1e-4, atol=5e-5)
