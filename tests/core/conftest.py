"""Throw-away plugins: real distributions in a temporary folder, used by the real command."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Toys:
    """A folder of installed distributions, and the ``specforge`` command with that folder on its path."""

    folder: Path

    def install(self, package: str, source: str, *, module: str = "toy", plugin: str = "toy") -> None:
        """Install a distribution of one module that is a plugin.

        Args:
            package: Name of the distribution, version 0.1.
            source: Text of the module.
            module: Name of the module.
            plugin: Name of its entry point.
        """
        self.write(f"{module}.py", source)
        information = self.folder / f"{package.replace('-', '_')}-0.1.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
        (information / "entry_points.txt").write_text(f"[specforge.plugins]\n{plugin} = {module}\n")

    def write(self, name: str, source: str) -> None:
        """Write another file in the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run ``specforge`` with the distributions installed."""
        return self.python("-m", "specforge", *words)

    def python(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run Python with the distributions installed."""
        path = os.pathsep.join([str(self.folder), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        command = [sys.executable, *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=self.folder)


@pytest.fixture
def toys(tmp_path: Path) -> Toys:
    """An empty folder for throw-away plugins."""
    folder = tmp_path / "site"
    folder.mkdir()
    return Toys(folder)
