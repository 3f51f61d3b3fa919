"""From the cost of a step to the cost of a run: disk, memory, operations and time."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from specforge.data.features.dtypes import state_bytes
from specforge.data.loader import Batch
from specforge.estimation.step import OPTIMIZER, VERIFIER, SplitVerifier, StepCost, StepMemory
from specforge.estimation.text import RunText

# Share of a device's rate on large matrix products that training reaches overall. Accelerators: published trainers
# (SpecForge 43 to 44 %, and less without tuning); CPUs: measured, see docs/estimate.md.
ACCELERATOR_UTILISATION = (0.25, 0.5)
CPU_UTILISATION = (0.15, 0.8)
STORED_TYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.int8)


@dataclass(frozen=True)
class RunPlan:
    """Batches and length of a run.

    Attributes:
        batch_size: Packed rows per batch, on each device.
        devices: Number of data-parallel devices.
        accumulated: Number of batches whose gradients are accumulated for one step.
        max_epochs: Number of epochs; None if only steps end the run.
        max_steps: Number of optimizer steps; None if only epochs end the run.
        limit: Batches of an epoch that are trained on, a number or a share.
    """

    batch_size: int
    devices: int
    accumulated: int
    max_epochs: int | None
    max_steps: int | None
    limit: int | float

    def steps(self, packed_rows: int) -> int:
        """Return the number of optimizer steps of the run, for the number of packed rows per epoch."""
        batches = math.ceil(packed_rows / (self.batch_size * self.devices))
        batches = min(batches, self.limit) if isinstance(self.limit, int) else int(batches * self.limit)
        by_epochs = None if self.max_epochs is None else self.max_epochs * math.ceil(batches / self.accumulated)
        return min(steps for steps in (by_epochs, self.max_steps) if steps is not None)


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a run.

    Attributes:
        text: The training text.
        plan: Batches and length of the run.
        flops: Floating point operations per token, by part.
        memory: Bytes on each device, with the whole verifier.
        trained: Number of trained weights.
        slots: Number of verifier states per token that the draft reads.
        width: Number of values of a state.
        device_flops: Peak operations per second of one device.
        utilisation: The lowest and the highest share of the peak that training reaches.
        verifier_layers: Bytes of each of the verifier's layers.
        is_split: Whether its layers are split over the devices.
        device_memory: Bytes of memory of one device; None if unknown.
    """

    text: RunText
    plan: RunPlan
    flops: dict[str, float]
    memory: StepMemory
    trained: int
    slots: int
    width: int
    device_flops: float
    utilisation: tuple[float, float]
    verifier_layers: list[int]
    is_split: bool = False
    device_memory: float | None = None

    @property
    def split(self) -> SplitVerifier:
        """The verifier, if it is or were split over the devices."""
        return SplitVerifier(self.verifier_layers, self.plan.devices)

    @property
    def device(self) -> StepMemory:
        """Bytes on each device of this run."""
        return self.split.on_each(self.memory) if self.is_split else self.memory

    def fits(self, peak: int) -> bool:
        """Return whether some peak fits on a device; True if its memory is unknown."""
        return self.device_memory is None or peak <= self.device_memory

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the run."""
        return self.plan.steps(self.text.packed_rows)

    @property
    def tokens_per_step(self) -> float:
        """Tokens of all devices in one optimizer step, without padding."""
        rows = self.plan.batch_size * self.plan.devices * self.plan.accumulated
        return self.text.tokens * min(1, rows / self.text.packed_rows)

    @property
    def total_flops(self) -> float:
        """Operations per token."""
        return sum(self.flops.values())

    def seconds_per_step(self, stored: bool = False) -> tuple[float, float]:
        """Return the shortest and the longest time of one optimizer step, in seconds.

        Args:
            stored: The verifier's states are read from disk; reading is assumed to take no time.
        """
        flops = self.total_flops - (self.flops[VERIFIER] if stored else 0)
        at_best = self.tokens_per_step * flops / (self.device_flops * self.plan.devices)
        lowest, highest = self.utilisation
        return at_best / highest, at_best / lowest

    def stored_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of a token's states on disk, scales included."""
        return self.slots * state_bytes(self.width, dtype)


def flops_per_token(costs: list[StepCost], batches: list[Batch], accumulated: int) -> dict[str, float]:
    """Divide the operations of some batches by their number of tokens, without padding.

    Args:
        costs: Cost of each batch.
        batches: The batches.
        accumulated: Number of batches per optimizer step.
    """
    tokens = sum(int((batch["document_ids"] >= 0).sum()) for batch in batches)
    total: Counter[str] = Counter()
    for cost in costs:
        total.update(cost.flops)
    return {part: value / tokens / (accumulated if part == OPTIMIZER else 1) for part, value in total.items()}
