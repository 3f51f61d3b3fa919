"""Small training runs of MLP speculators for the quickstart's verifier."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from training_runs import RunsFolder, write_rows

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart"
VERIFIER = QUICKSTART / "verifier"
HEADS = 2
# In stage 2: tokens of each prompt, and of each continuation.
PROMPT, NEW = 24, 8
TWO_STAGES = [
    "--model.stage_two.begin=3",
    f"--model.stage_two.prompt_length={PROMPT}",
    f"--model.stage_two.new_tokens={NEW}",
]


def quickstart_rows(name: str, number: int, skip: int = 0) -> list[dict[str, Any]]:
    """Return some rows of a file of the quickstart."""
    lines = (QUICKSTART / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[skip : skip + number]]


@dataclass
class Workshop(RunsFolder):
    """Runs of an MLP speculator on some rows of the quickstart."""

    def __post_init__(self) -> None:
        # 10 packed rows of training: 5 batches of 2 an epoch.
        self.values = {
            "algorithm": "mlp",
            "verifier": str(VERIFIER),
            "output_dir": str(self.folder / "runs"),
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 8,
                "max_epochs": 9,
                "log_every_n_steps": 1,
                "limit_val_batches": 1,
                "gradient_clip_val": 1.0,
            },
            "model": {
                "draft": {"num_layers": HEADS, "intermediate_size": 48},
                "optimizer": {"lr": 1e-2},
            },
            "data": {
                "train": str(self.write("train.jsonl", quickstart_rows("train.jsonl", 11))),
                "validation": str(self.write("validation.jsonl", quickstart_rows("validation.jsonl", 4))),
                "max_length": 128,
                "batch_size": 2,
                "cache_dir": str(self.cache),
            },
        }

    def write(self, name: str, rows: list[dict[str, Any]]) -> Path:
        """Write a JSON-lines file."""
        return write_rows(self.folder / name, rows)


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    """Load a training checkpoint."""
    values: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return values
