"""The environments of the published trainers, as created by ``install``, and the processes in them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
DEFAULT = Path(".venv-peers")


def missing(environments: Path) -> str | None:
    """Return an error message if a folder has no environments."""
    if (environments / "ready").exists():
        return None
    return f"{environments} has no environments; make them: {HERE / 'install'} FOLDER"


def interpreter(environments: Path, name: str | None) -> str:
    """Return the Python of an environment; for None, this process's."""
    return sys.executable if name is None else str(environments.absolute() / name / "bin" / "python")


def variables(name: str | None, **more: str) -> dict[str, str]:
    """Return the variables of a process in an environment: one thread, no network.

    Args:
        name: The environment; None for this process's.
        **more: Further variables.
    """
    found = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if name is not None:
        # Files of the peers import each other through it. Ours must not be found, since one package has our import
        # name.
        found["PYTHONPATH"] = str(HERE)
    return {**found, **more}
