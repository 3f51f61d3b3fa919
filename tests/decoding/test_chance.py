from __future__ import annotations

from itertools import permutations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from specforge.sampling import Chance, Sampling

NUMBER = 20000


def chance(seed: int = 0) -> Chance:
    return Chance(torch.Generator().manual_seed(seed))


def assert_shares(drawn: Tensor, law: dict[tuple[int, ...], float]) -> None:
    """Rows of draws occur as often as they should, within five standard deviations."""
    rows, counts = drawn.unique(dim=0, return_counts=True)
    seen = {tuple(row): count for row, count in zip(rows.tolist(), counts.tolist(), strict=True)}
    assert not seen.keys() - law.keys()
    for row, probability in law.items():
        deviation = (len(drawn) * probability * (1 - probability)) ** 0.5
        assert abs(seen.get(row, 0) - len(drawn) * probability) < 5 * deviation + 1, row


def test_what_is_certain_happens_and_what_is_impossible_does_not() -> None:
    assert chance().happens(torch.ones(NUMBER)).all()
    assert not chance().happens(torch.zeros(NUMBER)).any()
    assert chance().happens(torch.full((NUMBER,), 7.0)).all()
    assert not chance().happens(torch.full((3, 2), float("nan"))).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_events_happen_as_often_as_they_should(dtype: torch.dtype) -> None:
    happened = chance().happens(torch.tensor([0.1, 0.5, 0.93], dtype=dtype).expand(NUMBER, 3))
    assert happened.dtype == torch.bool
    for place, probability in enumerate([0.1, 0.5, 0.93]):
        assert_shares(happened[:, [place]].long(), {(0,): 1 - probability, (1,): probability})


def test_tokens_are_drawn_as_often_as_they_should() -> None:
    probabilities = torch.tensor([[0.2, 0.0, 0.5, 0.3], [0.0, 1.0, 0.0, 0.0]])
    drawn = chance().draw(probabilities.expand(NUMBER, 2, 4))
    assert drawn.shape == (NUMBER, 2)
    assert (drawn[:, 1] == 1).all()
    assert_shares(drawn[:, :1], {(0,): 0.2, (2,): 0.5, (3,): 0.3})


def test_several_are_drawn_one_after_the_other_without_replacement() -> None:
    q = [0.5, 0.2, 0.25, 0.05]
    for number in (1, 2, 4):
        drawn = chance().draw_several(torch.tensor(q).log().expand(NUMBER, 4), number)
        law = {}
        for order in permutations(range(4), number):
            law[order], left = 1.0, 1.0
            for token in order:
                law[order] *= q[token] / left
                left -= q[token]
        assert_shares(drawn, law)


def test_what_has_no_probability_is_drawn_last() -> None:
    log_probs = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]]).log()
    drawn = chance().draw_several(log_probs.expand(500, 2, 4), 4)
    assert drawn.shape == (500, 2, 4)
    assert (drawn.sort(dim=-1).values == torch.arange(4)).all()
    assert set(drawn[:, 0, :2].flatten().tolist()) == {0, 2}
    assert (drawn[:, 1, 0] == 3).all()


def test_a_seed_decides_everything() -> None:
    probabilities = torch.rand(50, 9, generator=torch.Generator().manual_seed(0))
    for draw in (
        lambda one: one.happens(probabilities),
        lambda one: one.draw(probabilities),
        lambda one: one.draw_several(probabilities.log(), 3),
    ):
        assert torch.equal(draw(chance(1)), draw(chance(1)))
        assert not torch.equal(draw(chance(1)), draw(chance(2)))


def test_the_greedy_choice_is_the_first_of_the_best() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert Sampling().is_greedy
    assert Sampling().choose(logits, chance()).tolist() == [1, 0]


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6)])
def test_logits_may_have_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=0.7, top_k=4, top_p=0.9)
    log_probs = sampling.log_probs(logits)
    assert log_probs.shape == shape
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(shape[:-1]))
    assert sampling.choose(logits, chance()).shape == shape[:-1]


def test_short_types_are_widened() -> None:
    logits = torch.randn(2, 6)
    assert Sampling(temperature=1.0).log_probs(logits.bfloat16()).dtype == torch.float32
    assert Sampling(temperature=1.0).log_probs(logits.double()).dtype == torch.float64


def test_equally_probable_tokens_stay_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert (Sampling(temperature=1.0, top_k=2).log_probs(logits).exp() > 0).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("wrong", [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top": 1}])
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Sampling(**wrong)
