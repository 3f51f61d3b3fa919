"""``specforge estimate`` and its output."""
