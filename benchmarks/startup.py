r"""How long commands take to answer ``--help``, and ``fit`` to train its first step; and which libraries they import.

    python benchmarks/startup.py

Each command is a process of its own; the time is the processor's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from specforge.hookspecs import Command
from specforge.registry import installed

CODE = """
import contextlib, io, sys, time
from specforge.__main__ import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(sys.argv[1:])
slow = [name for name in ("torch", "transformers", "lightning", "datasets", "jsonargparse") if name in sys.modules]
print(f"| {' '.join(sys.argv[1:-1])} | {time.process_time():.2f} s | {', '.join(slow)} |")
"""
HERE = Path(__file__).parent
ROUNDS = 5
PREPARE = ("rows", "features", "responses", "check")


class EndAfterFirstStep(Callback):
    """Prints the processor time so far after the first step, and ends the process."""

    def on_train_batch_end(self, *_: Any) -> None:
        """Print and end."""
        print(f"| fit, its first step | {time.process_time():.2f} s | all |", file=sys.__stdout__, flush=True)
        os._exit(0)


def main() -> None:
    """Print a table."""
    print("| command | time | libraries that it imports |\n|---|---|---|", flush=True)
    for words in [*([name] for name in installed().all(Command)), *(["prepare", name] for name in PREPARE)]:
        subprocess.run([sys.executable, "-c", CODE, *words, "--help"], check=True)
    settings = ["--config", "configs/quickstart.yaml", "--trainer.callbacks", "startup.EndAfterFirstStep"]
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, "-m", "specforge", "fit", *settings, "--output_dir", folder],
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])},
                check=True,
            )


if __name__ == "__main__":
    main()
