"""Training each contestant in a separate process: ours by ``specforge fit``, a peer by its script."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from capturing import Run, write_rows
from environments import interpreter, variables

from specforge.checkpoints.convert import convert

HERE = Path(__file__).parent
OURS = "ours"
# Names in the tables; keys of peers are the names of their environments.
PEERS = {"speculators": "speculators 0.9.0", "sglang": "SGLang's specforge 0.2.0"}
NAMES = {OURS: "specforge (this project)", **PEERS}


@dataclass(frozen=True)
class Trained:
    """A draft that was trained.

    Attributes:
        key: Key of its trainer in ``NAMES``.
        rate: Learning rate.
        seed: Seed of its weights.
        draft: Its folder, in our layout.
        seconds: CPU time of the complete training process.
    """

    key: str
    rate: float
    seed: int
    draft: Path
    seconds: float


@dataclass(frozen=True)
class Workshop:
    """Trains drafts, unless they exist.

    Attributes:
        words: Arguments of ``specforge fit``.
        seed: Seed of our run whose rows the peers get.
        environments: Folder of the peers' environments.
        output: Folder of the drafts.
    """

    words: Sequence[str]
    seed: int
    environments: Path
    output: Path

    @property
    def run(self) -> Run:
        """Our run whose rows the peers get."""
        return Run(self._run_folder(self.seed))

    def train(self, key: str, rate: float | None, seed: int) -> Trained:
        """Train a draft.

        Args:
            key: Key of its trainer in ``NAMES``.
            rate: Learning rate; ours is the recipe's.
            seed: Seed of its weights.
        """
        return self._train_ours(seed) if rate is None or key == OURS else self._train_peer(key, rate, seed)

    def _train_ours(self, seed: int) -> Trained:
        folder = self._run_folder(seed)
        own = ["--seed_everything", str(seed), "--output_dir", str(folder.parent), "--run_name", folder.name]
        own += ["--trainer.enable_progress_bar", "false"]
        seconds = run_once([sys.executable, "-m", "specforge", "fit", *self.words, *own], None, folder.parent)
        run = Run(folder)
        return Trained(OURS, run.settings["model"]["optimizer"]["lr"], seed, run.draft, seconds)

    def _train_peer(self, key: str, rate: float, seed: int) -> Trained:
        rows, folder = self.output.absolute() / "rows", self.output / f"{key}-{rate:g}-{seed}"
        write_rows(self.run, rows)
        written, draft = folder / "as-written", folder / "draft"
        words = [str(rows), "--rate", str(rate), "--seed", str(seed), "--output", str(written)]
        command = [interpreter(self.environments, key), str(HERE / f"train_{key}.py"), *words]
        seconds = run_once(command, key, folder)
        if not draft.exists():
            convert(str(written), self.run.verifier_name, draft)
        return Trained(key, rate, seed, draft, seconds)

    def _run_folder(self, seed: int) -> Path:
        return self.output / f"{OURS}-{seed}" / "run"


def run_once(command: Sequence[str], environment: str | None, folder: Path) -> float:
    """Run a command that writes a folder, unless it has been completed.

    Args:
        command: The command.
        environment: Name of its environment; None for this process's.
        folder: The folder; files of an interrupted command are removed.

    Returns:
        Its CPU time, in seconds.
    """
    done = folder / "seconds.json"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(f"{folder.name}: {' '.join(command)}", file=sys.stderr)
        before = _seconds_of_children()
        subprocess.run(command, env=variables(environment), stdout=sys.stderr, check=True)
        done.write_text(json.dumps(_seconds_of_children() - before))
    seconds: float = json.loads(done.read_text())
    return seconds


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
