"""The published learning-rate schedule of MLP speculators: one cycle for each stage."""

from __future__ import annotations

import math


def two_stage_factor(step: int, begin: int | None, total_steps: int) -> float:
    """Return the learning rate of a step as a share of the peak.

    In a stage of n steps it is the lower of a parabola that rises over w = min(2000, n / 20) steps, 1 - (1 - x / w)^2,
    and a cosine that falls over all n: in stage 1 from 1 to 0.1, in stage 2 from 0.1 to 0.01. The peak is just below 1.

    Args:
        step: The optimizer step, counted from 0.
        begin: The first step of stage 2; None without one.
        total_steps: Number of optimizer steps in the whole run.
    """
    if begin is None or step < begin:
        return _cycle(step, begin or total_steps, peak=1.0)
    return _cycle(step - begin, total_steps - begin, peak=0.1)


def _cycle(step: int, steps: int, peak: float) -> float:
    warmup = max(1.0, min(2000, steps / 20))
    rising = 1 - (1 - min(1.0, (step + 1) / warmup)) ** 2
    falling = 0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps)))) / 2
    return peak * min(rising, falling)
