"""The bigram table, checked against a slow count."""

from __future__ import annotations

import json
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from specforge.data.rows.bigrams import bigram_table, count_successors
from specforge.data.rows.building import build_rows
from specforge.data.rows.summary import RowSettings

VOCABULARY = 6


def built(folder, rows):
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps({"input_ids": ids, "loss_mask": mask}) + "\n" for ids, mask in rows))
    return build_rows(str(source), lambda: None, VOCABULARY, RowSettings(99, "truncate"), folder / "cache")


def slow_count(rows) -> list[int]:
    pairs: Counter[tuple[int, int]] = Counter()
    for ids, mask in rows:
        pairs.update((ids[n - 1], ids[n]) for n in range(1, len(ids)) if mask[n])
    best = []
    for token in range(VOCABULARY):
        followers = {follower: count for (before, follower), count in pairs.items() if before == token}
        best.append(min(followers, key=lambda token: (-followers[token], token)) if followers else -1)
    return best


ROW = st.lists(st.tuples(st.integers(0, VOCABULARY - 1), st.booleans()), min_size=1, max_size=12)


@given(st.lists(ROW, min_size=1, max_size=4))
def test_counts_equal_the_slow_count(tmp_path_factory, drawn):
    rows = [([token for token, _ in row], [int(seen) for _, seen in row]) for row in drawn]
    rows.append(([1, 2], [0, 1]))  # at least one supervised token
    assert count_successors(built(tmp_path_factory.mktemp("rows"), rows)).tolist() == slow_count(rows)


def test_the_table_is_counted_once(tmp_path):
    rows = built(tmp_path, [([1, 2, 3, 2], [0, 1, 1, 1])])
    table = bigram_table(rows, "these rows", tmp_path / "tables")
    assert load_file(table)["successors"].tolist() == [-1, 2, 3, 2, -1, -1]
    written = table.stat().st_mtime_ns
    assert bigram_table(rows, "these rows", tmp_path / "tables") == table
    assert table.stat().st_mtime_ns == written
    assert bigram_table(rows, "other rows", tmp_path / "tables") != table
