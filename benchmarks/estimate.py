"""Compare ``specforge estimate`` with real training steps: operations, memory and time, on the CPU with one thread.

Takes the arguments of ``specforge fit``. Rows are printed for ``docs/estimate.md``::

    OMP_NUM_THREADS=1 python benchmarks/estimate.py --config configs/quickstart.yaml

Eight steps are timed by the processor time of this process, so that other processes do not count. Memory is the peak
over these steps, less the memory before verifier and draft are created. Torch's ``FlopCounterMode`` counts eight
further steps. Needs Linux, where the peak can be reset.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from specforge.commands.estimate.estimating import EstimateCLI, estimate
from specforge.commands.trainer import choose
from specforge.commands.units import in_units
from specforge.estimation.shapes import MORE_FORMULAS
from specforge.training.cli.command_line import TrainingCLI

WARMUP, STEPS = 2, 8
FIT_ONLY = [
    *("--trainer.max_steps", str(WARMUP + 2 * STEPS), "--trainer.limit_val_batches", "0"),
    *("--trainer.enable_progress_bar", "false", "--trainer.logger", "false"),
]


class Measure(Callback):
    """Measures time and memory over some steps, then counts the operations of the same number of steps."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.base = self.memory = self.flops = self.tokens = self.counted_tokens = 0
        self._counter = FlopCounterMode(display=False, custom_mapping=MORE_FORMULAS)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record the memory before the models are created."""
        self.base = _status("VmRSS")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start measuring or counting."""
        tokens = int((batch["document_ids"] >= 0).sum())
        if batch_idx == WARMUP:
            Path("/proc/self/clear_refs").write_text("5")
            self.seconds -= time.process_time()
        if WARMUP <= batch_idx < WARMUP + STEPS:
            self.tokens += tokens
        if batch_idx == WARMUP + STEPS:
            self.seconds += time.process_time()
            self.memory = _status("VmHWM") - self.base
            self._counter.__enter__()
        if batch_idx >= WARMUP + STEPS:
            self.counted_tokens += tokens

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting."""
        self._counter.__exit__(None, None, None)
        self.flops = self._counter.get_total_flops()


def main(arguments: list[str]) -> None:
    """Measure, estimate, and print both."""
    torch.set_num_threads(1)
    algorithm = choose(arguments, __doc__ or "")
    if algorithm is None:
        return
    measure = Measure()
    with tempfile.TemporaryDirectory() as folder:
        fit = TrainingCLI(algorithm, [*arguments, *FIT_ONLY, "--output_dir", folder], "fit")
        fit.trainer.callbacks.append(measure)
        fit.run()
    found = estimate(EstimateCLI(algorithm, arguments, "estimate"))
    shortest, longest = (seconds / found.tokens_per_step * 1e3 for seconds in found.seconds_per_step())
    rate = measure.flops / measure.counted_tokens * measure.tokens / measure.seconds
    print(f"operations a token: {found.total_flops:,.0f}, counted {measure.flops / measure.counted_tokens:,.0f}")
    print(f"memory: {in_units(found.memory.peak, 'B')}, measured {in_units(measure.memory, 'B')}")
    print(f"time a token: {shortest:.3f} to {longest:.3f} ms, measured {measure.seconds / measure.tokens * 1e3:.3f} ms")
    print(f"utilisation: {rate / found.device_flops:.1%} of {found.device_flops / 1e9:,.1f} GFLOP/s")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1:])
