from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge.training.losses.maximum import BLOCK, first_maximum


@given(st.integers(0, 4), st.integers(1, 5 * BLOCK), st.integers(0, 2**32 - 1), st.booleans())
def test_it_is_argmax_also_with_ties_and_infinities(number: int, width: int, seed: int, ties: bool) -> None:
    rows = torch.randn(number, width, generator=torch.Generator().manual_seed(seed))
    if ties:
        rows = rows.round()
        rows[rows < -1] = float("-inf")
    assert torch.equal(first_maximum(rows), rows.argmax(-1))
    assert torch.equal(first_maximum(rows.double()), rows.argmax(-1))


def test_equal_rows_choose_the_first_token() -> None:
    assert first_maximum(torch.zeros(3, 4 * BLOCK + 1)).tolist() == [0, 0, 0]


def test_a_single_maximum_is_found_anywhere() -> None:
    width = 3 * BLOCK + 7
    assert first_maximum(torch.eye(width)).tolist() == list(range(width))
