"""Text of the verifier's own: how prompts are cut, what it writes, and that it is written ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_verifiers import VOCABULARY
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from specforge.errors import UsageError
from specforge.verifier.features import capture
from specforge_mlp.stage_two import StageTwoSettings, ahead, check_lengths, cut_prompts, write_on

VerifierOf = Callable[[str], PreTrainedModel]
Batch = dict[str, Tensor]


def batch_of(rows: list[list[int]], padding: int = 0) -> Batch:
    """A batch whose rows hold documents of some lengths; no token comes twice."""
    width = max(map(sum, rows)) + padding
    tokens, documents = torch.zeros(len(rows), width).long(), torch.full((len(rows), width), -1)
    for number, lengths in enumerate(rows):
        total = sum(lengths)
        tokens[number, :total] = 1000 * number + torch.arange(1, total + 1)
        documents[number, :total] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return {"input_ids": tokens, "document_ids": documents}


def test_a_rest_is_left_out_but_a_short_document_is_a_prompt() -> None:
    prompts = cut_prompts(batch_of([[10, 3], [4]], padding=2), 4)
    assert [one.tolist() for one in prompts] == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
        [11, 12, 13],
        [1001, 1002, 1003, 1004],
    ]


@given(
    rows=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=4), min_size=1, max_size=3),
    length=st.integers(1, 24),
    padding=st.integers(0, 3),
)
def test_prompts_are_cut_document_by_document(rows: list[list[int]], length: int, padding: int) -> None:
    expected = []
    for number, lengths in enumerate(rows):
        first = 1000 * number + 1
        for size in lengths:
            whole = list(range(first, first + size))
            expected += [whole[at : at + length] for at in range(0, size - length + 1, length)] or [whole]
            first += size
    assert [one.tolist() for one in cut_prompts(batch_of(rows, padding), length)] == expected


PROMPTS = [torch.tensor([4, 9, 2, 17]), torch.tensor([8]), torch.tensor([3, 3, 30, 1, 5])]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_at_temperature_0_the_verifiers_greedy_text_is_written(family: str, verifier_of: VerifierOf) -> None:
    verifier = verifier_of(family)
    settings = StageTwoSettings(temperature=0, new_tokens=9)
    batch = write_on(verifier, PROMPTS, settings, seed=1)
    assert batch["input_ids"].shape == (3, 14)
    for row, prompt in enumerate(PROMPTS):
        own = verifier.generate(
            prompt[None], attention_mask=torch.ones(1, len(prompt)), max_new_tokens=9, do_sample=False
        )[0]
        size = len(own)
        assert torch.equal(batch["input_ids"][row, :size], own)
        assert batch["loss_mask"][row].tolist() == [False] * len(prompt) + [True] * 9 + [False] * (14 - size)
        assert batch["document_ids"][row].tolist() == [0] * size + [-1] * (14 - size)
        assert batch["position_ids"][row, :size].tolist() == list(range(size))


def test_the_seed_decides(verifier_of: VerifierOf) -> None:
    verifier = verifier_of("qwen3")
    settings = StageTwoSettings(new_tokens=12)
    torch.manual_seed(0)
    first = write_on(verifier, PROMPTS, settings, seed=7)
    torch.manual_seed(1)
    second = write_on(verifier, PROMPTS, settings, seed=7)
    other = write_on(verifier, PROMPTS, settings, seed=8)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["input_ids"], other["input_ids"])


def test_tokens_are_sampled_from_the_most_probable_ones(verifier_of: VerifierOf) -> None:
    verifier = verifier_of("llama")
    batch = write_on(verifier, PROMPTS * 4, StageTwoSettings(new_tokens=12, top_k=3), seed=2)
    ranks = set()
    for row, prompt in enumerate(PROMPTS * 4):
        size = len(prompt) + 12
        logits = verifier(batch["input_ids"][row, None, :size]).logits[0]
        for place in range(len(prompt), size):
            order = logits[place - 1].argsort(descending=True).tolist()
            ranks.add(order.index(int(batch["input_ids"][row, place])))
    assert ranks == {0, 1, 2}


def test_an_answer_that_ends_is_shorter(verifier_of: VerifierOf, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = verifier_of("llama")
    settings = StageTwoSettings(temperature=0, new_tokens=9)
    whole = write_on(verifier, PROMPTS[:1], settings, seed=1)["input_ids"][0].tolist()
    stop = whole[4 + 2]
    monkeypatch.setattr(verifier.generation_config, "eos_token_id", stop)
    batch = write_on(verifier, PROMPTS[:1], settings, seed=1)
    assert batch["input_ids"][0].tolist() == whole[: whole.index(stop, 4) + 1]
    assert int(batch["loss_mask"].sum()) == len(batch["input_ids"][0]) - 4


def numbered(number: int) -> Iterator[tuple[int, Batch]]:
    return ((one, {"input_ids": torch.tensor(one)}) for one in range(number))


@pytest.mark.parametrize("buffer", [1, 2, 5])
@pytest.mark.parametrize("number", [0, 1, 4])
def test_batches_made_ahead_keep_their_order(number: int, buffer: int) -> None:
    def make(one: int, batch: Batch) -> Batch:
        return {"made": batch["input_ids"] * 10 + one, "by": torch.tensor(threading.get_ident())}

    made = list(ahead(make, numbered(number), buffer))
    assert [int(one["made"]) for one in made] == [11 * one for one in range(number)]
    assert not any(int(one["by"]) == threading.get_ident() for one in made)


@pytest.mark.parametrize("buffer", [1, 3])
def test_no_more_is_made_ahead_than_was_asked_for(buffer: int) -> None:
    made: list[int] = []
    read: list[int] = []

    def make(one: int, batch: Batch) -> Batch:
        made.append(one)
        return batch

    def source() -> Iterator[tuple[int, Batch]]:
        for one, batch in numbered(20):
            read.append(one)
            yield one, batch

    batches = ahead(make, source(), buffer)
    assert not read and not made
    for taken in range(1, 6):
        next(batches)
        assert len(read) == taken + buffer
        assert taken <= len(made) <= taken + buffer
    batches.close()
    # Closing waits for the thread.
    at_the_end = len(made)
    assert at_the_end <= 5 + buffer and len(read) == 5 + buffer
    assert not [one for one in threading.enumerate() if one.name.startswith("stage-two")]


def test_what_goes_wrong_while_making_is_raised_where_batches_are_taken() -> None:
    def make(one: int, batch: Batch) -> Batch:
        if one == 2:
            raise UsageError("cannot write this")
        return batch

    batches = ahead(make, numbered(9), 1)
    assert [int(next(batches)["input_ids"]) for _ in range(2)] == [0, 1]
    with pytest.raises(UsageError, match="cannot write this"):
        next(batches)
    assert not [one for one in threading.enumerate() if one.name.startswith("stage-two")]


def test_lengths_are_checked_against_the_context() -> None:
    verifier = LlamaConfig(max_position_embeddings=128)
    check_lengths(StageTwoSettings(prompt_length=64, new_tokens=64), verifier)
    with pytest.raises(UsageError, match=r"model\.stage_two: prompt_length 64 and new_tokens 65.* 128 tokens"):
        check_lengths(StageTwoSettings(prompt_length=64, new_tokens=65), verifier)


def test_two_threads_capture_from_one_verifier(verifier_of: VerifierOf) -> None:
    """Each gets the states of its own pass, though the hooks of both are there at the same time."""
    verifier = verifier_of("llama")
    inputs = [
        (torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length)), layers)
        for length, layers in ((6, [0, 2]), (9, [1, 2, 3]))
    ]

    def captured(number: int, together: threading.Barrier | None, times: int) -> list[tuple[Tensor, Tensor]]:
        tokens, layers = inputs[number]
        positions = torch.arange(tokens.shape[1]).expand(2, -1)
        found = []
        if together is not None:
            # Both are between the layers at the same time, once at least.
            once = verifier.model.layers[1].register_forward_hook(_meet(together, threading.get_ident()))
        for _ in range(times):
            features = capture(verifier, tokens, positions, layers)
            found.append((features.aux, features.last))
        if together is not None:
            once.remove()
        return found

    alone = [captured(number, None, 1)[0] for number in range(2)]
    barrier = threading.Barrier(2, timeout=20)
    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(captured, number, barrier, 25) for number in range(2)]
        together = [one.result() for one in running]
    for own, expected in zip(together, alone, strict=True):
        for aux, last in own:
            assert torch.equal(aux, expected[0]) and torch.equal(last, expected[1])


def _meet(barrier: threading.Barrier, thread: int) -> Callable[..., None]:
    def hook(*_: object) -> None:
        if threading.get_ident() == thread:
            barrier.wait()

    return hook
