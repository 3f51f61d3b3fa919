"""The on-policy test: a verifier's own text passes at any temperature, another model's does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specforge.verifier import on_policy
from specforge.verifier.on_policy import check_policy

PROMPT = 4
LENGTH = 48


@pytest.fixture
def written(tiny_verifiers):
    """Return a function that samples rows from a verifier token by token."""

    def write(name: str, temperature: float, number: int = 12, keep: int = 0) -> list[tuple[Tensor, Tensor, float]]:
        model = tiny_verifiers[name].model
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 61, (number, PROMPT), generator=generator)
        with torch.no_grad():
            while ids.shape[1] < LENGTH:
                logits = model(ids, use_cache=False).logits[:, -1]
                if keep:
                    logits = logits.where(logits >= logits.topk(keep).values[:, -1:], -torch.inf)
                if temperature:
                    chosen = (logits / temperature).softmax(-1).multinomial(1, generator=generator)
                else:
                    chosen = logits.argmax(-1, keepdim=True)
                ids = torch.cat([ids, chosen], dim=1)
        mask = torch.arange(LENGTH) >= PROMPT
        return [(row, mask, temperature) for row in ids]

    return write


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_its_own_text_passes(tiny_verifiers, written, name, temperature):
    check = check_policy(tiny_verifiers[name].model, written(name, temperature))
    assert check.is_own
    assert abs(check.log_prob - check.expected) <= 3 * check.standard_error + 1e-6
    assert (check.rows, check.tokens) == (12, 12 * (LENGTH - PROMPT))


def test_top_k_only_raises_the_mean(tiny_verifiers, written):
    check = check_policy(tiny_verifiers["llama"].model, written("llama", 1.0, keep=5))
    assert check.is_own and check.log_prob > check.expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_of_another_model_does_not_pass(tiny_verifiers, written, temperature):
    check = check_policy(tiny_verifiers["llama"].model, written("qwen3", temperature))
    assert not check.is_own and check.log_prob < check.limit


def test_a_mask_shifted_by_one_does_not_pass(tiny_verifiers, written):
    rows = [(ids.roll(1), mask, 0.0) for ids, mask, _ in written("llama", 0.0)]
    assert not check_policy(tiny_verifiers["llama"].model, rows).is_own


def test_the_statistics_match_their_definition(tiny_verifiers, written):
    model, rows = tiny_verifiers["llama"].model, [(*row[:2], 0.8) for row in written("qwen3", 1.0, number=3)]
    check = check_policy(model, rows)
    own, expected, variance = [], [], []
    for ids, *_ in rows:
        log_p = (model(ids[None]).logits[0] / 0.8).double().log_softmax(-1)
        for index in range(PROMPT, LENGTH):
            p, here = log_p[index - 1].exp(), log_p[index - 1]
            own.append(here[ids[index]])
            expected.append((p * here).sum())
            variance.append((p * here**2).sum() - (p * here).sum() ** 2)
    assert check.log_prob == pytest.approx(float(torch.stack(own).mean()), abs=1e-4)
    assert check.expected == pytest.approx(float(torch.stack(expected).mean()), abs=1e-4)
    assert check.standard_error == pytest.approx(float(torch.stack(variance).sum().sqrt()) / len(own), abs=1e-4)


def test_the_standard_error_is_calibrated(tiny_verifiers, written):
    checks = [check_policy(tiny_verifiers["llama"].model, [row]) for row in written("llama", 1.0, number=200)]
    scores = torch.tensor([(check.log_prob - check.expected) / check.standard_error for check in checks])
    assert abs(scores.mean()) < 4 / 200**0.5
    assert 0.8 < scores.std() < 1.2


def test_chunks_make_no_difference(tiny_verifiers, written, monkeypatch):
    model, rows = tiny_verifiers["llama"].model, written("llama", 1.0)
    full = check_policy(model, rows)
    monkeypatch.setattr(on_policy, "_CHUNK", 5)
    assert check_policy(model, rows).log_prob == pytest.approx(full.log_prob, abs=1e-5)


def test_a_first_token_is_not_checked(tiny_verifiers):
    only = torch.tensor([True, False, False])
    assert check_policy(tiny_verifiers["llama"].model, [(torch.tensor([5, 6, 7]), only, 0.0)]) is None
