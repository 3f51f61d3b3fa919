r"""How long commands take to answer ``--help``, and how much of it is libraries.

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
PREPARE = ("rows", "features", "responses", "check")


def main() -> None:
    """Print a table."""
    print("| command | time | libraries that it imports |\n|---|---|---|", flush=True)
    for words in [*([name] for name in installed().all(Command)), *(["prepare", name] for name in PREPARE)]:
        subprocess.run([sys.executable, "-c", CODE, *words, "--help"], check=True)


if __name__ == "__main__":
    main()
