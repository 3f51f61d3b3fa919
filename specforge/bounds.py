"""Bounded number types, which jsonargparse and pydantic check while they parse a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from jsonargparse.typing import restricted_number_type
from pydantic import BeforeValidator, Field

LARGEST = 2**53
"""Upper bound for numbers of steps, rows or tokens: floats represent every integer up to here exactly."""

# Defined in their own module: jsonargparse reads the TYPE_CHECKING blocks of the module whose hints it resolves.
if TYPE_CHECKING:
    RowLength = int
    Steps = int
    BatchSize = int
    Workers = int
    Seed = int
    Interval = int
    Share = float
    Decay = float
    Weight = float
else:
    RowLength = restricted_number_type("RowLength", int, [(">=", 2), ("<=", 2**24)], docstring="int of at least 2")
    Steps = restricted_number_type("Steps", int, [(">=", 1), ("<=", 100)], docstring="int from 1 to 100")
    BatchSize = restricted_number_type("BatchSize", int, [(">=", 1), ("<=", 2**20)], docstring="int from 1 to 2**20")
    Workers = restricted_number_type("Workers", int, [(">=", 0), ("<=", 256)], docstring="int from 0 to 256")
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)], docstring="int from 0 to 2**32 - 1")
    Interval = restricted_number_type("Interval", int, [(">=", 1), ("<=", LARGEST)], docstring="int of at least 1")
    Share = restricted_number_type("Share", float, [(">=", 0), ("<", 1)], docstring="float from 0 to below 1")
    Decay = restricted_number_type("Decay", float, [(">", 0), ("<=", 1)], docstring="float above 0, at most 1")
    Weight = restricted_number_type("Weight", float, [(">=", 0), ("<=", 1e6)], docstring="float from 0 to 1e6")


def _is_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Number = BeforeValidator(_is_number)
"""Rejects true and false, which pydantic would accept as 1 and 0."""

Layers = Annotated[int, Field(ge=1, le=100), Number]
Width = Annotated[int, Field(ge=0, le=2**20), Number]
Count = Annotated[int, Field(ge=1, le=LARGEST), Number]
LearningRate = Annotated[float, Field(gt=0, le=1000), Number]
Amount = Annotated[float, Field(ge=0, le=LARGEST), Number]
Portion = Annotated[float, Field(ge=0, le=1), Number]

VerifierType = Literal["auto", "float32", "bfloat16", "float16"]
"""Dtype of a verifier's weights."""
FeatureType = Literal["bfloat16", "float32", "float8_e4m3fn", "int8"]
"""Dtype of stored states."""
