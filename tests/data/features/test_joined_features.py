"""States of rows that are partly stored and partly asked of servers, joined into one batch."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge.data.features.growing import GrowingStore
from specforge.data.features.manifest import FeatureNeeds, Manifest
from specforge.data.features.reading import RowFeatures
from specforge.data.rows.reading import row_digest

WIDTH, LAYERS = 3, [1, 4]
NEEDS = FeatureNeeds("v", "f", (1, 4), 4, WIDTH, whole_rows=False)
MANIFEST = Manifest("v", "f", None, 100, LAYERS, WIDTH, "bfloat16", False)


class Servers:
    """Servers whose states of a row are those of ``states_of``."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def states(self, rows: list[Any]) -> list[torch.Tensor]:
        self.asked += [row.tolist() for row in rows]
        return [states_of(row) for row in rows]


def states_of(tokens: Any) -> torch.Tensor:
    """Return states [T, L, H] that depend on the tokens, and are exact in bfloat16."""
    values = torch.from_numpy(np.asarray(tokens)).float()[:, None, None]
    return values + torch.arange(2.0)[:, None] / 2 + torch.arange(3.0) / 8


rows_with_ends = st.lists(
    st.tuples(st.lists(st.integers(0, 15), min_size=1, max_size=6), st.integers(1, 6), st.booleans()), min_size=1
)


@settings(max_examples=40, deadline=None)
@given(rows_with_ends, st.randoms())
def test_each_row_has_its_states_wherever_they_come_from(given_rows, random):
    rows = [np.array(tokens) for tokens, _, _ in given_rows]
    kept = np.array([min(end, len(tokens)) for tokens, end, _ in given_rows])
    is_stored = np.array([one for *_, one in given_rows])
    chosen = random.sample(range(len(rows)), random.randint(1, len(rows)))
    with TemporaryDirectory() as folder:
        growing, servers = GrowingStore(Path(folder), MANIFEST), Servers()
        for number in np.flatnonzero(is_stored):
            # Equal rows differ in what is kept of them; here each is found by its own number.
            growing.add(row_digest(np.array([number])), states_of(rows[number][: kept[number]]).transpose(0, 1))
        growing.flush()
        store = growing.open()
        digests = np.array([np.frombuffer(row_digest(np.array([number])), np.uint64) for number in range(len(rows))])
        indices = np.full(len(rows), -1) if store is None else store.locate(digests)
        joined = RowFeatures(NEEDS, kept, indices, store, servers).join(  # type: ignore[arg-type]
            chosen, [torch.from_numpy(rows[number]) for number in chosen]
        )
    expected = torch.cat(
        [torch.cat([states_of(rows[n][: kept[n]]), torch.zeros(len(rows[n]) - kept[n], 2, 3)]) for n in chosen]
    )
    assert torch.equal(joined["aux"].float(), expected) and torch.equal(joined["last"].float(), expected[:, 1])
    assert servers.asked == [rows[n][: kept[n]].tolist() for n in chosen if not is_stored[n]]
    without = RowFeatures(NEEDS, kept, indices, store)
    assert is_stored[chosen].all() or without.join(chosen, [torch.from_numpy(rows[n]) for n in chosen]) == {}
