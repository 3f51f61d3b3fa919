"""The plot of coverage by draft size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specforge.data.rows.coverage import Coverage
from specforge.drawing import COLORS, house_style
from specforge.files import whole_file


def draw_coverage(coverage: Sequence[Coverage], path: Path) -> None:
    """Draw coverage by draft size as an SVG file; equal figures give equal files.

    Args:
        coverage: The figures, by ascending size.
        path: The file to write.
    """
    with house_style():
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter

        matplotlib.rcParams["svg.hashsalt"] = "coverage"
        figure = Figure(figsize=(5.4, 3.2), layout="constrained", facecolor="white")
        axes = figure.subplots()
        sizes = [one.draft_vocab_size for one in coverage]
        axes.plot(sizes, [one.train for one in coverage], color=COLORS[0], marker="o", label="training rows")
        held_out = [one.validation for one in coverage if one.validation is not None]
        if held_out:
            axes.plot(sizes, held_out, color=COLORS[1], marker="s", linestyle="--", label="validation rows")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
        axes.set_xlabel("Draft vocabulary: the most frequent supervised training tokens")
        axes.set_ylabel("Supervised tokens in it")
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.grid(axis="y")
        axes.legend(frameon=False)
        with whole_file(path) as file:
            figure.savefig(file, format="svg", facecolor="white", metadata={"Date": None})
