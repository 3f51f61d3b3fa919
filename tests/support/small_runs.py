"""Small runs of every algorithm on token rows, and their outputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ALGORITHMS: dict[str, dict[str, Any]] = {
    "eagle": {"algorithm": "eagle", "model": {"noise": 0}},
    "hass": {
        "algorithm": "eagle",
        "model": {"noise": 0, "alignment_steps": 3, "objective": {"cross_entropy": 0.1, "top_k": 1.0}},
    },
    # Its objective uses the mean acceptance over the complete batch.
    "eagle3": {
        "algorithm": "eagle3",
        "model": {"ttt_steps": 3, "draft": {"draft_vocab_size": 40}, "objective": {"kl": 0.5, "lk_lambda": 0.5}},
    },
    # Its anchors are drawn again at each step.
    "dspark": {
        "algorithm": "dspark",
        "model": {
            "anchors": 4,
            "draft": {"num_layers": 2, "block_size": 3, "markov_rank": 8, "draft_vocab_size": 40, "mask_token_id": 1},
        },
    },
    # At temperature 0 the verifier generates the same text in every process.
    "mlp": {
        "algorithm": "mlp",
        "model": {
            "draft": {"num_layers": 3},
            "stage_two": {"begin": 14, "prompt_length": 12, "new_tokens": 6, "temperature": 0.0},
        },
    },
    "draft_model": {"algorithm": "draft_model", "model": {"measured_steps": 3, "draft": {"init_layers": [0, 7]}}},
}


@dataclass
class SmallRuns:
    """Runs on the same rows, in one folder.

    Attributes:
        folder: Folder of all files.
        verifier: Folder of the verifier.
        values: Values that all configurations share, in addition to rows and verifier.
    """

    folder: Path
    verifier: Path
    values: dict[str, Any]

    def write(self, split: str, rows: Sequence[tuple[list[int], list[int]]]) -> None:
        """Write the rows of a split, tokens and loss mask of each."""
        lines = (json.dumps({"input_ids": tokens, "loss_mask": mask}) + "\n" for tokens, mask in rows)
        (self.folder / f"{split}.jsonl").write_text("".join(lines))

    def words(self, name: str, algorithm: str, *more: str) -> list[str]:
        """Return the command-line words of a run, after ``specforge``."""
        values = {**self.values, "verifier": str(self.verifier), "output_dir": str(self.folder / name)}
        values |= {"algorithm": ALGORITHMS[algorithm]["algorithm"]}
        learning = {"optimizer": {"lr": 3e-3}, "schedule": {"name": "constant", "warmup": 0}}
        values["model"] = {**learning, **ALGORITHMS[algorithm]["model"]}
        sources = {split: str(self.folder / f"{split}.jsonl") for split in ("train", "validation")}
        values["data"] = {**values.get("data", {}), **sources, "cache_dir": str(self.folder / "cache")}
        path = self.folder / f"{name}.json"  # JSON is YAML
        path.write_text(json.dumps(values))
        return ["fit", "--config", str(path), *more]

    def run(self, name: str) -> Path:
        """Return the folder of a run, a single one for any number of processes."""
        assert [path.name for path in (self.folder / name).iterdir()] == ["version_0"]
        return self.folder / name / "version_0"

    def last(self, name: str) -> Path:
        """Return the last checkpoint of a run."""
        return self.run(name) / "checkpoints" / "last.ckpt"


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a training checkpoint."""
    found: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return found


def assert_close(first: Path, second: Path, **tolerance: float) -> None:
    """Compare the weights of two checkpoints."""
    expected, found = weights(first), weights(second)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def logged(run: Path) -> dict[str, list[float]]:
    """Return everything that a run logged, by tag, except its resource use."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    resources = {f"train/{name}" for name in ("tokens_per_second", "idle_share", "peak_memory_gb")}
    tags = [tag for tag in events.Tags()["scalars"] if tag not in resources]
    return {tag: [scalar.value for scalar in events.Scalars(tag)] for tag in tags}
