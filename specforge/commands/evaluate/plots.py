"""The plots of contenders: each has one color and mark in all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specforge.commands.evaluate import formatting
from specforge.commands.evaluate.figures import (
    MARKS,
    WIDE,
    WIDTH,
    Mark,
    Plot,
    embedded,
    lengths,
    new_figure,
    percentages,
    whole_numbers,
)
from specforge.drawing import COLORS, INK, plot_style
from specforge.evaluation.results import ContenderResult, Measurement, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Different from the contenders' colors, and in lightness too.
PARTS = {"draft": "#3aa08f", "verifier": "#8f8f8f", "other": "#e3b23c"}
NAME_LENGTH = 28  # characters


@dataclass(frozen=True)
class _Drawn:
    """A contender with its mark."""

    contender: ContenderResult
    mark: Mark
    marker: str

    @property
    def pooled(self) -> Measurement:
        return self.contender.all_sets

    def line(self, axes: Axes, positions: Sequence[float], values: Sequence[float]) -> None:
        axes.plot(
            positions,
            values,
            color=self.mark.color,
            marker=self.marker,
            markersize=5,
            linewidth=1.6,
            linestyle="--" if self.contender.is_baseline else "-",
        )


def plots(results: Results) -> list[Plot]:
    """Draw all plots that have data.

    Returns:
        The plots in the order of the page; equal results give equal plots, byte for byte.
    """
    drawn = []
    for index, contender in enumerate(results.contenders):
        marker, sign = MARKS[index % len(MARKS)]
        drawn.append(_Drawn(contender, Mark(contender.name, COLORS[index % len(COLORS)], sign), marker))
    drawn = [one for one in drawn if one.pooled.num_drafts]
    draw = (_by_position, _by_prompt_set, _by_position_in_text, _by_chain_length, _histogram, _times)
    with plot_style():
        return [plot for one in draw if (plot := one(drawn)) is not None]


def _by_position(drawn: list[_Drawn]) -> Plot | None:
    shown = [one for one in drawn if one.pooled.accept_rate_pos]
    if not shown:
        return None
    figure = new_figure(WIDE, 2.9)
    joint, conditional = figure.subplots(1, 2, sharey=True)
    for one in shown:
        for axes, rates in ((joint, one.pooled.accept_rate_pos), (conditional, one.pooled.accept_rate_cond)):
            one.line(axes, range(1, len(rates) + 1), rates)
    for axes, label in (
        (joint, "Joint: of all drafts"),
        (conditional, "Conditional: if all before it were accepted"),
    ):
        axes.set_xlabel("Position in the draft")
        axes.set_title(label, fontsize=9, loc="left")
        whole_numbers(axes, max(len(one.pooled.accept_rate_pos) for one in shown), first=1)
    percentages(joint)
    joint.set_ylabel("Accepted")
    joint.set_ylim(0, 1.03)
    conditional.grid(axis="y")
    return embedded(
        "Acceptance by position",
        "Left: how often a draft was accepted at least up to this position. Right: how often the token there was "
        "accepted if all before it were; a flat line means that the draft does not get worse along the chain.",
        _legend(shown),
        figure,
        is_wide=True,
    )


def _by_prompt_set(drawn: list[_Drawn]) -> Plot | None:
    if not drawn:
        return None
    names = [measurement.prompt_set for measurement in formatting.measurements(drawn[0].contender)]
    figure = new_figure(WIDE, 0.9 + 0.25 * len(names) * (len(drawn) + 0.6))
    axes = figure.subplots()
    thickness = 1 / (len(drawn) + 0.6)
    longest = 1.0
    for index, one in enumerate(drawn):
        for row, measurement in enumerate(formatting.measurements(one.contender)):
            if not measurement.num_drafts:
                continue
            middle = row + (index - (len(drawn) - 1) / 2) * thickness
            length = measurement.acceptance_length
            axes.barh(middle, length - 1, left=1, height=0.85 * thickness, color=one.mark.color)
            low, high = measurement.confidence_interval or (length, length)
            axes.hlines(middle, low, high, color=INK, linewidth=1.2)
            text = f"{length:.2f}"
            end = max(length, high)
            axes.annotate(text, (end, middle), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
            longest = max(longest, end)
    axes.set_yticks(range(len(names)), [formatting.shortened(name, NAME_LENGTH) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(1, 1 + 1.1 * max(longest - 1, 0.1))
    axes.set_xlabel("Tokens per verifier pass; 1 is without speculation")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    return embedded(
        "Acceptance length by prompt set",
        "Bars start at 1, so a bar shows the draft's gain. Thin lines are 95 % confidence intervals.",
        _legend(drawn),
        figure,
        is_wide=True,
    )


def _by_position_in_text(drawn: list[_Drawn]) -> Plot | None:
    shown = [one for one in drawn if any(span.drafts for span in one.pooled.by_stretch)]
    if not shown:
        return None
    spans = sorted({(each.begin, each.end) for one in shown for each in one.pooled.by_stretch})
    figure = new_figure(WIDTH, 2.9)
    axes = figure.subplots()
    for one in shown:
        points = {
            spans.index((each.begin, each.end)): each.acceptance_length for each in one.pooled.by_stretch if each.drafts
        }
        one.line(axes, list(points), list(points.values()))
    # More than six labels would overlap.
    ticks = range(0, len(spans), math.ceil(len(spans) / 6))
    axes.set_xticks(ticks, [f"{spans[tick][0]}–{spans[tick][1] - 1}" for tick in ticks])
    axes.set_xlabel("Token of the response at which the round began")
    lengths(axes)
    return embedded(
        "Acceptance length by position in the text",
        "Shows whether acceptance changes as the response grows.",
        _legend(shown),
        figure,
    )


def _by_chain_length(drawn: list[_Drawn]) -> Plot | None:
    shown = [one for one in drawn if one.pooled.by_chain_length]
    if not shown:
        return None
    figure = new_figure(WIDTH, 2.9)
    axes = figure.subplots()
    for one in shown:
        values = one.pooled.by_chain_length
        one.line(axes, range(1, len(values) + 1), values)
    whole_numbers(axes, max(len(one.pooled.by_chain_length) for one in shown), first=1)
    axes.set_xlabel("Chain length K")
    lengths(axes)
    return embedded(
        "Acceptance length by chain length",
        "With chains of K tokens, by replay on the verifier's own responses. Where the line flattens, longer chains "
        "cost time without benefit.",
        _legend(shown),
        figure,
    )


def _histogram(drawn: list[_Drawn]) -> Plot | None:
    shown = [one for one in drawn if sum(one.pooled.histogram)]
    if not shown:
        return None
    figure = new_figure(WIDTH, 2.9)
    axes = figure.subplots()
    width = 0.84 / len(shown)
    for index, one in enumerate(shown):
        counts = one.pooled.histogram
        positions = [number + (index - (len(shown) - 1) / 2) * width for number in range(len(counts))]
        axes.bar(positions, [count / sum(counts) for count in counts], width=0.94 * width, color=one.mark.color)
    whole_numbers(axes, max(len(one.pooled.histogram) for one in shown) - 1, first=0)
    percentages(axes)
    axes.set_xlabel("Accepted tokens")
    axes.set_ylabel("Drafts")
    return embedded(
        "Accepted tokens per draft", "Share of the drafts with this number of accepted tokens.", _legend(shown), figure
    )


def _times(drawn: list[_Drawn]) -> Plot | None:
    shown = [one for one in drawn if sum(_parts(one.pooled))]
    if not shown:
        return None
    figure = new_figure(WIDTH, max(1.6, 0.8 + 0.5 * len(shown)))
    axes = figure.subplots()
    for row, one in enumerate(shown):
        left = 0.0
        for part, color in zip(_parts(one.pooled), PARTS.values(), strict=True):
            axes.barh(row, part, left=left, height=0.6, color=color)
            left += part
        axes.annotate(f"{left:.2f}", (left, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [formatting.shortened(one.contender.name, NAME_LENGTH) for one in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, 1.15 * max(sum(_parts(one.pooled)) for one in shown))
    axes.set_xlabel("Milliseconds per round")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    legend = [Mark(name, color) for name, color in PARTS.items()]
    return embedded("Time per round", "Time of a round by part: draft, verifier, and the loop itself.", legend, figure)


def _parts(measurement: Measurement) -> tuple[float, float, float]:
    return measurement.draft_milliseconds, measurement.verifier_milliseconds, measurement.other_milliseconds


def _legend(drawn: Sequence[_Drawn]) -> list[Mark]:
    return [one.mark for one in drawn]
