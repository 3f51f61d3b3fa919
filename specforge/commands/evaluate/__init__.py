"""``specforge evaluate`` and its output."""
