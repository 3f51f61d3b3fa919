"""The record of a draft's run from its folder: the training settings and the validation metric."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from specforge.data.text.prompts import Conversation, read_prompts
from specforge.errors import UsageError

DRAFT = "draft"
CONFIG = "config.yaml"
BEST = Path("checkpoints") / "best.ckpt"
PROMPTS = 4
Read = TypeVar("Read")
Choice = tuple[str, float, int | None] | tuple[()]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """Settings and result of a run, as far as known.

    Attributes:
        settings: The resolved configuration; empty if there is none.
        metric: Name of the validation metric that selected the draft.
        value: Its value; None if no validation selected the draft.
        step: Number of optimizer steps until then.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    metric: str | None = None
    value: float | None = None
    step: int | None = None

    @property
    def prompts(self) -> list[Conversation] | None:
        """The first validation prompts of the run; None if they are not available."""
        source = (self.settings.get("data") or {}).get("validation")
        if not isinstance(source, str) or not Path(source).is_file():
            return None
        try:
            return read_prompts(source, "data.validation", limit=PROMPTS)
        except UsageError:  # rows of a kind without prompts
            return None

    @classmethod
    def read(cls, run: Path) -> RunRecord:
        """Read the files of a run folder; a missing file is skipped, a damaged one too, with a warning."""
        no_settings: dict[str, Any] = {}
        settings = _readable(run / CONFIG, _settings, no_settings)
        no_choice: Choice = ()
        return cls(settings, *_readable(run / BEST, _chosen_by, no_choice))


def find_draft(source: str) -> tuple[str, RunRecord]:
    """Return the folder or hub id of the draft, and the record of its run.

    Args:
        source: A run folder, a draft folder, or a hub id.

    Raises:
        UsageError: It is the folder of a run that has not written its draft yet, of several runs, or a part of a run.
    """
    folder = Path(source)
    if (folder / DRAFT).is_dir():
        return str(folder / DRAFT), RunRecord.read(folder)
    if (folder / CONFIG).is_file() and (folder / "checkpoints").is_dir():
        raise UsageError(
            f"{folder} is a run without a {DRAFT}/, which training writes at its end; resume it with: "
            f"specforge fit --config {folder / CONFIG} --ckpt_path last"
        )
    below = (found.parent for depth in ("*", "*/*") for found in folder.glob(f"{depth}/{DRAFT}/"))
    if runs := sorted(map(str, below)):
        raise UsageError(f"{folder} is a folder of runs; give one of: {', '.join(runs)}")
    if folder.name == DRAFT and (folder.parent / CONFIG).is_file():
        return source, RunRecord.read(folder.parent)
    run = next((one for one in folder.parents if (one / DRAFT).is_dir() and (one / CONFIG).is_file()), None)
    if run is not None and folder.exists() and not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is a part of a run; give the run's folder: {run}")
    return source, RunRecord()


def _readable(path: Path, read: Callable[[Path], Read], otherwise: Read) -> Read:
    """Return the contents of a file, or a default if it is missing or damaged; the draft does not need it."""
    try:
        return read(path) if path.is_file() else otherwise
    except Exception as error:  # damaged files fail in many ways
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        _log.warning("%s cannot be read and is ignored: %s", path, reason)
        return otherwise


def _settings(path: Path) -> dict[str, Any]:
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(settings, dict) or not all(
        isinstance(settings.get(one) or {}, dict) for one in ("data", "model")
    ):
        raise ValueError("it does not hold the settings of a run")
    return settings


def _chosen_by(path: Path) -> Choice:
    """Return the metric that selected the draft, its value and the step; empty if none did."""
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for state in saved.get("callbacks", {}).values():
        if isinstance(state, dict) and state.get("best_model_score") is not None:
            return state["monitor"], float(state["best_model_score"]), saved.get("global_step")
    return ()
