"""Human-readable numbers with units, and times."""

from __future__ import annotations


def in_units(number: float, unit: str) -> str:
    """Return a number with an SI prefix of its unit; 1 kB is 1,000 bytes."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:,.2f} {prefix}{unit}" if prefix else f"{number:,.0f} {unit}"
        number /= 1000
    return f"{number:,.2f} P{unit}"


def duration(seconds: float) -> str:
    """Return a time in at most two units."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:,.1f} days"
