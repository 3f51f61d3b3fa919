"""Where a run keeps its files, and how a checkpoint is found again.

``<output_dir>/version_N/`` holds ``config.yaml``, the logger's files, ``checkpoints/last.ckpt`` and ``best.ckpt`` and,
at the end, the best draft in ``draft/``.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from specforge.errors import UsageError

CHECKPOINTS = "checkpoints"
NAMES = ("last", "best")


def resolve_checkpoint(wanted: str, output_dir: Path) -> Path:
    """Find a checkpoint.

    Args:
        wanted: ``"last"`` or ``"best"`` of the newest run that has one, or a file.
        output_dir: Folder of the runs.

    Raises:
        UsageError: There is none.
    """
    if wanted not in NAMES:
        if not Path(wanted).is_file():
            raise UsageError(f"--ckpt_path {wanted}: there is no such file; give a file, or one of: {', '.join(NAMES)}")
        return Path(wanted)
    found = [run / CHECKPOINTS / f"{wanted}.ckpt" for run in runs(output_dir)]
    found = [path for path in found if path.is_file()]
    if not found:
        raise UsageError(
            f"no run in {output_dir} has a checkpoint {wanted!r}; start one without --ckpt_path, name a file, or set "
            "--output_dir to where the runs are"
        )
    return found[-1]


def check_checkpoint(path: Path) -> None:
    """Refuse a file that is no whole checkpoint of a run, before anything else is loaded.

    Raises:
        UsageError: The file is damaged, or something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged files fail in many ways
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{path} is damaged or not a checkpoint of a run: {reason}") from error
    if not isinstance(content, dict) or not {"state_dict", "loops", "pytorch-lightning_version"} <= content.keys():
        raise UsageError(f"{path} is not a checkpoint of a run; runs write checkpoints/last.ckpt and best.ckpt")


def runs(output_dir: Path) -> list[Path]:
    """Return the folders of the runs in a folder, oldest first."""
    numbered = {
        int(match[1]): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else [])
        if (match := re.fullmatch(r"version_(\d+)", path.name))
    }
    return [numbered[number] for number in sorted(numbered)]


def next_version(output_dir: Path) -> str:
    """Return the name of the next new run."""
    numbers = [int(run.name.removeprefix("version_")) for run in runs(output_dir)]
    return f"version_{max(numbers, default=-1) + 1}"


def version_of(checkpoint: Path | None, output_dir: Path) -> str | None:
    """Return the name of the run that a checkpoint belongs to; None to begin a new run."""
    if checkpoint is None:
        return None
    run = checkpoint.absolute().parent.parent
    return run.name if run in [path.absolute() for path in runs(output_dir)] else None
