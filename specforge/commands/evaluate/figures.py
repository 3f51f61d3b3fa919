"""Figures as SVG to embed in the report's page.

matplotlib is slow to import, so it is imported on use. Figures are created without pyplot.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

from specforge.drawing import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"))
WIDTH, WIDE = 5.4, 10.8  # inches


@dataclass(frozen=True)
class Mark:
    """An entry of a plot's legend.

    Attributes:
        name: Label of the entry.
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
        title: Title of the plot.
        note: How to read it.
        legend: Entries of the legend, in order.
        svg: The ``<svg>`` element; names in it are escaped.
        is_wide: Whether it takes the full width of the page.
    """

    title: str
    note: str
    legend: list[Mark]
    svg: str
    is_wide: bool = False


def new_figure(width: float, height: float) -> Figure:
    """Create a figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def whole_numbers(axes: Axes, last: int, first: int) -> None:
    """Label the x axis with the whole numbers from first to last."""
    step = math.ceil((last - first + 1) / 12)
    axes.set_xticks(range(first, last + 1, step))
    axes.set_xlim(first - 0.5, last + 0.5)


def percentages(axes: Axes) -> None:
    """Label the y axis with percentages."""
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.grid(axis="y")


def lengths(axes: Axes) -> None:
    """Label the y axis with acceptance lengths, from 1."""
    axes.set_ylabel("Tokens per verifier pass")
    axes.set_ylim(1, max(1.1, axes.get_ylim()[1]))
    axes.grid(axis="y")


def embedded(title: str, note: str, legend: list[Mark], figure: Figure, is_wide: bool = False) -> Plot:
    """Turn a finished figure into a plot of the page; see ``Plot`` for the arguments."""
    import matplotlib

    stream = StringIO()
    # Identifiers are salted hashes; plots of one page must not share them.
    matplotlib.rcParams["svg.hashsalt"] = title
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = stream.getvalue()
    svg = svg[svg.index("<svg ") :].replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    svg = re.sub(rf"(fill|stroke): {INK}", r"\1: currentColor", svg)
    referenced = set(re.findall(r"#([\w-]+)", svg))
    # matplotlib restarts the numbering of groups in each plot, but identifiers must be unique in the page.
    svg = re.sub(r'<(\w+) id="([^"]*)"', lambda tag: tag[0] if tag[2] in referenced else f"<{tag[1]}", svg)
    return Plot(title, note, legend, svg.strip(), is_wide)
