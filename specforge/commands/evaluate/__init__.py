"""``specforge evaluate``, and what it shows."""
