from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge.models.chain.alignment import align, step_tokens


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[list[bool]]]:
    """Document ids and masks of a batch; padding, if any, is at the end of its row and never supervised."""
    width = draw(st.integers(1, 14))
    documents, masks = [], []
    for _ in range(draw(st.integers(1, 2))):
        row: list[int] = []
        for number in range(draw(st.integers(1, 3))):
            row += [number] * draw(st.integers(1, 8))
        row = (row + [-1] * width)[:width]
        documents.append(row)
        mask = draw(st.lists(st.sampled_from([True, True, False]), min_size=width, max_size=width))
        masks.append([flag and document >= 0 for flag, document in zip(mask, row, strict=True)])
    return documents, masks


def counts_exactly(documents: list[int], mask: list[bool], t: int, step: int) -> bool:
    """Row t counts iff x_{t+1} .. x_{t+2+step} are response tokens of one turn of its document."""
    if documents[t] < 0:
        return False
    for index in range(t + 1, t + 2 + step + 1):
        if index >= len(documents) or documents[index] != documents[t] or not mask[index]:
            return False
    return True


def counts_compatibly(documents: list[int], mask: list[bool], t: int, step: int) -> bool:
    """Row t counts iff token t + step is a response token and its target exists in the document."""
    target = t + 1 + step
    return documents[t] >= 0 and target < len(documents) and documents[target] == documents[t] and mask[t + step]


RULES: dict[Any, Any] = {"exact": counts_exactly, "compat": counts_compatibly}


@pytest.mark.parametrize("supervision", RULES)
@given(batch=batches(), steps=st.integers(1, 5))
def test_supervised_rows_and_targets(supervision: Any, batch: Any, steps: int) -> None:
    documents, masks = batch
    width = len(documents[0])
    alignment = align(torch.tensor(masks), torch.tensor(documents), steps, supervision)
    assert alignment.supervised.shape == alignment.targets.shape == (steps, len(documents), width)
    assert alignment.supervised.dtype == torch.bool
    assert ((alignment.targets >= 0) & (alignment.targets < len(documents) * width)).all()
    for step in range(steps):
        for row, (ids, mask) in enumerate(zip(documents, masks, strict=True)):
            for t in range(width):
                counts = RULES[supervision](ids, mask, t, step)
                assert bool(alignment.supervised[step, row, t]) == counts, (step, row, t)
                if counts:
                    assert alignment.targets[step, row, t] == row * width + t + 1 + step


def test_the_last_prompt_token_is_the_first_row() -> None:
    mask = torch.tensor([[False, False, True, True, True, False, True, True]])
    alignment = align(mask, torch.zeros(1, 8, dtype=torch.int64), 3)
    rows = [alignment.supervised[step, 0].nonzero().squeeze(1).tolist() for step in range(3)]
    assert rows == [[1, 2, 5], [1], []]


@given(
    tokens=st.lists(st.lists(st.integers(0, 50), min_size=6, max_size=6), min_size=1, max_size=2),
    steps=st.integers(1, 9),
)
def test_tokens_of_a_step(tokens: list[list[int]], steps: int) -> None:
    read = step_tokens(torch.tensor(tokens), steps)
    for step in range(steps):
        for row, x in enumerate(tokens):
            expected = [x[t + 1 + step] if t + 1 + step < len(x) else 0 for t in range(len(x))]
            assert read[step, row].tolist() == expected
