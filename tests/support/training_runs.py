"""Training runs in tests: a folder with data, a configuration and its runs, and readers of their outputs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from specforge.models.scaled_linear import folded


def write_rows(path: Path, values: list[dict[str, Any]]) -> Path:
    """Write a JSON-lines file."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@dataclass
class RunsFolder:
    """A folder with data, one configuration file, and the runs made from it.

    Attributes:
        folder: Folder of all files.
        cache: Folder of tokenised rows, shared by all folders of a session.
        values: The configuration.
    """

    folder: Path
    cache: Path
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        """The configuration file."""
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.values, sort_keys=False), encoding="utf-8")
        return path

    def words(self, output_dir: str, *more: str) -> list[str]:
        """Return the command-line words after the subcommand."""
        return ["--config", str(self.config), "--output_dir", str(self.folder / output_dir), *more]

    def run_folder(self, output_dir: str, version: int = 0) -> Path:
        """Return the folder of a run."""
        return self.folder / output_dir / f"version_{version}"


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a training checkpoint as they are written into its draft."""
    return folded(torch.load(checkpoint, weights_only=True)["state_dict"])


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Compare tensors bit for bit."""
    assert first.keys() == second.keys()
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert not different


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
        for value, other in zip(first, second, strict=True):
            assert_same_values(value, other)
    else:
        assert first == second


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    """Return step and value of everything a run logged under a tag, over all event files, in the order of logging."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    # Files of the same second are read in the order of their names, where 10 comes before 9.
    logged = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
    return [(event.step, event.value) for event in logged]
