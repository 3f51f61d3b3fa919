"""The plots of the report, as SVG to be set into the page: one color and mark a contender through all of them.

matplotlib is imported on use, since it takes a while. Figures are made without pyplot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

from specforge.commands.evaluate import words
from specforge.drawing import COLORS, INK, house_style
from specforge.evaluation.results import ContenderResult, Measurement, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"))
# Not the contenders' colors, and apart in lightness too.
PARTS = {"draft": "#3aa08f", "verifier": "#8f8f8f", "other": "#e3b23c"}
WIDTH, WIDE = 5.4, 10.8  # inches
NAME_LENGTH = 28  # characters


@dataclass(frozen=True)
class Mark:
    """An entry of a plot's legend.

    Attributes:
        name: What is drawn.
        color: Its color.
        sign: Its mark, as a character.
    """

    name: str
    color: str
    sign: str = "■"


@dataclass(frozen=True)
class Plot:
    """A plot of the page.

    Attributes:
        title: What it shows.
        note: How to read it.
        legend: What is drawn, in order.
        svg: The ``<svg>`` element; names in it are escaped.
        is_wide: Whether it takes the page's whole width.
    """

    title: str
    note: str
    legend: list[Mark]
    svg: str
    is_wide: bool = False


@dataclass(frozen=True)
class _Drawn:
    """A contender as it is drawn."""

    contender: ContenderResult
    mark: Mark
    marker: str

    @property
    def pooled(self) -> Measurement:
        return self.contender.all_sets

    def line(self, axes: Axes, places: Sequence[float], values: Sequence[float]) -> None:
        axes.plot(
            places,
            values,
            color=self.mark.color,
            marker=self.marker,
            markersize=5,
            linewidth=1.6,
            linestyle="--" if self.contender.is_baseline else "-",
        )


def plots(results: Results) -> list[Plot]:
    """Draw what there is data for; a plot without any is left out.

    Returns:
        The plots in the order of the page; equal results give equal plots, byte for byte.
    """
    drawn = []
    for index, contender in enumerate(results.contenders):
        marker, sign = MARKS[index % len(MARKS)]
        drawn.append(_Drawn(contender, Mark(contender.name, COLORS[index % len(COLORS)], sign), marker))
    drawn = [one for one in drawn if one.pooled.num_drafts]
    draw = (_by_position, _by_prompt_set, _by_stretch, _by_chain_length, _histogram, _times)
    with house_style():
        return [plot for one in draw if (plot := one(drawn)) is not None]


def _by_position(drawn: list[_Drawn]) -> Plot | None:
    shown = [one for one in drawn if one.pooled.accept_rate_pos]
    if not shown:
        return None
    figure = _figure(WIDE, 2.9)
    joint, conditional = figure.subplots(1, 2, sharey=True)
    for one in shown:
        for axes, rates in ((joint, one.pooled.accept_rate_pos), (conditional, one.pooled.accept_rate_cond)):
            one.line(axes, range(1, len(rates) + 1), rates)
    for axes, label in (
        (joint, "Joint: of all drafts"),
        (conditional, "Conditional: where all before it were accepted"),
    ):
        axes.set_xlabel("Position in the draft")
        axes.set_title(label, fontsize=9, loc="left")
        _whole_numbers(axes, max(len(one.pooled.accept_rate_pos) for one in shown), first=1)
    _percentages(joint)
    joint.set_ylabel("Accepted")
    joint.set_ylim(0, 1.03)
    conditional.grid(axis="y")
    return _plot(
        "Acceptance by position",
        "Left: how often a draft was accepted up to this position at least. Right: how often the token there was "
        "accepted once all before it were; a flat line means that the draft does not get worse along the chain.",
        shown,
        figure,
        is_wide=True,
    )


def _by_prompt_set(drawn: list[_Drawn]) -> Plot | None:
    if not drawn:
        return None
    names = [measurement.prompt_set for measurement in words.measurements(drawn[0].contender)]
    figure = _figure(WIDE, 0.9 + 0.25 * len(names) * (len(drawn) + 0.6))
    axes = figure.subplots()
    thickness = 1 / (len(drawn) + 0.6)
    longest = 1.0
    for index, one in enumerate(drawn):
        for place, measurement in enumerate(words.measurements(one.contender)):
            if not measurement.num_drafts:
                continue
            middle = place + (index - (len(drawn) - 1) / 2) * thickness
            length = measurement.acceptance_length
            axes.barh(middle, length - 1, left=1, height=0.85 * thickness, color=one.mark.color)
            low, high = measurement.confidence_interval or (length, length)
            axes.hlines(middle, low, high, color=INK, linewidth=1.2)
            text = f"{length:.2f}"
            end = max(length, high)
            axes.annotate(text, (end, middle), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
            longest = max(longest, end)
    axes.set_yticks(range(len(names)), [words.shortened(name, NAME_LENGTH) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(1, 1 + 1.1 * max(longest - 1, 0.1))
    axes.set_xlabel("Tokens a verifier pass; 1 is the verifier alone")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    return _plot(
        "Acceptance length by prompt set",
        "Bars begin at 1, so that a bar is what the draft adds. Thin lines are 95 % confidence intervals.",
        drawn,
        figure,
        is_wide=True,
    )


def _by_stretch(drawn: list[_Drawn]) -> Plot | None:
    shown = [one for one in drawn if any(stretch.drafts for stretch in one.pooled.by_stretch)]
    if not shown:
        return None
    stretches = sorted({(each.begin, each.end) for one in shown for each in one.pooled.by_stretch})
    figure = _figure(WIDTH, 2.9)
    axes = figure.subplots()
    for one in shown:
        points = {
            stretches.index((each.begin, each.end)): each.acceptance_length
            for each in one.pooled.by_stretch
            if each.drafts
        }
        one.line(axes, list(points), list(points.values()))
    # Labels of more stretches than these would run into each other.
    places = range(0, len(stretches), math.ceil(len(stretches) / 6))
    axes.set_xticks(places, [f"{stretches[place][0]}–{stretches[place][1] - 1}" for place in places])
    axes.set_xlabel("Token of the response at which the round began")
    _lengths(axes)
    return _plot(
        "Acceptance length by position in the text",
        "Whether the draft keeps up as the response grows.",
        shown,
        figure,
    )


def _by_chain_length(drawn: list[_Drawn]) -> Plot | None:
    shown = [one for one in drawn if one.pooled.by_chain_length]
    if not shown:
        return None
    figure = _figure(WIDTH, 2.9)
    axes = figure.subplots()
    for one in shown:
        lengths = one.pooled.by_chain_length
        one.line(axes, range(1, len(lengths) + 1), lengths)
    _whole_numbers(axes, max(len(one.pooled.by_chain_length) for one in shown), first=1)
    axes.set_xlabel("Chain length K")
    _lengths(axes)
    return _plot(
        "Acceptance length by chain length",
        "What it would be with chains of K tokens, by replay on the verifier's own responses. Where the line flattens, "
        "longer chains cost time and bring nothing.",
        shown,
        figure,
    )


def _histogram(drawn: list[_Drawn]) -> Plot | None:
    shown = [one for one in drawn if sum(one.pooled.histogram)]
    if not shown:
        return None
    figure = _figure(WIDTH, 2.9)
    axes = figure.subplots()
    width = 0.84 / len(shown)
    for index, one in enumerate(shown):
        counts = one.pooled.histogram
        places = [number + (index - (len(shown) - 1) / 2) * width for number in range(len(counts))]
        axes.bar(places, [count / sum(counts) for count in counts], width=0.94 * width, color=one.mark.color)
    _whole_numbers(axes, max(len(one.pooled.histogram) for one in shown) - 1, first=0)
    _percentages(axes)
    axes.set_xlabel("Accepted tokens")
    axes.set_ylabel("Drafts")
    return _plot("Accepted tokens a draft", "Share of the drafts of which so many tokens were accepted.", shown, figure)


def _times(drawn: list[_Drawn]) -> Plot | None:
    shown = [one for one in drawn if sum(_parts(one.pooled))]
    if not shown:
        return None
    figure = _figure(WIDTH, max(1.6, 0.8 + 0.5 * len(shown)))
    axes = figure.subplots()
    for place, one in enumerate(shown):
        left = 0.0
        for part, color in zip(_parts(one.pooled), PARTS.values(), strict=True):
            axes.barh(place, part, left=left, height=0.6, color=color)
            left += part
        axes.annotate(f"{left:.2f}", (left, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [words.shortened(one.contender.name, NAME_LENGTH) for one in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, 1.15 * max(sum(_parts(one.pooled)) for one in shown))
    axes.set_xlabel("Milliseconds a round")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    plot = _plot("Time a round", "Where a round's time goes: draft, verifier, and the loop around them.", [], figure)
    return Plot(plot.title, plot.note, [Mark(name, color) for name, color in PARTS.items()], plot.svg)


def _parts(measurement: Measurement) -> tuple[float, float, float]:
    return measurement.draft_milliseconds, measurement.verifier_milliseconds, measurement.other_milliseconds


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _whole_numbers(axes: Axes, last: int, first: int) -> None:
    step = math.ceil((last - first + 1) / 12)
    axes.set_xticks(range(first, last + 1, step))
    axes.set_xlim(first - 0.5, last + 0.5)


def _percentages(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.grid(axis="y")


def _lengths(axes: Axes) -> None:
    axes.set_ylabel("Tokens a verifier pass")
    axes.set_ylim(1, max(1.1, axes.get_ylim()[1]))
    axes.grid(axis="y")


def _plot(title: str, note: str, drawn: list[_Drawn], figure: Figure, is_wide: bool = False) -> Plot:
    import matplotlib

    stream = StringIO()
    # Identifiers are hashes of what they name and of this; plots of one page must not share them.
    matplotlib.rcParams["svg.hashsalt"] = title
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = stream.getvalue()
    svg = svg[svg.index("<svg ") :].replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    svg = re.sub(rf"(fill|stroke): {INK}", r"\1: currentColor", svg)
    referenced = set(re.findall(r"#([\w-]+)", svg))
    # matplotlib numbers its groups in each plot anew, but identifiers have to be unique in the page.
    svg = re.sub(r'<(\w+) id="([^"]*)"', lambda tag: tag[0] if tag[2] in referenced else f"<{tag[1]}", svg)
    return Plot(title, note, [one.mark for one in drawn], svg.strip(), is_wide)
