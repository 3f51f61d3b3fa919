r"""A training step of EAGLE-3 beside those of two published packages: CPU time, wall time and peak memory.

    benchmarks/peers/install .venv-peers
    python benchmarks/peers/side_by_side.py --environments .venv-peers --output peers.json

Contestants are processes of one thread that run one at a time, in turn, in one run: ``ours.py``,
``speculators_peer.py`` and ``sglang_peer.py``, which say what each computes and what had to be replaced on a CPU. All
train the same draft with the same weights on the same stored states of a verifier, in float32: one decoder layer, its
fusion of three layers' states, its norms and its head. The batch is one document, a prompt and then a response, since
SGLang's package does not pack; the rows that count are the same. Every step updates the weights by AdamW.

Before anything is measured, each peer's loss and gradients are compared with ours. The packages divide a step's loss by
different numbers of rows, and one omits the verifier's entropy, a constant; ours is then asked for the same.

A figure is the median of the rounds, after a step that does not count. Memory is how much the peak of what is resident
grows during a step, in a process of its own, over weights, optimizer states and batch: gradients, activations, logits.
"""

from __future__ import annotations

import argparse
import json
import os
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
from safetensors.torch import load_file
from task import Task

HERE = Path(__file__).parent
# Relative differences in float32, of the loss and of a weight's gradients.
SAME_LOSS, SAME_GRADIENTS = 1e-5, 1e-3
# Large blocks go back to the system at once, so that the peak is that of what is in use.
MEMORY_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


