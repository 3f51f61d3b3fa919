"""Paths of the quickstart, and prompts for its verifier."""

from __future__ import annotations

from pathlib import Path

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"
VERIFIER = QUICKSTART / "verifier"
QUESTIONS = ["Ada has 3 apples. She buys 5 more. How many does she have?", "How many days are 3 weeks?"]
