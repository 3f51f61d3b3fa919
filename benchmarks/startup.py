r"""How long commands take to answer ``--help``, and ``fit`` to train its first step; and which libraries they import.

    python benchmarks/startup.py

Each command is a process of its own; the time is the processor's.
"""

from __future__ import annotations

import subprocess
import sys

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
FIRST_STEP = """
import contextlib, os, sys, tempfile, time
from specforge.__main__ import main
from specforge.training.module import DraftModule
def end(*_):
    print(f"| fit, its first step | {time.process_time():.2f} s | |", file=sys.__stdout__, flush=True)
    os._exit(0)
DraftModule.on_train_batch_end = end
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
    main(["fit", "--config", "configs/quickstart.yaml", "--output_dir", folder])
"""
PREPARE = ("rows", "features", "responses", "check")


def main() -> None:
    """Print a table."""
    print("| command | time | libraries that it imports |\n|---|---|---|", flush=True)
    for words in [*([name] for name in installed().all(Command)), *(["prepare", name] for name in PREPARE)]:
        subprocess.run([sys.executable, "-c", CODE, *words, "--help"], check=True)
    subprocess.run([sys.executable, "-c", FIRST_STEP], check=True)


if __name__ == "__main__":
    main()
