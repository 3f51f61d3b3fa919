"""No command mixes tensors of the CPU and the accelerator, and results are equal; on a simulated accelerator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

HERE = Path(__file__).parent


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot be given a device that is written in Python",
)
def test_commands_and_drafts_on_an_accelerator(tmp_path: Path) -> None:
    folders = [HERE, *(HERE.parent / name for name in ("support", "end_to_end", "decoding", "../benchmarks"))]
    paths = filter(None, [os.environ.get("PYTHONPATH")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / "on_accelerator.py"), f"--basetemp={tmp_path / 'inside'}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, folders), *paths]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
