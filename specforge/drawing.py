"""How plots look: the colors and settings that all of them share. matplotlib is imported on use: it takes a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# The palette of Okabe and Ito, which people with any color vision tell apart, without its yellow (too pale on white)
# and with a gray for its black (none on a dark page). Colors and marks repeat after different numbers of contenders.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
# Stands for the color of a page's text, which is another one in dark mode.
INK = "#1f2329"
LINES = "#8a9099"


@contextmanager
def house_style() -> Iterator[None]:
    """Draw with the settings below, whatever the person's own are; the process's are put back."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # Texts stay texts, which the reader's browser draws in its own font.
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
