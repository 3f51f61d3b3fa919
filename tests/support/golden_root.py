"""Where the recorded runs of other tools are."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(os.environ.get("SPECFORGE_GOLDEN") or Path(__file__).resolve().parents[2] / "../shared/golden").resolve()
"""The folder that the environment variable SPECFORGE_GOLDEN names."""
