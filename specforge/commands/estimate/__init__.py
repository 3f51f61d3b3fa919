"""``specforge estimate``, and what it shows."""
