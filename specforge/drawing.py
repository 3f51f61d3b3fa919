"""Colors and settings that all plots share. matplotlib is slow to import, so it is imported on use."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# The palette of Okabe and Ito, which people with any color vision can tell apart, without its yellow (too pale on
# white) and with a gray for its black (invisible on a dark page). Colors and markers repeat with different periods.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
# Replaced by the page's text color, which differs in dark mode.
INK = "#1f2329"
LINES = "#8a9099"


@contextmanager
def plot_style() -> Iterator[None]:
    """Draw with the settings below, independent of the user's; the process's settings are restored."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # Text stays text, which the reader's browser draws in its own font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "text.parse_math": False,  # a dollar sign in a name is a dollar sign
                "font.size": 9,
                "axes.labelsize": 9,
                "text.color": INK,
                "axes.labelcolor": INK,
                "xtick.labelcolor": INK,
                "ytick.labelcolor": INK,
                "axes.edgecolor": LINES,
                "xtick.color": LINES,
                "ytick.color": LINES,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "grid.color": LINES,
                "grid.alpha": 0.3,
                "grid.linewidth": 0.6,
                "figure.facecolor": "none",
                "axes.facecolor": "none",
                "savefig.facecolor": "none",
            }
        )
        yield
