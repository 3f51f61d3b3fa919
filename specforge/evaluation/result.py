"""Base class of all parts of an evaluation's results."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Result(BaseModel):
    """A part of the results; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")