@dataclass(frozen=True)
class Contestant:
    """A package.

    Attributes:
        name: What the tables call it.
        environment: Folder of its environment within ``--environments``; None for the one that runs this file.
        command: Its file, and what it is told besides the task.
        denominator: What it divides a step's loss by (see ``Task``).
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
            said = "\n".join(self._log.read_text().splitlines()[-20:])
            sys.exit(f"{' '.join(map(str, self._process.args))} has ended:\n{said}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def running(contestant: Contestant, task: Task, environments: Path, **variables: str) -> Iterator[Running]:
    """Start a contestant on a task, and end it."""
    own = contestant.environment
    python = Path(sys.executable) if own is None else environments / own / "bin" / "python"
    script, *arguments = contestant.command
    command = [str(python), str(HERE / script), task.folder, *arguments]
    log = Path(task.folder) / f"{script}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    if own is not None:
        # Ours may be found through it, and one package has our import name.
        environment.pop("PYTHONPATH", None)
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        try:
            yield Running(process, log)
        finally:
            process.kill()


def compare(peer: Contestant, task: Task, environments: Path) -> dict[str, float]:
    """Compare loss and gradients of the first step with ours; end the program where they differ.

    Returns:
        The relative difference of the loss, and the largest of a weight's gradients.
    """
    losses, gradients = [], []
    for number, contestant in enumerate((OURS, peer)):
        file = f"{task.folder}/{number}.safetensors"
        with running(contestant, with_denominator(task, peer.denominator), environments) as process:
            losses.append(process.ask(f"gradients {file}")["loss"])
        gradients.append(load_file(file))
    ours, theirs = gradients
    if ours.keys() != theirs.keys():
        sys.exit(f"{peer.name} trains other weights than ours: {sorted(ours.keys() ^ theirs.keys())}")
    loss = abs(losses[1] / losses[0] - 1)
    gradient = max(float((theirs[name] - one).norm() / one.norm()) for name, one in ours.items())
    if loss > SAME_LOSS or gradient > SAME_GRADIENTS:
        sys.exit(
            f"{peer.name} does not compute what ours does: its loss is {losses[1]}, ours {losses[0]}; gradients differ "
            f"by up to {gradient:.1e}"
        )
    return {"loss": loss, "gradients": gradient}


def with_denominator(task: Task, denominator: str) -> Task:
    """Say in the task's folder what a step's loss is divided by."""
    task = replace(task, denominator=denominator)
    task.write_settings()
    return task


def measure(task: Task, environments: Path, rounds: int) -> dict[str, Any]:
    """Compare the contestants on a task, let them take steps in turn, and measure their memory."""
    same = {peer.name: compare(peer, task, environments) for peer in PEERS}
    task = with_denominator(task, OURS.denominator)
    contestants = (OURS, *PEERS)
    figures: dict[str, dict[str, Any]] = {}
    for contestant in contestants:
        with running(contestant, task, environments, **MEMORY_SETTINGS) as process:
            memory = [process.ask("memory")["bytes"] / 2**20]
            figures[contestant.name] = {"trained": process.trained, "memory": memory, "cpu": [], "wall": []}
    for contestant, step in in_turn(contestants, task, environments, rounds):
        for clock in ("cpu", "wall"):
            figures[contestant.name][clock].append(step[clock])
    return {"task": asdict(task), "same": same, "figures": figures}


def in_turn(
    contestants: tuple[Contestant, ...], task: Task, environments: Path, rounds: int
) -> Iterator[tuple[Contestant, dict[str, Any]]]:
    """Yield the steps of all contestants, one after the other, after one of each that does not count."""
    with ExitStack() as stack:
        processes = [(one, stack.enter_context(running(one, task, environments))) for one in contestants]
        for _, process in processes:
            process.ask("step")
        for number in range(rounds):
            print(f"  round {number + 1} of {rounds}", file=sys.stderr)
            for contestant, process in processes:
                yield contestant, process.ask("step")


def table(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a Markdown table of one task, with a line above it that says which."""
    task, figures = Task(**result["task"]), result["figures"]
    trained = figures[OURS.name]["trained"] / 1e6
    yield (
        f"{task.steps} steps, {task.supervised:.0%} supervised; width {task.hidden}, vocabulary {task.vocabulary:,}, "
        f"draft vocabulary {task.draft_vocabulary:,}, {task.length:,} tokens; {trained:.2f} M trained"
    )
    yield ""
    yield "| contestant | CPU a step | of ours | wall a step | of ours | memory | of ours | loss, gradients apart |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, values in figures.items():
        cells = [name]
        for what, unit in (("cpu", "{:.3f} s"), ("wall", "{:.3f} s"), ("memory", "{:,.0f} MiB")):
            value, ours = (statistics.median(one[what]) for one in (values, figures[OURS.name]))
            cells += [unit.format(value), f"{value / ours:.2f}"]
        apart = result["same"].get(name)
        cells.append(f"{apart['loss']:.0e}, {apart['gradients']:.0e}" if apart else "")
        yield f"| {' | '.join(cells)} |"
    yield ""


def main() -> None:
    """Measure every case and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=Path(".venv-peers"), help="Folder given to install.")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="WIDTH,VOCABULARY,DRAFT_VOCABULARY,LENGTH",
        default=["256,4096,1024,512", "512,32000,8000,2048"],
        help="Widths are multiples of 256.",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="STEPS,SHARE",
        default=["7,0.3", "7,1", "3,0.3"],
        help="Draft steps, and share of the rows that are supervised.",
    )
    parser.add_argument("--rounds", type=int, default=7, help="Steps of each contestant that count.")
    parser.add_argument("--output", type=Path, help="JSON file for every figure.")
    arguments = parser.parse_args()
    if not (arguments.environments / "ready").exists():
        parser.error(f"{arguments.environments} has no environments; make them: {HERE / 'install'} FOLDER")
    results = []
    for shape in arguments.shapes:
        sizes = [int(one) for one in shape.split(",")]
        for case in arguments.cases:
            steps, share = case.split(",")
            print(f"shape {shape}, case {case}", file=sys.stderr)
            with tempfile.TemporaryDirectory() as folder:
                task = Task(folder, *sizes, int(steps), float(share))
                task.write()
                results.append(measure(task, arguments.environments.absolute(), arguments.rounds))
            print("\n".join(table(results[-1])), flush=True)
            if arguments.output is not None:
                machine = {"processor": platform.processor(), "torch": torch.__version__}
                arguments.output.write_text(json.dumps({**machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
