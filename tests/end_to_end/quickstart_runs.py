"""Small training runs of the quickstart's verifier: their data and their configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_runs import RunsFolder, write_rows

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"
VERIFIER = QUICKSTART / "verifier"
TTT_STEPS = 3
# Weights grow by 1e12 a step.
DIVERGING = ("--model.optimizer.lr=1000", "--model.optimizer.weight_decay=1e9", "--trainer.max_steps=9")


def rows(name: str, number: int) -> list[dict[str, Any]]:
    """Return the first rows of a file of the quickstart."""
    with (QUICKSTART / name).open(encoding="utf-8") as file:
        return [json.loads(next(file)) for _ in range(number)]


@dataclass
class Workshop(RunsFolder):
    """Runs on the quickstart's verifier and some of its rows."""

    def __post_init__(self) -> None:
        train = write_rows(self.folder / "train.jsonl", rows("train.jsonl", 40))
        validation = write_rows(self.folder / "validation.jsonl", rows("validation.jsonl", 8))
        # 16 packed rows of training: 8 batches of 2 an epoch.
        self.values = {
            "algorithm": "eagle3",
            "verifier": str(VERIFIER),
            "output_dir": str(self.folder / "runs"),
            "trainer": {"accelerator": "cpu", "max_steps": 12, "max_epochs": 9, "log_every_n_steps": 1},
            "model": {
                "ttt_steps": TTT_STEPS,
                "draft": {"draft_vocab_size": 256},
                "optimizer": {"lr": 4e-3},
                "schedule": {"warmup": 0.25},
            },
            "data": {
                "train": str(train),
                "validation": str(validation),
                "max_length": 256,
                "batch_size": 2,
                "cache_dir": str(self.cache),
            },
        }
