"""Coverage of draft vocabularies."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge.commands.prepare.coverage_plot import draw_coverage
from specforge.data.rows.coverage import Coverage, coverage_by_size
from specforge.models.vocabulary import DraftVocabulary

COUNTS = st.integers(2, 40).flatmap(
    lambda size: st.tuples(*[st.lists(st.integers(0, 9), min_size=size, max_size=size)] * 2)
)


@given(COUNTS)
def test_coverage_equals_that_of_the_draft_vocabularies(counts):
    train, validation = map(torch.tensor, counts)
    found = coverage_by_size(train, validation)
    sizes = [coverage.draft_vocab_size for coverage in found]
    assert sizes == [2**power for power in range(9) if 2**power < len(train)][-8:]
    for coverage in found:
        vocabulary = DraftVocabulary.most_frequent(train, coverage.draft_vocab_size)
        assert abs(coverage.train - vocabulary.coverage(train)) < 1e-6
        assert abs(coverage.validation - vocabulary.coverage(validation)) < 1e-6


def test_without_validation_rows_only_training_coverage_is_reported():
    assert coverage_by_size(torch.tensor([3, 0, 1]), None) == [Coverage(1, 0.75, None), Coverage(2, 1.0, None)]


def test_equal_figures_give_equal_plots(tmp_path):
    for validation in (None, 0.5):
        figures = [Coverage(2, 0.5, validation), Coverage(4, 0.75, validation)]
        for name in ("one.svg", "two.svg"):
            draw_coverage(figures, tmp_path / name)
        svg = (tmp_path / "one.svg").read_text()
        assert svg == (tmp_path / "two.svg").read_text()
        assert "training rows" in svg and ("validation rows" in svg) == (validation is not None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.svg", "two.svg"]
