"""Printing of an estimate on the terminal, 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from specforge.commands.units import duration, in_units
from specforge.estimation.estimate import STORED_TYPES, Estimate
from specforge.estimation.step import HEAD, LAYERS, OPTIMIZER, VERIFIER

_PARTS = {
    VERIFIER: "verifier, forward",
    LAYERS: "draft's layers, forward and backward",
    HEAD: "heads and loss, forward and backward",
    OPTIMIZER: "optimizer",
}
_MEMORY = {
    "verifier": "verifier's weights",
    "draft": "draft's weights",
    "gradients": "gradients",
    "optimizer": "optimizer's states",
    "features": "captured features",
    "kept": "activations of the draft for the backward pass",
    "verifier_work": "temporaries of the verifier's forward pass, peak",
    "draft_work": "temporaries of the draft's steps and the loss, peak",
}


def print_estimate(estimate: Estimate, title: str, assumptions: Iterable[str], console: Console) -> None:
    """Print an estimate in sections, and its assumptions.

    Args:
        estimate: The estimate.
        title: First line.
        assumptions: The assumptions, one sentence each.
        console: Console to print to.
    """
    console.print(Text(title, style="bold"))
    _section(console, "Text", _text(estimate))
    _section(console, "Disk, if the verifier's states are stored", _disk(estimate))
    _section(console, "Memory on each device", _memory(estimate))
    _section(console, "Floating point operations per token", _flops(estimate))
    _section(console, "Time", _time(estimate))
    console.print(Text("\nAssumptions", style="bold"))
    for sentence in assumptions:
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_row(Text("*"), Text(sentence))
        console.print(Padding(line, (0, 0, 0, 2)))


def _section(console: Console, heading: str, rows: Iterable[Sequence[str]]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    for number, row in enumerate(rows):
        if not number:
            table.add_column(overflow="fold")
            for _ in row[1:]:
                table.add_column(justify="right", no_wrap=True)
        table.add_row(*map(Text, row))
    console.print(Text(f"\n{heading}", style="bold"))
    console.print(Padding(table, (0, 0, 0, 2)))


def _text(estimate: Estimate) -> Iterable[Sequence[str]]:
    text, plan = estimate.text, estimate.plan
    yield "tokens per epoch", f"{text.tokens:,}"
    yield "supervised", f"{text.supervised_share:.1%}"
    yield f"rows of up to {text.batches[0]['input_ids'].shape[1]:,} tokens", f"{text.packed_rows:,}"
    devices = f", {plan.devices} devices" if plan.devices > 1 else ""
    accumulated = f", {plan.accumulated} batches per step" if plan.accumulated > 1 else ""
    rows = f"{plan.batch_size} row{'s' * (plan.batch_size > 1)} per batch"
    yield f"optimizer steps ({rows}{devices}{accumulated})", f"{estimate.steps:,}"


def _disk(estimate: Estimate) -> Iterable[Sequence[str]]:
    yield f"{estimate.slots} x {estimate.width:,} values per token", "per token", "per epoch"
    for dtype in STORED_TYPES:
        size = estimate.stored_bytes(dtype)
        scales = " and scales" if dtype.itemsize == 1 else ""
        name = str(dtype).removeprefix("torch.") + scales
        yield name, in_units(size, "B"), in_units(size * estimate.text.tokens, "B")


def _memory(estimate: Estimate) -> Iterable[Sequence[str]]:
    for name, words in _MEMORY.items():
        yield words, in_units(getattr(estimate.device, name), "B")
    yield "peak", in_units(estimate.device.peak, "B")
    yield "peak, with stored states", in_units(estimate.memory.peak_stored, "B")
    if estimate.device_memory is not None:
        yield "memory of a device", in_units(estimate.device_memory, "B")


def _flops(estimate: Estimate) -> Iterable[Sequence[str]]:
    for part, words in _PARTS.items():
        value = estimate.flops.get(part, 0)
        if value:
            yield words, in_units(value, "FLOP"), f"{value / estimate.total_flops:.0%}"
    yield "total", in_units(estimate.total_flops, "FLOP"), ""


def _time(estimate: Estimate) -> Iterable[Sequence[str]]:
    low, high = estimate.utilisation
    yield f"peak rate of a device, {low:.0%} to {high:.0%} utilised", in_units(estimate.device_flops, "FLOP/s")
    for stored, words in ((False, ""), (True, ", with stored states")):
        shortest, longest = estimate.seconds_per_step(stored)
        yield f"an optimizer step{words}", f"{duration(shortest)} to {duration(longest)}"
        yield f"the run{words}", f"{duration(shortest * estimate.steps)} to {duration(longest * estimate.steps)}"
