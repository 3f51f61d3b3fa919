"""Where a run keeps its files, and how a checkpoint is found again.

``<output_dir>/version_N/`` holds ``config.yaml``, the logger's files, ``checkpoints/`` with ``last.ckpt``, the one
before it in ``previous.ckpt``, and ``best.ckpt``, and, at the end, the best draft in ``draft/``.
"""

from __future__ import annotations

import logging
import re
import zipfile
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only

from specforge.errors import UsageError

_log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
NAMES = {"last": (LAST, PREVIOUS), "best": (BEST,), "auto": (LAST, PREVIOUS)}


def resolve_checkpoint(wanted: str, output_dir: Path) -> Path | None:
    """Find a checkpoint that is whole.

    Args:
        wanted: A file, or ``"last"`` or ``"best"`` of the newest run that has one, or ``"auto"``, which is ``"last"``
            where there is one. Those that are found so, but are damaged or something else, are named and passed over.
        output_dir: Folder of the runs.

    Returns:
        The file; None to begin a new run, under ``"auto"`` alone.

    Raises:
        UsageError: There is none, or the file is damaged or something else.
    """
    if wanted not in NAMES:
        if not Path(wanted).is_file():
            raise UsageError(f"--ckpt_path {wanted}: there is no such file; give a file, or one of: {', '.join(NAMES)}")
        check_checkpoint(Path(wanted))
        return Path(wanted)
    for path in (run / CHECKPOINTS / name for run in reversed(runs(output_dir)) for name in NAMES[wanted]):
        try:
            if path.is_file():
                check_checkpoint(path)
                return path
        except UsageError as error:
            rank_zero_only(_log.warning)("passed over: %s", error)
    if wanted == "auto":
        return None
    raise UsageError(
        f"no run in {output_dir} has a whole checkpoint {wanted!r}; start one without --ckpt_path, name a file, or set "
        "--output_dir to where the runs are"
    )


def check_checkpoint(path: Path) -> None:
    """Refuse a file that is no whole checkpoint of a run, before anything else is loaded.

    Raises:
        UsageError: The file is damaged, or something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself compares no checksums
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged files fail in many ways
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"{path} is damaged or not a checkpoint of a run: {reason}") from error
    if damaged is not None:
        raise UsageError(f"{path} is damaged: the checksum of {damaged} in it is wrong")
    if not isinstance(content, dict) or not {"state_dict", "loops", "pytorch-lightning_version"} <= content.keys():
        raise UsageError(f"{path} is not a checkpoint of a run; runs write checkpoints/{LAST} and {BEST}")


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
