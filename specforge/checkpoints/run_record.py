"""What a run folder tells of the draft in it: what it was trained on, and how good it was found to be."""

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
    """A run, as far as it is known.

    Attributes:
        settings: The resolved configuration; empty where there is none.
        metric: Name of the validation metric that the draft was chosen by.
        value: Its value; None where no validation chose it.
        step: Optimizer steps until then.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    metric: str | None = None
    value: float | None = None
    step: int | None = None

    @property
    def prompts(self) -> list[Conversation] | None:
        """The first prompts that the run was validated on; None where they are not at hand."""
        source = (self.settings.get("data") or {}).get("validation")
        if not isinstance(source, str) or not Path(source).is_file():
            return None
        try:
            return read_prompts(source, "data.validation", limit=PROMPTS)
        except UsageError:  # rows of another kind, which hold no prompts
            return None

    @classmethod
    def read(cls, run: Path) -> RunRecord:
        """Read the files of a run folder; one that is missing or damaged is no obstacle, and told of."""
        no_settings: dict[str, Any] = {}
        settings = _readable(run / CONFIG, _settings, no_settings)
        no_choice: Choice = ()
        return cls(settings, *_readable(run / BEST, _chosen_by, no_choice))


def find_draft(source: str) -> tuple[str, RunRecord]:
    """Return the draft that is meant, and what is known of its run.

    Args:
        source: A run folder, a draft folder, or a hub id.

    Raises:
        UsageError: It is the folder of a run that has not written its draft yet.
    """
    folder = Path(source)
    if (folder / DRAFT).is_dir():
        return str(folder / DRAFT), RunRecord.read(folder)
    if (folder / CONFIG).is_file() and (folder / "checkpoints").is_dir():
        raise UsageError(
            f"{folder} is a run without a {DRAFT}/, which training writes at its end; go on with: "
            f"specforge fit --config {folder / CONFIG} --ckpt_path last"
        )
    if folder.name == DRAFT and (folder.parent / CONFIG).is_file():
        return source, RunRecord.read(folder.parent)
    return source, RunRecord()


def _readable(path: Path, read: Callable[[Path], Read], otherwise: Read) -> Read:
    """Return what is read of a file, or something else if it is missing or damaged; the draft is whole without it."""
    try:
        return read(path) if path.is_file() else otherwise
    except Exception as error:  # damaged files fail in many ways
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        _log.warning("%s cannot be read, and nothing of it is noted: %s", path, reason)
        return otherwise


def _settings(path: Path) -> dict[str, Any]:
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(settings, dict) or not all(
        isinstance(settings.get(one) or {}, dict) for one in ("data", "model")
    ):
        raise ValueError("it does not hold the settings of a run")
    return settings


def _chosen_by(path: Path) -> Choice:
    """Return the metric that chose the draft, its value and the step; nothing if none did."""
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for state in saved.get("callbacks", {}).values():
        if isinstance(state, dict) and state.get("best_model_score") is not None:
            return state["monitor"], float(state["best_model_score"]), saved.get("global_step")
    return ()
