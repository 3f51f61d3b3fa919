"""The figure of acceptance: by position, a curve for each validation, and over the run, a curve for each position."""

from __future__ import annotations

import math
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt
from lightning.pytorch import Callback, LightningModule, Trainer

from specforge.drawing import plot_style
from specforge.training.attached import is_fitting
from specforge.training.callbacks.board.writers import show_image
from specforge.training.module import DraftModule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CURVES = 8
MOST_LISTED = 16

# Steps trained, and the rates by position: joint and conditional.
Curve = tuple[int, list[float], list[float]]


class AcceptanceFigure(Callback):
    """Draws acceptance by position after each validation, with the curves of earlier validations."""

    def __init__(self) -> None:
        self._curves: list[Curve] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a curve, and draw."""
        joint, conditional = (accept_rates(trainer, pl_module, kind) for kind in ("pos", "cond"))
        if not is_fitting(trainer) or not joint:
            return
        self._curves.append((trainer.global_step, joint, conditional))
        show_image(trainer, "val/acceptance_by_position", lambda: draw_acceptance(self._curves))

    def state_dict(self) -> dict[str, Any]:
        """Return the curves, for the checkpoint."""
        return {"curves": self._curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves of the run so far."""
        self._curves = list(state_dict["curves"])


def accept_rates(trainer: Trainer, pl_module: LightningModule, kind: Literal["pos", "cond"]) -> list[float]:
    """Return the last validation's acceptance rates at positions 1, 2, ... of the longest greedy chain.

    Args:
        trainer: The trainer, which holds the metrics.
        pl_module: The module that logged them.
        kind: ``"pos"`` for the share of the rounds that accept at least k tokens, ``"cond"`` for the share among those
            that accept k - 1.
    """
    suffix = cast(DraftModule, pl_module).means["val"].suffix
    rates = (trainer.callback_metrics.get(f"val/accept_rate_{kind}_{position}{suffix}") for position in count(1))
    return [float(one) for one in takewhile(lambda one: one is not None, rates) if one is not None]


def draw_acceptance(curves: list[Curve]) -> npt.NDArray[np.uint8]:
    """Draw acceptance by position, later curves darker, and over the run.

    Args:
        curves: The curves in order; of many, some are drawn, evenly spaced and including the last.

    Returns:
        The picture, [height, width, 3].
    """
    shown = curves[::-1][:: math.ceil(len(curves) / MOST_CURVES)][::-1]
    with plot_style():
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # One above the other: TensorBoard's cards are narrow.
        figure = Figure(figsize=(5.2, 8.8), dpi=110, facecolor="white")
        # Fixed margins: computing them takes as long as the drawing.
        margins = {"left": 0.12, "right": 0.76, "top": 0.965, "bottom": 0.06, "hspace": 0.38}
        joint, conditional, over_run = figure.subplots(3, 1, gridspec_kw=margins)
        for number, (steps, *rates) in enumerate(shown, start=1):
            color = colormaps["viridis_r"](number / len(shown))
            for axes, values in zip((joint, conditional), rates, strict=True):
                axes.plot(range(1, len(values) + 1), values, color=color, marker="o", markersize=4, label=f"{steps:,}")
        _describe(joint, "Accepted in all rounds", "Position in the draft")
        _describe(conditional, "Accepted if all before it were", "Position in the draft")
        _add_legend(joint, "after steps")
        _draw_over_run(over_run, shown)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3]


def _draw_over_run(axes: Axes, curves: list[Curve]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    positions = max(len(joint) for _, joint, _ in curves)
    for position in range(positions):
        steps, rates = zip(*((at, joint[position]) for at, joint, _ in curves if position < len(joint)), strict=True)
        color = colormaps["plasma"](0.9 * position / positions)  # a palette of few colors would repeat them
        axes.plot(steps, rates, color=color, marker="o", markersize=3, label=f"{position + 1}")
    _describe(axes, "Accepted in all rounds, over the run", "Optimizer steps")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _add_legend(axes, "position")


def _add_legend(axes: Axes, title: str) -> None:
    """Draw the legend beside the curves, which may be anywhere in the chart; of many, it lists some."""
    listed = axes.lines[:: math.ceil(len(axes.lines) / MOST_LISTED)]
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "handlelength": 1, "labelspacing": 0.2}
    axes.legend(handles=listed, title=title, loc="upper left", bbox_to_anchor=(1.0, 1.06), **style)


def _describe(axes: Axes, title: str, x_label: str) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_ylim(0, 1.03)
    axes.grid(axis="y")
