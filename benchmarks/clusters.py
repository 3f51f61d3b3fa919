"""A column of the table in docs/clusters.md: what capturing, storing and training on 100 million tokens takes.

    python benchmarks/clusters.py --config FILE [flags of specforge estimate]

All figures follow from those of ``specforge estimate``: a verifier's operations at the utilisation that training
reaches, and the bytes of its states.
"""

from __future__ import annotations

import sys

import torch

from specforge.commands.estimate.command import HELP, EstimateCLI, estimate
from specforge.commands.trainer import choose, quieten
from specforge.commands.units import duration, in_units
from specforge.estimation.step import VERIFIER


def main(words: list[str]) -> None:
    """Print the figures."""
    quieten()
    algorithm = choose(words, HELP)
    assert algorithm is not None
    found = estimate(EstimateCLI(algorithm, words, "estimate"))
    tokens, devices = found.text.tokens, found.plan.devices
    rates = [found.device_flops * share for share in found.utilisation]
    captured = [rate / found.flops[VERIFIER] for rate in rates]
    trained = [found.tokens_per_step / seconds for seconds in reversed(found.seconds_per_step(stored=True))]
    two, one = (found.stored_bytes(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn))
    split = found.split
    steps = found.steps * found.plan.accumulated
    lines = {
        "verifier's weights": in_units(found.memory.verifier, "B"),
        "memory of a training GPU, whole verifier": in_units(found.memory.peak, "B"),
        "the same, verifier split over all GPUs": in_units(split.on_each(found.memory).peak, "B"),
        "the same, states from a store": in_units(found.memory.peak_stored, "B"),
        "gathered per step and GPU, split verifier": in_units(split.gathered, "B"),
        "operations per token: verifier, training": " + ".join(
            in_units(value, "FLOP") for value in (found.flops[VERIFIER], found.total_flops - found.flops[VERIFIER])
        ),
        "states per token, two bytes, one byte": f"{in_units(two, 'B')}, {in_units(one, 'B')}",
        "store": f"{in_units(two * tokens, 'B')}, {in_units(one * tokens, 'B')}",
        "capture, tokens/s of a GPU": " to ".join(f"{rate:,.0f}" for rate in captured),
        "capture, GPU hours": " to ".join(f"{tokens / rate / 3600:,.1f}" for rate in reversed(captured)),
        "written by a capturing GPU, two bytes": " to ".join(in_units(rate * two, "B/s") for rate in captured),
        "training from states, tokens/s of all GPUs": " to ".join(f"{rate:,.0f}" for rate in trained),
        "read by all training GPUs, two bytes": " to ".join(in_units(rate * two, "B/s") for rate in trained),
        "training from states, GPU hours": " to ".join(
            f"{seconds * found.steps * devices / 3600:,.1f}" for seconds in found.seconds_per_step(stored=True)
        ),
        "training with a split verifier, GPU hours": " to ".join(
            f"{seconds * found.steps * devices / 3600:,.1f}" for seconds in found.seconds_per_step()
        ),
        "gathering in this run, at 450 GB/s, at 50 GB/s": ", ".join(
            duration(split.gathered * steps / rate) for rate in (450e9, 50e9)
        ),
    }
    for name, value in lines.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main(sys.argv[1:])
