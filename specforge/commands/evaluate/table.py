"""Results on the terminal: a comparison of all contenders, the figures of each in vLLM's terms, and warnings."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from specforge.commands.evaluate import formatting, served_formatting
from specforge.commands.evaluate.formatting import in_process
from specforge.commands.evaluate.served_table import print_served
from specforge.evaluation.results import ContenderResult, Measurement, Results

# The rest of 80 columns after the numbers; contenders with longer names are numbered, and named in full below.
NAME_WIDTH = 20


def print_table(results: Results, console: Console | None = None) -> None:
    """Print results; a terminal of 80 columns is wide enough.

    Args:
        results: The results.
        console: Console to print to; None for standard output. No colors with ``NO_COLOR`` or without a terminal.
    """
    console = console or Console()
    # Names are printed as Text, so that rich interprets no markup in them.
    console.print(Text(f"{results.verifier}: {formatting.conditions(results)}"))
    if results.served is not None:
        print_served(results.served, console)
    if in_process(results):
        console.print()
        console.print(_comparison(results))
    for contender, label in zip(results.contenders, _labels(results), strict=True):
        console.print()
        console.print(_heading(contender, label))
        console.print(Padding(_figures(contender), (0, 0, 0, 2)))
    warnings = [*formatting.warnings(results), *served_formatting.warnings(results.served)]
    if warnings:
        console.print()
    for warning in warnings:
        console.print(Text(f"WARNING: {warning}.", style="bold yellow"))


def _comparison(results: Results) -> Table:
    """Compare all contenders: for each, a row with its name, then one for each prompt set."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("Contender\n  prompt set", max_width=NAME_WIDTH, overflow="fold")
    table.add_column("Acceptance length\n[95 % interval]", no_wrap=True)
    table.add_column("Accepted (%)\nat 1, 2, …", overflow="fold")
    for header in ("Tokens/s\nwith", "Tokens/s\nwithout", "Speedup"):
        table.add_column(header, justify="right", no_wrap=True)
    for contender, label in zip(results.contenders, _labels(results), strict=True):
        table.add_row(Text(label, style="bold"))
        for measurement in formatting.measurements(contender):
            table.add_row(*(Text(cell) for cell in _row(measurement)))
    return table


def _row(measurement: Measurement) -> list[str]:
    return [
        f"  {formatting.shortened(measurement.prompt_set, NAME_WIDTH - 2)}",
        f"{formatting.acceptance_length(measurement)} {formatting.interval(measurement)}".rstrip(),
        " ".join(f"{100 * rate:.0f}" for rate in measurement.accept_rate_pos) or formatting.UNKNOWN,
        formatting.decimal(measurement.tokens_per_second, 1),
        formatting.decimal(measurement.tokens_per_second_alone, 1),
        f"{formatting.decimal(measurement.speedup)}×",
    ]


def _labels(results: Results) -> list[str]:
    """Return each contender's name, or a number if the name is too long for the table."""
    names = (one.name for one in results.contenders)
    return [name if len(name) <= NAME_WIDTH else f"({number})" for number, name in enumerate(names, start=1)]


def _heading(contender: ContenderResult, label: str) -> Text:
    kind = "baseline" if contender.is_baseline else "draft"
    number = "" if label == contender.name else f"{label} "
    return Text.assemble((f"{number}{contender.name}", "bold"), f" ({kind}: {formatting.proposal(contender)})")


def _figures(contender: ContenderResult) -> Table:
    """Return the figures of one contender over all prompt sets, one per line."""
    pooled = contender.all_sets
    parts = {
        "draft": pooled.draft_milliseconds,
        "verifier": pooled.verifier_milliseconds,
        "other": pooled.other_milliseconds,
    }
    times = " + ".join(f"{formatting.decimal(value)} {part}" for part, value in parts.items())
    lines = {
        "Mean acceptance length": formatting.acceptance_length(pooled),
        "Drafts": f"{pooled.num_drafts:,}",
        "Draft tokens": f"{pooled.num_draft_tokens:,}",
        "Accepted tokens": f"{pooled.num_accepted_tokens:,}",
        "Per-position acceptance rate": formatting.series(pooled.accept_rate_pos),
        "Avg Draft acceptance rate": formatting.draft_acceptance_rate(pooled),
        "Milliseconds per round": times,
        "Other / verifier time": formatting.other_share(pooled),
    }
    if pooled.by_chain_length:
        lines["Acceptance length, K = 1, 2, …"] = formatting.series(pooled.by_chain_length, 2)
    if contender.modelled_speedups and contender.draft_cost is not None:
        lines["Modelled speedup, K = 1, 2, …"] = formatting.modelled(contender)
    if pooled.identical_responses is not None:
        lines["Identical responses"] = formatting.identical(pooled)
    if pooled.compared_rounds:
        same = pooled.compared_rounds - pooled.differing_rounds
        lines["Rounds as in replay"] = f"{same:,} of {pooled.compared_rounds:,}"
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, Text(value))
    return table
