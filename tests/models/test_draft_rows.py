from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specforge.documents import DocumentLayout
from specforge.models.draft_rows import DraftRows

NO_DOCUMENTS = DocumentLayout((), whole_rows=False)


@st.composite
def supervision(draw: st.DrawFn) -> Tensor:
    steps, rows = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    flags = draw(st.lists(st.booleans(), min_size=steps * rows, max_size=steps * rows))
    return torch.tensor(flags).view(steps, rows)


@given(supervised=supervision())
def test_a_step_runs_only_the_rows_that_it_or_a_later_step_needs(supervised: Tensor) -> None:
    rows = DraftRows.needed(supervised, NO_DOCUMENTS)
    assert rows.order.sort().values.equal(torch.arange(supervised.shape[1]))
    for step, count in enumerate(rows.counts):
        needed = supervised[step:].any(0).nonzero().squeeze(1)
        run = rows.order[:count].sort().values
        # One row runs if none is needed.
        assert run.equal(needed) or (len(needed) == 0 and count == 1)


@given(supervised=supervision())
def test_state_index_counts_the_states_step_by_step(supervised: Tensor) -> None:
    rows = DraftRows.needed(supervised, NO_DOCUMENTS)
    states = [(step, int(row)) for step, count in enumerate(rows.counts) for row in rows.order[:count]]
    state_index = rows.state_index()
    for number, (step, row) in enumerate(states):
        assert state_index[step, row] == number
    assert (state_index >= 0).sum() == len(states)
    assert (state_index[supervised] >= 0).all()


def test_all_rows_keep_their_order() -> None:
    rows = DraftRows.all(3, 4, NO_DOCUMENTS)
    assert rows.state_index().equal(torch.arange(12).view(3, 4))
