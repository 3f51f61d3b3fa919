"""The plots of servers."""

from __future__ import annotations

from collections.abc import Sequence

from specforge.commands.evaluate.figures import (
    MARKS,
    WIDE,
    WIDTH,
    Mark,
    Plot,
    embedded,
    new_figure,
    percentages,
    whole_numbers,
)
from specforge.commands.evaluate.served_formatting import requests, server_name
from specforge.drawing import COLORS, plot_style
from specforge.evaluation.served import Served


def served_plots(served: Served) -> list[Plot]:
    """Draw all plots that have data; equal results give equal plots, byte for byte."""
    with plot_style():
        drawn = (_speeds(served), _latencies(served), _rates(served), _expected(served))
        return [plot for plot in drawn if plot is not None]


def _marks(names: Sequence[str]) -> list[tuple[Mark, str]]:
    """Return a mark for each name, with matplotlib's name of its sign."""
    found = []
    for index, name in enumerate(names):
        marker, sign = MARKS[index % len(MARKS)]
        found.append((Mark(name, COLORS[index % len(COLORS)], sign), marker))
    return found


def _speeds(served: Served) -> Plot:
    speeds = [[one.at(load)[-1].tokens_per_second for load in served.concurrencies] for one in served.servers]
    note = "Tokens of all requests together, prefill included."
    return _by_load(served, "Tokens per second by load", note, {"Tokens per second": speeds})


def _latencies(served: Served) -> Plot:
    medians = [[one.at(load)[-1] for load in served.concurrencies] for one in served.servers]
    return _by_load(
        served,
        "Latency by load",
        "Medians over the responses, in milliseconds.",
        {
            "To the first token": [[each.first_token.p50 for each in line] for line in medians],
            "Per token after it": [[each.per_token.p50 for each in line] for line in medians],
        },
    )


def _by_load(served: Served, title: str, note: str, panels: dict[str, list[list[float]]]) -> Plot:
    """Draw a line for each server over the numbers of requests at a time."""
    marks = _marks([server_name(one) for one in served.servers])
    figure = new_figure(WIDTH * len(panels), 2.9)
    for axes, (label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for (mark, marker), server, values in zip(marks, served.servers, lines, strict=True):
            style = "--" if server.is_baseline else "-"
            axes.plot(range(len(values)), values, color=mark.color, marker=marker, linestyle=style, markersize=5)
        axes.set_xticks(range(len(served.concurrencies)), [f"{one:,}" for one in served.concurrencies])
        axes.set_xlabel("Requests at a time")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
    return embedded(title, note, [mark for mark, _ in marks], figure, is_wide=len(panels) > 1)


def _rates(served: Served) -> Plot | None:
    shown = [one for one in served.servers if one.measurements[-1].accept_rate_pos]
    if not shown:
        return None
    marks = _marks([server_name(one) for one in served.servers])
    figure = new_figure(WIDTH, 2.9)
    axes = figure.subplots()
    for (mark, marker), server in zip(marks, served.servers, strict=True):
        if server in shown:
            rates = server.measurements[-1].accept_rate_pos
            axes.plot(range(1, len(rates) + 1), rates, color=mark.color, marker=marker, markersize=5)
    whole_numbers(axes, max(len(one.measurements[-1].accept_rate_pos) for one in shown), first=1)
    percentages(axes)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("Position in the draft")
    axes.set_ylabel("Accepted")
    legend = [mark for (mark, _), one in zip(marks, served.servers, strict=True) if one in shown]
    return embedded(
        "Acceptance by position, served", "Share of the rounds that accepted at least this position.", legend, figure
    )


def _expected(served: Served) -> Plot | None:
    """Draw the expected speed by number of drafted tokens, a line for each load, and what was measured of it."""
    if not served.expectations:
        return None
    marks = _marks([requests(one.concurrency) for one in served.expectations])
    has_baseline = served.expectations[0].best.speedup is not None
    figure = new_figure(WIDE, 2.9)
    axes = figure.subplots()
    for (mark, marker), expected in zip(marks, served.expectations, strict=True):
        drafted = [one.draft_tokens for one in expected.lengths]
        speeds = [one.speedup if one.speedup is not None else one.tokens_per_second for one in expected.lengths]
        axes.plot(drafted, speeds, color=mark.color, linewidth=1.6)
        seen = {one.draft_tokens: one.measured_speedup for one in expected.lengths if one.measured_speedup is not None}
        axes.plot(list(seen), list(seen.values()), color=mark.color, marker=marker, linestyle="none")
    whole_numbers(axes, max(len(one.lengths) for one in served.expectations), first=1)
    axes.set_xlabel("Drafted tokens K")
    axes.set_ylabel("Speedup" if has_baseline else "Tokens per second of a request")
    axes.grid(axis="y")
    return embedded(
        "Expected speed by number of drafted tokens",
        "Lines are expected, marks measured. A line's highest point is at the number of tokens to draft at that load.",
        [mark for mark, _ in marks],
        figure,
        is_wide=True,
    )
