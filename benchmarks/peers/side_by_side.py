r"""A training step of EAGLE-3 against those of two published packages: CPU time, wall time and peak memory.

    benchmarks/peers/install .venv-peers
    python benchmarks/peers/side_by_side.py --environments .venv-peers --output peers.json

Contestants are processes of one thread, which take turns within one run: ``ours.py``,
``speculators_peer.py`` and ``sglang_peer.py``, which describe the computation of each and the replacements for a CPU.
All train the same draft with the same weights on the same stored states of a verifier, in float32: one decoder layer,
its fusion of three layers' states, its norms and its head. The batch is one document, a prompt and then a response,
since SGLang's package does not pack; the rows that count are the same. Every step updates the weights by AdamW.

Before anything is measured, each peer's loss and gradients are compared with ours. The packages divide a step's loss by
different numbers of rows, and one omits the verifier's entropy, a constant; ours then does the same.

A figure is the median of the rounds, after a step that does not count. Memory is the growth of the peak resident memory
during a step, in another process, over weights, optimizer states and batch: gradients, activations, logits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from environments import DEFAULT, HERE, interpreter, missing, variables
from safetensors.torch import load_file
from task import Task
from torch import Tensor

# Relative differences in float32, of the loss and of a weight's gradients.
SAME_LOSS, SAME_GRADIENTS = 1e-5, 1e-3
# Large blocks are returned to the system at once, so that the peak is that of memory in use.
MEMORY_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


@dataclass(frozen=True)
class Contestant:
    """A package.

    Attributes:
        name: Name in the tables.
        environment: Folder of its environment within ``--environments``; None for the one that runs this file.
        command: Its file, and arguments in addition to the task.
        denominator: Divisor of a step's loss (see ``Task``).
    """

    name: str
    environment: str | None
    command: tuple[str, ...]
    denominator: str


OURS = Contestant("specforge (this project)", None, ("ours.py",), "valid")
PEERS = (
    Contestant("speculators 0.9.0", "speculators", ("speculators_peer.py",), "valid"),
    Contestant("SGLang's specforge 0.2.0", "sglang", ("sglang_peer.py",), "all"),
    Contestant("the same, compact teacher", "sglang", ("sglang_peer.py", "compact"), "all"),
)


class Running:
    """A contestant's process."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log
        self.trained: int = self._answer()["trained"]

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            output = "\n".join(self._log.read_text().splitlines()[-20:])
            sys.exit(f"{self._log.stem} has ended:\n{output}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def running(contestant: Contestant, task: Task, environments: Path, **more: str) -> Iterator[Running]:
    """Start a contestant on a task, and end it."""
    own = contestant.environment
    script, *arguments = contestant.command
    command = [interpreter(environments, own), str(HERE / script), task.folder, *arguments]
    log = Path(task.folder) / f"{script}.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=variables(own, **more),
        ) as process,
    ):
        try:
            yield Running(process, log)
        finally:
            process.kill()


@dataclass(frozen=True)
class First:
    """First results of a contestant: loss, gradients by weight, and the memory of a step, in MiB."""

    trained: int
    loss: float
    gradients: dict[str, Tensor]
    memory: float


def first_step(contestant: Contestant, task: Task, environments: Path, denominator: str) -> First:
    """Get a contestant's loss and gradients of the first step, and its memory, in a separate process."""
    replace(task, denominator=denominator).write_settings()
    file = Path(task.folder) / "gradients.safetensors"
    with running(contestant, task, environments, **MEMORY_SETTINGS) as process:
        loss = process.ask(f"gradients {file}")["loss"]
        return First(process.trained, loss, load_file(file), process.ask("memory")["bytes"] / 2**20)


def difference(peer: str, ours: First, theirs: First) -> dict[str, float]:
    """Compare loss and gradients of the first step with ours; end the program if they differ.

    Returns:
        The relative difference of the loss, and the largest of a weight's gradients.
    """
    if ours.gradients.keys() != theirs.gradients.keys():
        sys.exit(f"{peer} trains other weights: {sorted(ours.gradients.keys() ^ theirs.gradients.keys())}")
    loss = abs(theirs.loss / ours.loss - 1)
    gradient = max(float((theirs.gradients[name] - own).norm() / own.norm()) for name, own in ours.gradients.items())
    if loss > SAME_LOSS or gradient > SAME_GRADIENTS:
        sys.exit(
            f"{peer} does not compute what ours does: its loss is {theirs.loss}, ours {ours.loss}; gradients differ by "
            f"up to {gradient:.1e}"
        )
    return {"loss": loss, "gradients": gradient}


