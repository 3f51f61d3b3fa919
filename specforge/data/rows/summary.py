"""How the rows of a source are treated, and the counts of the outcome."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from specforge.data.text.origin import Origin
from specforge.errors import UsageError

MAX_BAD_SHARE = 0.05  # default share of a source's rows that may be bad


@dataclass(frozen=True)
class RowSettings:
    """How to treat long and bad rows.

    Attributes:
        max_length: Longest row in tokens.
        long_rows: ``truncate`` cuts longer rows at the end, ``drop`` leaves them out.
        bad_rows: ``drop`` leaves bad rows out and counts them, ``refuse`` fails at the first.
        max_bad_share: Share of the source's rows that may be bad.
    """

    max_length: int
    long_rows: Literal["truncate", "drop"]
    bad_rows: Literal["drop", "refuse"] = "drop"
    max_bad_share: float = MAX_BAD_SHARE


@dataclass
class BadRows:
    """Rows that are bad for one reason.

    Attributes:
        count: Number of rows.
        first: Error message of the first one, with its file and line.
    """

    count: int
    first: str

    def __add__(self, other: BadRows) -> BadRows:
        """Return the sum; ``first`` is that of ``self``."""
        return BadRows(self.count + other.count, self.first)


@dataclass
class RowsSummary:
    """Counts of a source's rows after preparation.

    Attributes:
        rows: Rows kept.
        tokens: Tokens of the kept rows.
        supervised_tokens: Tokens of the kept rows whose loss mask is set.
        truncated: Rows that were truncated.
        dropped: Rows that were left out, by reason.
        bad: Bad rows of the source, which were left out, by reason.
        replies: Supervised spans in the kept rows; 0 for token rows, whose end tokens are not looked up.
        ended_replies: Spans whose last token is an end token of the verifier.
        corrected_replies: Spans that the template's generation tags marked wrong.
        split_chats: Chats stored as one row per turn because the template rewrites earlier turns.
        repeated_tokens: Tokens of these rows without the last row of each chat.
        source_rows: Rows of the source that were read.
        origins: Distinct origins of the responses in the kept rows; None stands for rows without one.
    """

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    bad: dict[str, BadRows] = field(default_factory=dict)
    replies: int = 0
    ended_replies: int = 0
    corrected_replies: int = 0
    split_chats: int = 0
    repeated_tokens: int = 0
    source_rows: int = 0
    origins: list[Origin | None] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read a summary back."""
        read = {
            "bad": {reason: BadRows(**one) for reason, one in values["bad"].items()},
            "origins": [one and Origin.model_validate(one) for one in values["origins"]],
        }
        return cls(**{**values, **read})

    def to_json(self) -> dict[str, Any]:
        """Return JSON-serializable values."""
        return {
            **vars(self),
            "bad": {reason: vars(one) for reason, one in self.bad.items()},
            "origins": [one and one.model_dump() for one in self.origins],
        }

    def __add__(self, other: RowsSummary) -> RowsSummary:
        """Return the combined summary."""
        bad = dict(self.bad)
        for reason, one in other.bad.items():
            bad[reason] = bad[reason] + one if reason in bad else one
        merged: dict[str, Any] = {
            "dropped": dict(Counter(self.dropped) + Counter(other.dropped)),
            "bad": bad,
            "origins": list(dict.fromkeys([*self.origins, *other.origins])),
        }
        names = [name for name in vars(self) if name not in merged]
        return RowsSummary(**{name: getattr(self, name) + getattr(other, name) for name in names}, **merged)

    @property
    def bad_rows(self) -> int:
        """Number of bad rows of the source."""
        return sum(one.count for one in self.bad.values())

    def require_few_bad(self, settings: RowSettings, source: str, expected: int = 0) -> None:
        """Refuse a source with too many bad rows.

        Args:
            settings: How many are allowed.
            source: Its name, for the message.
            expected: Expected rows of a source that is still being read; ignored if more were read.

        Raises:
            UsageError: There are more bad rows than allowed.
        """
        number = max(self.source_rows, expected)
        if not self.bad or (settings.bad_rows == "drop" and self.bad_rows <= settings.max_bad_share * number):
            return
        worst = sorted(self.bad.items(), key=lambda item: -item[1].count)
        shown = "; ".join(f"{one.count:,} ({reason}), the first: {one.first}" for reason, one in worst[:3])
        allowed = (
            "bad_rows: refuse allows none"
            if settings.bad_rows == "refuse"
            else f"max_bad_share allows {settings.max_bad_share:.0%}"
        )
        raise UsageError(f"{source}: {self.bad_rows:,} of {number:,} rows are bad, and {allowed}: {shown}")
