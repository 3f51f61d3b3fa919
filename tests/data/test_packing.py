from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge.data.packing import PackedRows, collate, pack
from specforge.data.rows.building import build_rows
from specforge.data.rows.reading import TokenRows
from specforge.data.rows.summary import RowSettings

LENGTHS = (3, 5, 1, 4)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TokenRows:
    """Rows of LENGTHS tokens; row n holds the ids 10n + 1, ..., supervised from the third on (or the only one)."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [
        f'{{"input_ids": {[10 * row + token for token in range(1, length + 1)]}, '
        f'"loss_mask": {[int(token > 2 or length == 1) for token in range(1, length + 1)]}}}'
        for row, length in enumerate(LENGTHS)
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    settings = RowSettings(max_length=8, long_rows="drop")
    return build_rows(str(folder / "rows.jsonl"), lambda: pytest.fail("no tokenizer"), 50, settings, Path(folder))


@given(lengths=st.lists(st.integers(1, 32), max_size=60), capacity=st.integers(32, 80))
def test_each_document_is_in_one_bin_and_no_bin_overflows(lengths: list[int], capacity: int) -> None:
    bins = pack(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(document for chosen in bins for document in chosen) == list(range(len(lengths)))
    loads = sorted(sum(lengths[document] for document in chosen) for chosen in bins)
    assert not loads or loads[-1] <= capacity
    # No two rows would fit into one.
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


@given(lengths=st.lists(st.integers(1, 30), max_size=40))
def test_packing_equals_plain_best_fit_decreasing(lengths: list[int]) -> None:
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [load for load in loads if load + length <= 30]
        if fitting:
            loads.remove(max(fitting))
        loads.append(length + max(fitting, default=0))
    bins = pack(np.array(lengths, dtype=np.int64), 30)
    assert sorted(sum(lengths[document] for document in chosen) for chosen in bins) == sorted(loads)


def test_packing_is_deterministic_and_refuses_documents_that_do_not_fit() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 5000)
    assert pack(lengths, 128) == pack(lengths.copy(), 128)
    with pytest.raises(ValueError, match="a document of 9 tokens does not fit into a row of 8"):
        pack(np.array([3, 9]), 8)


@given(bins=st.lists(st.lists(st.integers(0, len(LENGTHS) - 1), min_size=1, max_size=4), min_size=1, max_size=3))
def test_documents_keep_their_tokens_and_positions_restart(rows: TokenRows, bins: list[list[int]]) -> None:
    packed = PackedRows(rows, bins)
    assert len(packed) == len(bins)
    for index, documents in enumerate(bins):
        item = packed[index]
        parts = [rows[document] for document in documents]
        for key in ("input_ids", "loss_mask"):
            assert torch.equal(item[key], torch.cat([part[key] for part in parts]))
        expected = [(number, position) for number, row in enumerate(documents) for position in range(LENGTHS[row])]
        assert list(zip(item["document_ids"].tolist(), item["position_ids"].tolist(), strict=True)) == expected
        assert item["document_ids"].dtype == item["position_ids"].dtype == torch.int64


def test_an_item_of_a_negative_index_has_no_supervision(rows: TokenRows) -> None:
    packed = PackedRows(rows, [[0], [1, 2]])
    filler, real = packed[-2], packed[1]
    assert real["loss_mask"].any()
    assert not filler["loss_mask"].any()
    assert all(torch.equal(filler[key], real[key]) for key in real if key != "loss_mask")


def test_batches_are_padded_on_the_right(rows: TokenRows) -> None:
    packed = PackedRows(rows, [[0, 2], [1]])
    batch: dict[str, Any] = {key: value.tolist() for key, value in collate([packed[0], packed[1]]).items()}
    assert batch == {
        "input_ids": [[1, 2, 3, 21, 0], [11, 12, 13, 14, 15]],
        "loss_mask": [[False, False, True, True, False], [False, False, True, True, True]],
        "document_ids": [[0, 0, 0, 1, -1], [0, 0, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]],
    }


def test_the_fill_share_is_relative_to_full_rows(rows: TokenRows) -> None:
    assert PackedRows(rows, pack(rows.lengths, 8)).fill_share(8) == pytest.approx(13 / 16)
