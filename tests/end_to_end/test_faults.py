"""Runs that are repeatedly interrupted at random moments reach the same weights.

SPECFORGE_FAULTS=50 sets the number of interruptions; -s shows each.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from quickstart_runs import Workshop
from run_processes import QUIET, Process, begin
from safetensors.torch import load_file
from training_runs import assert_same_values, assert_same_weights

from specforge.__main__ import main
from specforge.data.features import growing
from specforge.training.module import DraftModule
from specforge.training.runs import resolve_checkpoint

FAULTS = int(os.environ.get("SPECFORGE_FAULTS", "9"))
RUNS: dict[str, dict[str, Any]] = {
    "eagle3, accumulated": {
        "trainer": {"max_steps": 9, "accumulate_grad_batches": 2, "val_check_interval": 4},
    },
    "eagle with noise, recorded": {
        "algorithm": "eagle",
        "trainer": {"max_steps": 18, "val_check_interval": 4},
        "model": {"optimizer": {"lr": 1e-3}, "schedule": {"warmup": 1}},
        "data": {"features": "record"},
    },
    "mlp, two stages": {
        "algorithm": "mlp",
        "trainer": {"max_steps": 14},
        "model": {
            "draft": {"num_layers": 2, "intermediate_size": 48},
            "stage_two": {"begin": 7, "prompt_length": 16, "new_tokens": 4},
        },
    },
}


def kill(process: Process, chance: random.Random, last: Path) -> set[int]:
    process.send(signal.SIGKILL)
    return {-signal.SIGKILL}


def terminate(process: Process, chance: random.Random, last: Path) -> set[int]:
    process.send(signal.SIGTERM)
    return {128 + signal.SIGTERM, -signal.SIGTERM}  # the second before training starts


def fill_the_disk(process: Process, chance: random.Random, last: Path) -> set[int]:
    """Limit the size of files to less than a checkpoint."""
    limit = chance.randrange(10_000, 1_000_000)
    resource.prlimit(process.child, resource.RLIMIT_FSIZE, (limit, limit))
    return {1}


def kill_and_damage(process: Process, chance: random.Random, last: Path) -> set[int]:
    """Kill, then truncate the newest checkpoint, flip a bit of it, or replace it by another file."""
    process.send(signal.SIGKILL)
    ended = os.waitid(os.P_PID, process.child, os.WEXITED | os.WNOWAIT)
    if ended is not None and ended.si_code == os.CLD_KILLED and last.exists():
        content = bytearray(last.read_bytes())
        position = chance.randrange(len(content))
        how = chance.choice(["cut", "changed", "foreign"])
        content[position] ^= 1 << chance.randrange(8)
        last.write_bytes({"cut": content[:position], "changed": content, "foreign": b"hello"}[how])
    return {-signal.SIGKILL}


KINDS = [kill, terminate, fill_the_disk, kill_and_damage]
# The run's message, if it can print one.
MESSAGES = {128 + signal.SIGTERM: "Stopped by SIGTERM", 1: "cannot be written"}
SAVE_EVERY = 2


@pytest.fixture(autouse=True)
def progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the number of completed steps; recorded states are written at once."""
    file = tmp_path / "step"
    original = DraftModule.training_step

    def step(self: DraftModule, batch: Any, batch_idx: int) -> Any:
        with file.open("a", encoding="utf-8") as steps:
            steps.write(f"{self.trainer.global_step}\n")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DraftModule, "training_step", step)
    monkeypatch.setattr(growing, "SHARD_BYTES", 1)
    return file


def assert_same_outcome(run: Path, straight: Path) -> None:
    first, second = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (run, straight))
    for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_same_values(first[key], second[key])
    first, second = (load_file(folder / "draft" / "model.safetensors") for folder in (run, straight))
    assert_same_weights(first, second)


def newest(output: Path) -> Path:
    return max(output.glob("version_*"), key=lambda run: int(run.name.removeprefix("version_")), default=output)


@pytest.mark.parametrize(("number", "name"), enumerate(RUNS))
def test_a_run_reaches_the_same_weights_after_any_fault(workshop: Workshop, progress: Path, number: int, name: str):
    for key, value in RUNS[name].items():
        own = workshop.values[key]
        workshop.values[key] = value if key == "model" or isinstance(value, str) else own | value
    # Recorded states are stored per run: the next run finds none.
    output, cache = workshop.folder / "runs", workshop.folder / "cache"
    words = ["fit", *workshop.words("runs", QUIET, f"--save_every_n_steps={SAVE_EVERY}", "--ckpt_path=auto")]
    words.append(f"--data.cache_dir={cache}")
    log = workshop.folder / "output.log"
    start = time.monotonic()
    assert begin(lambda: main(words), log).wait() == 0, log.read_text(encoding="utf-8")
    seconds = time.monotonic() - start
    straight = output.rename(workshop.folder / "whole") / "version_0"
    shutil.rmtree(cache / "features", ignore_errors=True)

    chance = random.Random(number)
    faults = [KINDS[index % len(KINDS)] for index in range(number, FAULTS, len(RUNS))]
    while faults:
        log.unlink()
        progress.unlink(missing_ok=True)
        process = begin(lambda: main(words), log)
        time.sleep(chance.uniform(0, seconds))
        expected = faults[0](process, chance, newest(output) / "checkpoints" / "last.ckpt")
        status = process.wait()
        if status == 0:  # the run had already finished; do not count it
            assert_same_outcome(newest(output), straight)
            shutil.rmtree(output)
            shutil.rmtree(cache / "features", ignore_errors=True)
            continue
        assert status in expected, process.shown
        assert "Traceback" not in process.shown and MESSAGES.get(status, "") in process.shown, process.shown
        # At most the steps after the last checkpoint are repeated; after the previous one if the last is damaged.
        found = resolve_checkpoint("auto", output)
        saved = torch.load(found, weights_only=True)["global_step"] if found else 0
        steps = progress.read_text(encoding="utf-8").split() if progress.exists() else []
        done = int(steps[-1]) if steps else saved
        again = max(0, done - saved)  # a run that is stopped finishes and saves one more step
        assert again <= 2 * SAVE_EVERY
        print(f"fault | {name} | {faults.pop(0).__name__} | {status} | {bool(steps)} | {done} | {again}")
    assert begin(lambda: main(words), log).wait() == 0, log.read_text(encoding="utf-8")
    assert_same_outcome(newest(output), straight)
