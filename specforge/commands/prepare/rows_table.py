"""The summary of prepared rows on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from specforge.data.rows.coverage import Coverage
from specforge.data.rows.prepared import Prepared
from specforge.data.rows.summary import BadRows, RowsSummary

_MOST_REASONS = 10
_RARE = ("corrected generation tags", "chats split by turn", "tokens repeated for that")  # shown if there are any


def print_prepared(prepared: Prepared, console: Console) -> None:
    """Print a summary of the rows, and the coverage of draft vocabularies; fits 80 columns."""
    console.print(_rows(prepared))
    bad = _by_count(prepared.total)
    for _, one in bad[:_MOST_REASONS]:
        console.print(Text(f"bad: {one.count:,}, such as {one.first}", style="yellow"), soft_wrap=True)
    if len(bad) > _MOST_REASONS:
        console.print(Text(f"bad: {len(bad) - _MOST_REASONS:,} more reasons in summary.json", style="yellow"))
    console.print()
    console.print(_coverage(prepared.coverage))


def _rows(prepared: Prepared) -> Table:
    summaries = dict(prepared.splits)
    if len(summaries) > 1:
        summaries["all"] = prepared.total
    table = _table("Rows", *summaries)
    figures = [_figures(summary) for summary in summaries.values()]
    for name, figure in figures[-1].items():
        if name not in _RARE or not figure.startswith("0"):
            table.add_row(name, *(column[name] for column in figures))
    for reason in prepared.total.dropped:
        table.add_row(Text(f"dropped: {reason}"), *(f"{one.dropped.get(reason, 0):,}" for one in summaries.values()))
    for reason, _ in _by_count(prepared.total)[:_MOST_REASONS]:
        counts = [one.bad[reason].count if reason in one.bad else 0 for one in summaries.values()]
        table.add_row(Text(f"bad: {reason}"), *(f"{count:,}" for count in counts))
    return table


def _by_count(summary: RowsSummary) -> list[tuple[str, BadRows]]:
    """Return the reasons for bad rows, most frequent first."""
    return sorted(summary.bad.items(), key=lambda item: -item[1].count)


def _figures(summary: RowsSummary) -> dict[str, str]:
    return {
        "rows": f"{summary.rows:,}",
        "tokens": f"{summary.tokens:,}",
        "supervised tokens": f"{summary.supervised_tokens:,}",
        "supervised share": f"{summary.supervised_tokens / summary.tokens:.1%}",
        "end token": f"supervised {summary.ended_replies:,} of {summary.replies:,}" if summary.replies else "unknown",
        "corrected generation tags": f"{summary.corrected_replies:,}",
        "chats split by turn": f"{summary.split_chats:,}",
        "tokens repeated for that": f"{summary.repeated_tokens:,} ({summary.repeated_tokens / summary.tokens:.1%})",
        "truncated rows": f"{summary.truncated:,}",
        "dropped rows": f"{sum(summary.dropped.values()):,}",
    }


def _coverage(coverage: list[Coverage]) -> Table:
    has_validation = coverage[0].validation is not None
    table = _table("Draft vocabulary", "train", *(["validation"] if has_validation else []))
    for one in coverage:
        shares = [one.train] if one.validation is None else [one.train, one.validation]
        table.add_row(f"{one.draft_vocab_size:>7,} tokens", *(f"{share:.2%}" for share in shares))
    return table


def _table(subject: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(subject)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
