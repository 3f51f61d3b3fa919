"""Location of recorded runs of published implementations: two per algorithm in the repository, or all of them."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ALL = TESTS.parents[1] / "shared" / "golden"
ROOT = Path(os.environ.get("SPECFORGE_GOLDEN") or (ALL if ALL.is_dir() else TESTS / "golden" / "cases")).resolve()
CASES = [path.parent for path in sorted(ROOT.rglob("case.json"))]
