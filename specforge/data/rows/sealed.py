"""JSON files that carry their own checksum, so that corruption is detected."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SEAL = "checksum"


def write_sealed(path: Path, values: Mapping[str, Any], indent: int | None = None) -> None:
    """Write JSON values and their checksum."""
    path.write_text(json.dumps({**values, _SEAL: _checksum(values)}, indent=indent) + "\n", encoding="utf-8")


def read_sealed(path: Path) -> dict[str, Any]:
    """Read the values back.

    Raises:
        OSError: The file cannot be read.
        ValueError: The checksum is wrong or missing.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or values.pop(_SEAL, None) != _checksum(values):
        raise ValueError("its checksum is wrong")
    return values


def _checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values).encode())
