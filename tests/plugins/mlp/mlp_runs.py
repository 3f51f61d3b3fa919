"""Small training runs of MLP speculators for the quickstart's verifier."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart"
VERIFIER = QUICKSTART / "verifier"
HEADS = 2
# In stage 2: tokens of each prompt, and of what is written to it.
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
class Workshop:
    """A folder with data, one configuration file, and the runs made from it.

    Attributes:
        folder: Where everything is.
        cache: Folder of tokenised rows, shared by all workshops of a session.
    """

    folder: Path
    cache: Path
    values: dict[str, Any] = field(default_factory=dict)

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
        path = self.folder / name
        path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
        return path

    def words(self, output_dir: str, *more: str) -> list[str]:
        """Return the words after the subcommand."""
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.values, sort_keys=False), encoding="utf-8")
        return ["--config", str(path), "--output_dir", str(self.folder / output_dir), *more]

    def run_folder(self, output_dir: str) -> Path:
        """Return the folder of a run."""
        return self.folder / output_dir / "version_0"


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    """Return what a training checkpoint holds."""
    values: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return values


def assert_same_values(first: Any, second: Any) -> None:
    """Compare nested states, tensors bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_values(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same_values(one, other)
    else:
        assert first == second


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    """Return step and value of what a run logged under a tag."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return [(one.step, one.value) for one in events.Scalars(tag)]