def measure(task: Task, environments: Path, rounds: int) -> dict[str, Any]:
    """Compare the contestants on a task, measure their memory, and let them take steps in turn."""
    ours = {denominator: first_step(OURS, task, environments, denominator) for denominator in ("all", "valid")}
    firsts = {OURS.name: ours[OURS.denominator]}
    firsts |= {peer.name: first_step(peer, task, environments, peer.denominator) for peer in PEERS}
    same = {peer.name: difference(peer.name, ours[peer.denominator], firsts[peer.name]) for peer in PEERS}
    figures: dict[str, dict[str, Any]] = {
        name: {"trained": first.trained, "memory": [first.memory], "cpu": [], "wall": []}
        for name, first in firsts.items()
    }
    task.write_settings()
    for contestant, step in in_turn((OURS, *PEERS), task, environments, rounds):
        for clock in ("cpu", "wall"):
            figures[contestant.name][clock].append(step[clock])
    return {"task": asdict(task), "same": same, "figures": figures}


def in_turn(
    contestants: tuple[Contestant, ...], task: Task, environments: Path, rounds: int
) -> Iterator[tuple[Contestant, dict[str, Any]]]:
    """Yield the steps of all contestants in turn, after a first step of each that does not count."""
    with ExitStack() as stack:
        processes = [(each, stack.enter_context(running(each, task, environments))) for each in contestants]
        for _, process in processes:
            process.ask("step")
        for number in range(rounds):
            print(f"  round {number + 1} of {rounds}", file=sys.stderr)
            for contestant, process in processes:
                yield contestant, process.ask("step")


def table(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a Markdown table of one task, after a line that describes it."""
    task, figures = Task(**result["task"]), result["figures"]
    trained = figures[OURS.name]["trained"] / 1e6
    yield (
        f"{task.steps} steps, {task.supervised:.0%} supervised; width {task.hidden}, vocabulary {task.vocabulary:,}, "
        f"draft vocabulary {task.draft_vocabulary:,}, {task.length:,} tokens; {trained:.2f} M trained"
    )
    yield ""
    yield "| contestant | CPU per step | of ours | wall per step | of ours | memory | of ours | loss, gradient errors |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, values in figures.items():
        cells = [name]
        for what, unit in (("cpu", "{:.3f} s"), ("wall", "{:.3f} s"), ("memory", "{:,.0f} MiB")):
            value, ours = (statistics.median(costs[what]) for costs in (values, figures[OURS.name]))
            cells += [unit.format(value), f"{value / ours:.2f}"]
        errors = result["same"].get(name)
        cells.append(f"{errors['loss']:.0e}, {errors['gradients']:.0e}" if errors else "")
        yield f"| {' | '.join(cells)} |"
    yield ""


def shape(text: str) -> tuple[int, int, int, int]:
    """Read the sizes of verifier, draft and batch."""
    hidden, vocabulary, draft_vocabulary, length = (int(word) for word in text.split(","))
    if hidden % 256:
        raise ValueError
    return hidden, vocabulary, draft_vocabulary, length


def case(text: str) -> tuple[int, float]:
    """Read the number of draft steps and the share of supervised rows."""
    steps, share = text.split(",")
    return int(steps), float(share)


def main() -> None:
    """Measure every case and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=DEFAULT, help="Folder given to install.")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape,
        metavar="WIDTH,VOCABULARY,DRAFT_VOCABULARY,LENGTH",
        default=[(256, 4096, 1024, 512), (512, 32000, 8000, 2048)],
        help="Widths are multiples of 256.",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        type=case,
        metavar="STEPS,SHARE",
        default=[(7, 0.3), (7, 1.0), (3, 0.3)],
        help="Draft steps, and share of the rows that are supervised.",
    )
    parser.add_argument("--rounds", type=int, default=7, help="Steps of each contestant that count.")
    parser.add_argument("--output", type=Path, help="JSON file for every figure.")
    arguments = parser.parse_args()
    if (reason := missing(arguments.environments)) is not None:
        parser.error(reason)
    results = []
    for sizes, rows in itertools.product(arguments.shapes, arguments.cases):
        print(f"shape {sizes}, case {rows}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            task = Task(folder, *sizes, *rows)
            task.write()
            results.append(measure(task, arguments.environments, arguments.rounds))
        print("\n".join(table(results[-1])), flush=True)
        if arguments.output is not None:
            about = {"platform": platform.platform(), "torch": torch.__version__, "rounds": arguments.rounds}
            arguments.output.write_text(json.dumps({**about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
