from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from specforge.data.text.bad_rows import BadRow
from specforge.data.text.encoding import RowEncoder, is_foreign, tokens_inside
from specforge.data.text.records import Record
from specforge.data.text.template import ChatTemplate, time_limit
from specforge.errors import UsageError

VOCABULARY_SIZE = 320
TEXT = st.text(st.sampled_from("ab one two\n    é😀中\u00a0<|>"), max_size=30)
CHAT = st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=3)


def messages_of(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def reference(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Write ChatML by hand with a flag per character; a token is supervised if all its characters are.

    If a token would straddle the boundary of prompt and reply, the text is tokenised in two pieces.
    """
    text, flags, starts = "", [], []
    for message in messages:
        head, body = f"<|im_start|>{message['role']}\n", message["content"] + "<|im_end|>"
        starts += [len(text) + len(head)] * (message["role"] == "assistant")
        text += head + body + "\n"
        flags += [False] * len(head) + [message["role"] == "assistant"] * len(body) + [False]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    cuts = [start for start in starts if any(first < start < last for first, last in offsets)]
    ids, mask = [], []
    for begin, end in pairwise([0, *cuts, len(text)]):
        piece = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True)
        ids += piece["input_ids"]
        mask += [all(flags[begin + first : begin + last]) for first, last in piece["offset_mapping"]]
    return ids, mask


@pytest.fixture(scope="module")
def encoders(load_tokenizer: Callable[..., PreTrainedTokenizerBase], templates: dict[str, str]) -> list[RowEncoder]:
    """Boundaries, generation tags, and a tokenizer whose offsets exclude spaces: all must agree."""
    tokenizers = [
        load_tokenizer(templates["chatml"]),
        load_tokenizer(templates["generation"]),
        load_tokenizer(templates["chatml"], trim_offsets=True),
    ]
    return [RowEncoder(ChatTemplate(tokenizer), VOCABULARY_SIZE) for tokenizer in tokenizers]


@given(turns=CHAT)
def test_the_mask_of_a_chat_equals_a_slow_reference(
    encoders: list[RowEncoder], tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]]
) -> None:
    messages = messages_of(turns)
    ids, mask = reference(tokenizer, messages)
    for encoder in encoders:
        ((row,),) = encoder.encode([Record({"messages": messages}, "here")])
        assert row.input_ids.tolist() == ids
        assert row.loss_mask.tolist() == mask


@given(
    lengths=st.lists(st.integers(0, 4), max_size=20),
    boundaries=st.lists(st.integers(0, 40), unique=True, max_size=8).map(sorted),
)
def test_tokens_inside_equals_a_loop(lengths: list[int], boundaries: list[int]) -> None:
    ends = np.cumsum(lengths, dtype=np.int64)
    offsets = np.stack([ends - lengths, ends], axis=1) if lengths else np.empty((0, 2), np.int64)
    spans = list(zip(boundaries[::2], boundaries[1::2], strict=False))
    expected = [
        start < end and any(start >= first and end <= last for first, last in spans) for start, end in offsets.tolist()
    ]
    assert tokens_inside(offsets.astype(np.int64), spans).tolist() == expected


def test_mixed_layouts_in_one_source_keep_their_order(
    tokenizer: PreTrainedTokenizerBase, chat: Callable[..., dict[str, Any]]
) -> None:
    values = [
        {"text": "one two"},
        chat("one", "two"),
        {"input_ids": [5, 6, 7], "loss_mask": [0, 1, True]},
        {"prompt": "one", "response": "two"},
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]},
        {"input_ids": [5], "loss_mask": [1], "text": "not used"},
    ]
    encoded = RowEncoder(ChatTemplate(tokenizer), VOCABULARY_SIZE).encode([Record(value, "here") for value in values])
    rows = [row for (row,) in encoded]
    assert tokenizer.decode(rows[0].input_ids) == "one two"
    assert rows[0].loss_mask.all()
    assert rows[2].input_ids.tolist() == [5, 6, 7]
    assert rows[2].loss_mask.tolist() == [False, True, True]
    for same in (rows[3], rows[4]):
        assert same.input_ids.tolist() == rows[1].input_ids.tolist()
        assert same.loss_mask.tolist() == rows[1].loss_mask.tolist()
    assert rows[5].input_ids.tolist() == [5]
    assert all(row.input_ids.dtype == np.int32 and row.loss_mask.dtype == np.bool_ for row in rows)


def test_a_prompt_without_chat_template_supervises_the_response(
    load_tokenizer: Callable[..., PreTrainedTokenizerBase],
) -> None:
    plain = load_tokenizer(None)
    ((row,),) = RowEncoder(ChatTemplate(plain), VOCABULARY_SIZE).encode(
        [Record({"prompt": "one", "response": " two three"}, "here")]
    )
    assert plain.decode(row.input_ids) == "one two three"
    assert plain.decode(row.input_ids[row.loss_mask]) == " two three"


def test_the_tokenizers_own_truncation_is_not_used(load_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    tokenizer = load_tokenizer()
    before = RowEncoder(ChatTemplate(tokenizer), VOCABULARY_SIZE)
    tokenizer("one two", truncation=True, max_length=1)
    after = RowEncoder(ChatTemplate(tokenizer), VOCABULARY_SIZE)
    assert after.identity == before.identity
    assert len(after.encode([Record({"text": "one two three four"}, "here")])[0][0].input_ids) > 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"input_ids": [1, 2], "loss_mask": [1]}, "'input_ids' has 2 entries, 'loss_mask' 1"),
        ({"input_ids": [1, 320], "loss_mask": [1, 1]}, "id 320 at position 1 is outside .* 320 ids"),
        ({"input_ids": [-1], "loss_mask": [1]}, "id -1 at position 0"),
        ({"input_ids": [2**32 + 1], "loss_mask": [1]}, "id 4294967297 at position 0"),
        ({"input_ids": [1.5], "loss_mask": [1]}, "'input_ids' must be a non-empty list of integers"),
        ({"input_ids": [[1], [2, 3]], "loss_mask": [1, 1]}, "'input_ids' must be a non-empty list of integers"),
        ({"input_ids": ["a"], "loss_mask": [1]}, "'input_ids' must be a non-empty list of integers"),
        ({"input_ids": [], "loss_mask": []}, "'input_ids' must be a non-empty list of integers"),
        ({"input_ids": [1], "loss_mask": [2]}, "'loss_mask' holds values other than 0 and 1"),
        ({"input_ids": [1], "loss_mask": [None]}, "'loss_mask' must be a non-empty list of integers"),
        ({"input_ids": [1]}, r"it has \['input_ids'\], but needs"),
        ({"text": "half \ud83d"}, "unpaired surrogate"),
    ],
)
def test_bad_rows_are_refused_with_their_location(
    tokenizer: PreTrainedTokenizerBase, value: dict[str, Any], reason: str
) -> None:
    good = Record({"text": "one two"}, "train.jsonl:8")
    bad, (row,) = RowEncoder(ChatTemplate(tokenizer), VOCABULARY_SIZE).encode([Record(value, "train.jsonl:7"), good])
    assert isinstance(bad, BadRow) and re.search(reason, str(bad)) and str(bad).startswith("train.jsonl:7: ")
    assert len(row.input_ids) > 1, "other rows are still encoded"


def test_no_token_straddles_prompt_and_reply(load_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    """The row is the tokens of the serving prompt followed by those of the reply."""
    template = "{{ messages[0].content + '\n' }}{% if messages[1:] %}{{ '\n' + messages[1].content }}{% endif %}"
    tokenizer = load_tokenizer(template)
    assert len(tokenizer.tokenize("\n\n")) == 1
    record = Record({"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}, "here")
    ((row,),) = RowEncoder(ChatTemplate(tokenizer), VOCABULARY_SIZE).encode([record])
    prompt, reply = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one\n", "\ntwo"))
    assert row.input_ids.tolist() == prompt + reply
    assert row.loss_mask.tolist() == [False] * len(prompt) + [True] * len(reply)


def test_text_after_max_length_is_not_rendered(
    tokenizer: PreTrainedTokenizerBase, chat: Callable[..., dict[str, Any]]
) -> None:
    encoder = RowEncoder(ChatTemplate(tokenizer), VOCABULARY_SIZE)
    record = Record(chat(*(" " * 40 if number % 2 == 0 else "one" for number in range(400))), "here")
    ((full,),) = encoder.encode([record])
    for max_length in (10, 100, 1000):
        ((row,),) = encoder.encode([record], max_length)
        assert max_length < len(row.input_ids) <= len(full.input_ids)
        assert row.input_ids[:max_length].tolist() == full.input_ids[:max_length].tolist()
        assert row.loss_mask[:max_length].tolist() == full.loss_mask[:max_length].tolist()
    assert len(encoder.encode([record], 10)[0][0].input_ids) < 200


def test_rows_with_other_template_arguments_are_refused(
    tokenizer: PreTrainedTokenizerBase, chat: Callable[..., dict[str, Any]]
) -> None:
    origin = {"model": "m", "fingerprint": "f", "temperature": 0, "template_arguments": {"enable_thinking": False}}
    record = Record({**chat("one", "two"), "origin": origin}, "train.jsonl:7")
    with pytest.raises(UsageError, match=r"train.jsonl:7: .*give --template_arguments.enable_thinking false"):
        RowEncoder(ChatTemplate(tokenizer), VOCABULARY_SIZE).encode([record])
    ((row,),) = RowEncoder(ChatTemplate(tokenizer, {"enable_thinking": False}), VOCABULARY_SIZE).encode([record])
    assert row.loss_mask.any()


def test_an_endless_template_is_reported_at_its_third_row(
    load_tokenizer: Callable[..., PreTrainedTokenizerBase],
    chat: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    encoder = RowEncoder(ChatTemplate(load_tokenizer(loops)), VOCABULARY_SIZE)
    monkeypatch.setattr("specforge.data.text.replies.time_limit", lambda: time_limit(0.05))
    with pytest.raises(UsageError, match=r"here:3: .*longer than 0\.05 s; it is the third such row"):
        encoder.encode([Record(chat("one", "two"), f"here:{number}") for number in range(1, 9)])


def test_text_among_token_rows_is_refused() -> None:
    with pytest.raises(UsageError, match=r"train.jsonl:2: a text row in a source whose first row"):
        RowEncoder(None, VOCABULARY_SIZE).encode([Record({"text": "one"}, "train.jsonl:2")])


@given(TEXT, st.text(max_size=20))
def test_own_ids_are_never_foreign(tokenizer, text, other):
    ids = tokenizer(other + text, add_special_tokens=False)["input_ids"]
    assert not is_foreign(ids, text, tokenizer)


@given(st.text(st.sampled_from("abcdefghij "), min_size=3).filter(lambda text: len(set(text.split())) > 1))
def test_ids_of_another_text_are_foreign(tokenizer, text):
    assert is_foreign(tokenizer(text.translate({ord(one): "z" for one in "abcdefghij"}))["input_ids"], text, tokenizer)
