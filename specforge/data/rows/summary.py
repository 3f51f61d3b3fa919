"""What is done with the rows of a source, and what became of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from specforge.data.text.origin import Origin
from specforge.errors import UsageError

MAX_BAD_SHARE = 0.05  # of a source's rows that may be bad, unless it is set


@dataclass(frozen=True)
class RowSettings:
    """What is done with long rows, and with bad ones.

    Attributes:
        max_length: longest row, in tokens.
        long_rows: `truncate` cuts longer rows at the end, `drop` leaves them out.
        bad_rows: `drop` leaves bad rows out and counts them, `refuse` ends with the first.
        max_bad_share: share of the source's rows that may be bad.
    """

    max_length: int
    long_rows: Literal["truncate", "drop"]
    bad_rows: Literal["drop", "refuse"] = "drop"
    max_bad_share: float = MAX_BAD_SHARE


@dataclass
class BadRows:
    """Rows that are bad for one reason.

    Attributes:
        count: how many.
        first: what is wrong with the first of them, with its file and line.
    """

    count: int
    first: str

    def __add__(self, other: BadRows) -> BadRows:
        """Return both; the first stays the first."""
        return BadRows(self.count + other.count, self.first)


@dataclass
class RowsSummary:
    """What became of a source.

    Attributes:
        rows: rows kept.
        tokens: tokens in them.
        supervised_tokens: tokens in them whose loss mask is set.
        truncated: rows that were cut.
        dropped: rows that were left out, by reason.
        bad: rows of the source that were left out since they are bad, by reason.
        replies: supervised spans in the rows kept; 0 of rows of tokens, since the end tokens are not looked up.
        ended_replies: those whose last token is an end token of the verifier.
        corrected_replies: those that the template's generation tags marked wrong.
        split_chats: chats of which each turn is a row, since the template rewrites earlier turns.
        repeated_tokens: tokens that these rows hold besides the last of their chat.
        source_rows: rows of the source that were read.
        origins: who wrote the responses of the rows kept, each once; None stands for rows that do not say.
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
        """Return plain values that JSON can hold."""
        return {
            **vars(self),
            "bad": {reason: vars(one) for reason, one in self.bad.items()},
            "origins": [one and one.model_dump() for one in self.origins],
        }

    def __add__(self, other: RowsSummary) -> RowsSummary:
        """Return the summary of both."""
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
        """Rows of the source that are bad."""
        return sum(one.count for one in self.bad.values())

    def require_few_bad(self, settings: RowSettings, source: str, expected: int = 0) -> None:
        """Refuse a source with too many bad rows.

        Args:
            settings: how many may be.
            source: its name, for the message.
            expected: rows that it has, while it is still read; those that were read count if they are more.

        Raises:
            UsageError: more are bad.
        """
        number = max(self.source_rows, expected)
        if not self.bad or (settings.bad_rows == "drop" and self.bad_rows <= settings.max_bad_share * number):
            return
        worst = sorted(self.bad.items(), key=lambda item: -item[1].count)
        shown = "; ".join(f"{one.count:,} ({reason}), the first {one.first}" for reason, one in worst[:3])
        allowed = (
            "bad_rows: refuse allows none"
            if settings.bad_rows == "refuse"
            else f"max_bad_share allows {settings.max_bad_share:.0%}"
        )
        raise UsageError(f"{source}: {self.bad_rows:,} of {number:,} rows are bad, and {allowed}: {shown}")
