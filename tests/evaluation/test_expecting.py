"""The speed to expect of numbers of drafted tokens: recovered from servers that follow the model, and formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from specforge.evaluation.cost import bytes_read, draft_cost
from specforge.evaluation.expecting import expectations, modelled_speedups
from specforge.evaluation.served import Percentiles, ServedMeasurement, ServerResult
from specforge.models import Eagle3DraftModel

TIMES = Percentiles(p50=1, p90=1, p99=1)


def server(drafted: int, round_milliseconds: float, rates: list[float]) -> ServerResult:
    """A server whose rounds take this time and accept these shares."""
    length = 1 + sum(rates)
    measured = ServedMeasurement(
        prompt_set="all",
        concurrency=8,
        responses=9,
        tokens=100,
        seconds=1.0,
        tokens_per_second=100.0,
        request_tokens_per_second=1000 * length / round_milliseconds,
        first_token=TIMES,
        per_token=TIMES,
        whole=TIMES,
        acceptance_length=length if drafted else None,
        accept_rate_pos=rates,
    )
    url = f"http://host:{drafted}"
    return ServerResult(
        url=url, engine="vLLM", is_baseline=not drafted, draft_tokens=drafted or None, measurements=[measured]
    )


rates_of_eight = st.lists(st.floats(0, 1), min_size=8, max_size=8).map(lambda values: sorted(values, reverse=True))


@given(st.floats(1, 100), st.floats(0, 10), rates_of_eight, st.sets(st.integers(1, 8), min_size=2), st.floats(0.5, 1))
def test_servers_that_follow_the_model_are_predicted_exactly(fixed, per_token, rates, measured, share) -> None:
    """At every K, measured or not, from any two or more measured ones."""
    servers = [server(drafted, fixed + per_token * drafted, rates[:drafted]) for drafted in sorted(measured)]
    lengths = [1 + sum(rates[:drafted]) for drafted in range(1, 9)]
    (found,) = expectations([*servers, server(0, share * fixed, [])], [8], lengths)
    for one in found.lengths:
        milliseconds = fixed + per_token * one.draft_tokens
        assert one.round_milliseconds == pytest.approx(milliseconds)
        assert one.speedup == pytest.approx(lengths[one.draft_tokens - 1] * share * fixed / milliseconds)
        assert (one.measured_speedup is None) == (one.draft_tokens not in measured)
        if one.measured_speedup is not None:
            assert one.measured_speedup == pytest.approx(one.speedup)
    assert found.best.speedup == max(one.speedup or 0 for one in found.lengths)


def test_one_server_is_interpolated_to_the_one_without_speculation() -> None:
    (found,) = expectations([server(3, 14.0, [0.8, 0.6, 0.4]), server(0, 8.0, [])], [8], [])
    assert (found.fixed_milliseconds, found.token_milliseconds) == pytest.approx((8.0, 2.0))
    assert [one.acceptance_length for one in found.lengths] == pytest.approx([1.8, 2.4, 2.8])
    assert [one.speedup for one in found.lengths] == pytest.approx([1.8 * 0.8, 2.4 * 8 / 12, 2.8 * 8 / 14])
    assert found.fitted_to == [0, 3] and "server that drafts 3" in found.acceptance


@pytest.mark.parametrize("replayed", [[], [1.7, 2.0, 2.25]])
def test_tokens_that_are_accepted_after_the_end_of_a_response_are_not_sent(replayed: list[float]) -> None:
    """At a measured K, the measured speedup is expected, whether the acceptance is replayed or counted."""
    (counted,) = server(3, 12.5, [0.8, 0.5, 0.2]).measurements
    # 40 rounds are counted to yield 100 tokens and send 90.
    cut = {"tokens": 100, "responses": 10, "num_drafts": 40, "request_tokens_per_second": 180.0}
    drafting = server(3, 12.5, []).model_copy(update={"measurements": [counted.model_copy(update=cut)]})
    (found,) = expectations([drafting, server(0, 8.0, [])], [8], replayed)
    last = found.lengths[-1]
    assert (last.acceptance_length, last.round_milliseconds) == pytest.approx((2.25, 12.5))
    assert last.speedup == pytest.approx(last.measured_speedup) == pytest.approx(180 / 125)


@pytest.mark.parametrize(
    "servers",
    [
        [server(3, 14.0, [0.8])],
        [server(3, 14.0, [0.8]), server(3, 15.0, [0.8])],
        [server(2, 14.0, []), server(4, 15.0, [])],  # without rates, and without a replay
    ],
)
def test_too_little_is_measured(servers: list[ServerResult]) -> None:
    assert expectations(servers, [8], []) == []


def test_no_time_is_negative() -> None:
    (found,) = expectations([server(2, 15.0, [0.5, 0.1]), server(4, 14.0, [0.5, 0.1, 0.1, 0.1])], [8], [])
    assert (found.fixed_milliseconds, found.token_milliseconds) == pytest.approx((14.5, 0.0))
    assert found.lengths[0].speedup is None and found.best.draft_tokens == 4
    (found,) = expectations([server(2, 10.0, [0.5, 0.1]), server(4, 30.0, [0.5, 0.1, 0.1, 0.1])], [8], [])
    assert (found.fixed_milliseconds, found.token_milliseconds) == pytest.approx((0.0, (2 * 10 + 4 * 30) / 20))


@given(st.floats(0.01, 0.99), st.floats(0, 2), st.integers(1, 12))
def test_the_modelled_speedup_is_leviathans_for_a_constant_rate(rate: float, cost: float, longest: int) -> None:
    """Theorem 3.8 of https://arxiv.org/abs/2211.17192: (1 - a^(k+1)) / ((1 - a) (k c + 1))."""
    lengths = [sum(rate**power for power in range(drafted + 1)) for drafted in range(1, longest + 1)]
    expected = [(1 - rate ** (drafted + 1)) / ((1 - rate) * (drafted * cost + 1)) for drafted in range(1, longest + 1)]
    assert modelled_speedups(lengths, cost, None) == pytest.approx(expected)
    assert modelled_speedups(lengths, cost, 1) == pytest.approx([one / (1 + cost) for one in lengths])


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("tied", [False, True])
def test_a_pass_reads_everything_but_rows_of_the_embeddings(tied: bool) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    table = 4 * 64 * 32
    whole = sum(4 * one.numel() for one in model.parameters())
    assert bytes_read(model) == (whole if tied else whole - table)
    assert bytes_read(model, torch.zeros(5, 3)) - bytes_read(model) == 60
    assert bytes_read(nn.Embedding(4, 4)) == 0


def test_the_cost_of_a_draft_includes_the_head_that_it_reads() -> None:
    verifier = LlamaForCausalLM(LlamaConfig(**SIZES))
    draft = Eagle3DraftModel.from_training_args(verifier.config, verifier_name_or_path="x", ttt_steps=3)
    draft.attach_verifier(verifier)
    read = sum(one.nbytes for name, one in draft.named_parameters() if not name.startswith("embed_tokens"))
    assert draft_cost(draft, verifier) == pytest.approx(read / bytes_read(verifier))


def test_the_cost_beside_experts_is_unknown() -> None:
    verifier = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    draft = Eagle3DraftModel.from_training_args(verifier.config, verifier_name_or_path="x", ttt_steps=3)
    assert draft_cost(draft, verifier) is None
