r"""Run the speed benchmarks and write their output to ``benchmarks/RESULTS.md``, a section for each.

    python benchmarks/run.py                                          # all that this environment can run
    python benchmarks/run.py training_step objective                  # some of them
    benchmarks/peers/install .venv-peers && python benchmarks/run.py peers --environments .venv-peers

The machine should be idle otherwise. A section states date, machine and versions of its measurement.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
PLOTS = HERE.parent / "docs" / "images"


@dataclass(frozen=True)
class Part:
    """A benchmark.

    Attributes:
        title: Title of its section.
        command: Its file and arguments.
    """

    title: str
    command: tuple[str, ...]


PARTS = {
    "training_step": Part(
        "A training step by length, draft steps and vocabulary",
        ("training_step.py", "--plot", str(PLOTS / "training-step.svg")),
    ),
    "peers": Part("A training step against two published packages", ("peers/side_by_side.py",)),
    "objective": Part("Only losses and gradients", ("objective.py",)),
    "preparation": Part(
        "Preparing rows", ("preparation.py", "--verifier", "configs/quickstart/verifier", "--rows", "10000")
    ),
    "quickstart": Part("Waiting for data, and the decoding loop", ("quickstart.py",)),
}


def main() -> None:
    """Run the requested parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"Some of: {', '.join(PARTS)}; all by default.")
    parser.add_argument("--environments", type=Path, help="Folder of the peers' environments (peers/install).")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    chosen = arguments.parts or [name for name in PARTS if name != "peers" or arguments.environments]
    for name in chosen:
        part = PARTS[name]
        command = [sys.executable, str(HERE / part.command[0]), *part.command[1:]]
        if name == "peers":
            command += ["--environments", str(arguments.environments or ".venv-peers")]
        print(f"{name}: {' '.join(command)}", file=sys.stderr)
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        write_section(name, part, tables(done.stdout.splitlines()))


def tables(lines: Iterable[str]) -> str:
    """Keep only the tables of a command's output."""
    return "\n".join(line for line in lines if not line or line.startswith("|") or line.endswith("trained")).strip()


def write_section(name: str, part: Part, text: str) -> None:
    """Write a section into the page; replace an earlier one."""
    when = datetime.date.today().isoformat()
    versions = f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}"
    image = f"\n![{part.title}](../docs/images/{name.replace('_', '-')}.svg)\n" if "--plot" in part.command else ""
    section = (
        f"<!-- {name} -->\n## {when}: {part.title.lower()}\n\n```bash\npython benchmarks/run.py {name}\n```\n\n"
        f"{processor()}, one thread; {versions}.\n{image}\n{text}\n\n<!-- end of {name} -->\n"
    )
    page = RESULTS.read_text()
    old = re.compile(rf"<!-- {name} -->.*?<!-- end of {name} -->\n", re.DOTALL)
    page = old.sub(lambda _: section, page) if old.search(page) else f"{page.rstrip()}\n\n{section}"
    temporary = RESULTS.with_suffix(".new")
    temporary.write_text(page)
    temporary.replace(RESULTS)


def processor() -> str:
    """Return the name of the processor."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores of {found[1] if found else platform.machine()}"


if __name__ == "__main__":
    main()
