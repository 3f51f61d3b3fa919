"""Settings of decoding; imported without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Verification(BaseModel):
    """How proposed tokens are verified."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["token", "block", "typical"] = Field(
        default="token",
        description="token: one after the other, lossless. block: a sampled chain as a whole, lossless, accepts at "
        "least as many. typical: LOSSY, accepts tokens that are typical enough for the verifier.",
    )
    posterior_threshold: float = Field(
        default=0.09, gt=0, le=1, description="typical: a token this probable is always accepted."
    )
    posterior_alpha: float = Field(
        default=0.3, gt=0, description="typical: a token is accepted above this value times exp(-entropy)."
    )
