"""Private names of datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def fingerprint_of(rows: Dataset) -> str:
    """Return the digest of a data set's content and creation."""
    return str(rows._fingerprint)
