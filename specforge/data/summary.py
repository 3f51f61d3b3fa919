"""What is done with the rows of a source, and what became of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from specforge.data.origin import Origin


@dataclass(frozen=True)
class RowSettings:
    """What is done with long rows.

    Attributes:
        max_length: longest row, in tokens.
        long_rows: `truncate` cuts longer rows at the end, `drop` leaves them out.
    """

    max_length: int
    long_rows: Literal["truncate", "drop"]


@dataclass
class RowsSummary:
    """What became of a source.

    Attributes:
        rows: rows kept.
        tokens: tokens in them.
        supervised_tokens: tokens in them whose loss mask is set.
        truncated: rows of the source that were cut.
        dropped: rows of the source that were left out, by reason.
        origins: who wrote the responses of the rows kept, each once; None stands for rows that do not say.
    """

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    origins: list[Origin | None] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read a summary back."""
        return cls(**{**values, "origins": [one and Origin.model_validate(one) for one in values["origins"]]})

    def to_json(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {**asdict(self), "origins": [one and one.model_dump() for one in self.origins]}

    def __add__(self, other: RowsSummary) -> RowsSummary:
        """Return the summary of both."""
        return RowsSummary(
            rows=self.rows + other.rows,
            tokens=self.tokens + other.tokens,
            supervised_tokens=self.supervised_tokens + other.supervised_tokens,
            truncated=self.truncated + other.truncated,
            dropped=dict(Counter(self.dropped) + Counter(other.dropped)),
            origins=list(dict.fromkeys([*self.origins, *other.origins])),
        )
