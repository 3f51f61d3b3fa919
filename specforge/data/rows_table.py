"""The summary of prepared rows on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from specforge.data.coverage import Coverage
from specforge.data.prepared import Prepared
from specforge.data.summary import RowsSummary


def print_prepared(prepared: Prepared, console: Console) -> None:
    """Print what became of the rows, and what draft vocabularies cover; 80 columns are enough."""
    console.print(_rows(prepared))
    console.print()
    console.print(_coverage(prepared.coverage))


def _rows(prepared: Prepared) -> Table:
    summaries = dict(prepared.splits)
    if len(summaries) > 1:
        summaries["all"] = prepared.total
    table = _table("Rows", *summaries)
    figures = [_figures(summary) for summary in summaries.values()]
    for name in figures[0]:
        table.add_row(name, *(column[name] for column in figures))
    for reason in prepared.total.dropped:
        table.add_row(Text(f"dropped: {reason}"), *(f"{one.dropped.get(reason, 0):,}" for one in summaries.values()))
    return table


def _figures(summary: RowsSummary) -> dict[str, str]:
    return {
        "rows": f"{summary.rows:,}",
        "tokens": f"{summary.tokens:,}",
        "supervised tokens": f"{summary.supervised_tokens:,}",
        "supervised share": f"{summary.supervised_tokens / summary.tokens:.1%}",
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
