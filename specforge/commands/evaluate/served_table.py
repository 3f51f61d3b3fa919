"""Printing of servers' figures on the terminal, 80 columns wide."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from specforge.commands.evaluate import served_formatting
from specforge.commands.evaluate.formatting import decimal, series, shortened
from specforge.evaluation.served import Expectation, Served, ServedMeasurement

NAME_WIDTH = 20


def print_served(served: Served, console: Console) -> None:
    """Print the figures of each server, and what numbers of drafted tokens are expected to give."""
    for load in served.concurrencies:
        console.print()
        console.print(Text(f"Servers, {served_formatting.requests(load)}", style="bold"))
        console.print(_table(served, load))
    for server in served.servers:
        if rates := server.measurements[-1].accept_rate_pos:
            name = served_formatting.server_name(server)
            console.print(Text(f"Per-position acceptance rate of {name}: {series(rates)}"))
    if served.expectations:
        console.print()
        console.print(Text("How many tokens to draft, and the expected speed (measured)", style="bold"))
        console.print(Padding(_expected(served.expectations), (0, 0, 0, 2)))
        for one in served.expectations:
            console.print(Text(f"  {served_formatting.basis(one)}.", style="dim"))
        for one in served.expectations:
            console.print(Text(f"{served_formatting.advice(one)}."))


def _table(served: Served, load: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("Server\n  prompt set", max_width=NAME_WIDTH, overflow="fold")
    headers = ("Acc.\nlength", "Tokens/s\nof all", "Speed-\nup", "First token, ms\n50 / 99 %", "Per token\n50 / 99 %")
    for header in (*headers, "Whole, ms\n50 / 99 %"):
        table.add_column(header, justify="right", no_wrap=True)
    for server in served.servers:
        table.add_row(Text(served_formatting.server_name(server), style="bold"))
        for measured in server.at(load):
            table.add_row(*(Text(cell) for cell in _row(measured)))
    return table


def _row(measured: ServedMeasurement) -> list[str]:
    times = ((measured.first_token, 0), (measured.per_token, 1), (measured.whole, 0))
    cells = served_formatting.figures(measured)
    return [
        f"  {shortened(measured.prompt_set, NAME_WIDTH - 2)}",
        cells["Acceptance length"],
        cells["Tokens/s"],
        cells["Speedup"],
        *(f"{decimal(one.p50, digits)} / {decimal(one.p99, digits)}" for one, digits in times),
    ]


def _expected(expectations: list[Expectation]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("K", justify="right")
    for one in expectations:
        table.add_column(served_formatting.requests(one.concurrency).replace(" at a", "\nat a"), justify="right")
    for drafted in range(1, max(len(one.lengths) for one in expectations) + 1):
        cells = [served_formatting.expected_cell(one, drafted) for one in expectations]
        table.add_row(str(drafted), *map(Text, cells))
    return table
