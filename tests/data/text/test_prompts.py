"""Prompt sets: every layout, several turns, and errors with their line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from specforge.data.text.prompts import by_category, prompt_set_name, read_prompts
from specforge.data.text.template import ChatTemplate
from specforge.errors import UsageError

VERIFIER = Path(__file__).parents[3] / "configs" / "quickstart" / "verifier"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(VERIFIER)


@pytest.fixture
def read(tmp_path):
    def write_and_read(*rows, **options):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_prompts(str(path), **options)

    return write_and_read


def rendered(tokenizer, *messages):
    roles = ("user", "assistant")
    chat = [{"role": roles[number % 2], "content": text} for number, text in enumerate(messages)]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def test_turns_are_asked_in_order(read, tokenizer):
    [conversation] = read({"turns": ["Hi", "And?"]})
    assert len(conversation.turns) == 2
    assert conversation.prompt(0, [], ChatTemplate(tokenizer)) == rendered(tokenizer, "Hi")
    assert conversation.prompt(1, ["Hello."], ChatTemplate(tokenizer)) == rendered(tokenizer, "Hi", "Hello.", "And?")


def test_rows_are_split_by_category_and_limited_in_each(read):
    """The rows of SPEED-Bench as they are."""
    names = ["coding", "coding", "coding", "math", None, " math ", "coding", "", 7]
    rows = [
        {
            "question_id": str(number),
            "category": name,
            "sub_category": "x",
            "turns": [f"Ask {number}"],
            "multiturn": False,
        }
        for number, name in enumerate(names)
    ]

    def numbers(**options):
        split = by_category("bench", read(*rows, **options))
        return {name: [one.turns[0][0]["content"][4:] for one in found] for name, found in split.items()}

    whole = {"bench coding": ["0", "1", "2", "6"], "bench math": ["3", "5"], "bench": ["4", "7", "8"]}
    assert numbers() == whole
    assert numbers(limit=2) == {name: found[:2] for name, found in whole.items()}
    assert [len(read({"turns": ["Hi"]}, {"turns": ["Ho"]}, {"broken": 1}, limit=2))] == [2]


def test_replies_of_a_chat_are_left_to_the_verifier(read, tokenizer):
    chat = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "And?"), ("assistant", "Bye.")]
    [conversation] = read({"messages": [{"role": role, "content": content} for role, content in chat]})
    assert [[message["role"] for message in turn] for turn in conversation.turns] == [["system", "user"], ["user"]]
    [sharegpt] = read({"conversations": [{"from": "human", "value": "Hi"}]})
    assert sharegpt.turns == ([{"role": "user", "content": "Hi"}],)


def test_the_prompt_of_a_tokenised_row_ends_before_its_response(read, tokenizer):
    [conversation] = read({"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1], "messages": "not read"})
    assert conversation.prompt(0, [], ChatTemplate(tokenizer)) == [5, 6]


def test_ids_of_another_tokenizer_give_way_to_the_messages(read, tokenizer):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    own = rendered(tokenizer, "Hi")
    for prompt in ([5, 6, 7], [7, *own]):  # the second is a prompt of another template of this tokenizer
        [conversation] = read({"input_ids": [*prompt, 8], "loss_mask": [0] * len(prompt) + [1], "messages": chat})
        expected = prompt if prompt[1:] == own else own
        assert conversation.prompt(0, [], ChatTemplate(tokenizer)) == expected


def test_a_prompt_is_one_turn(read, tokenizer):
    [conversation] = read({"prompt": "Hi", "response": "not read"})
    assert conversation.prompt(0, [], ChatTemplate(tokenizer)) == rendered(tokenizer, "Hi")
    [conversation] = read({"prompt": "Hi", "system": "Be kind"})
    assert [message["role"] for message in conversation.turns[0]] == ["system", "user"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "not read"}]},
        {"instruction": "Hi", "input": "", "output": "not read"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}], "weight": 1}], "turns": None},
    ],
)
def test_other_published_forms_are_read(read, row):
    [conversation] = read(row)
    assert conversation.turns == ([{"role": "user", "content": "Hi"}],)


def test_at_most_limit_conversations_are_read(read):
    assert len(read(*[{"prompt": "Hi"}] * 5, limit=2)) == 2


def test_a_template_that_refuses_a_chat_is_named_with_its_line(read, tokenizer):
    [conversation] = read({"turns": ["Hi"]})
    bare = AutoTokenizer.from_pretrained(VERIFIER)
    bare.chat_template = "{{ raise_exception('no chats here') }}"
    with pytest.raises(UsageError, match=r"prompts.jsonl:1: the chat cannot be rendered: no chats here"):
        conversation.prompt(0, [], ChatTemplate(bare))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"turns": []}, "'turns' must be a list of non-empty texts"),
        ({"turns": ["Hi", ""]}, "'turns' must be a list of non-empty texts"),
        ({"turns": "Hi"}, "'turns' must be a list of non-empty texts"),
        ({"question": "Hi"}, "a row without a prompt"),
        ({"prompt": "  "}, "a row without a prompt"),
        ({"input_ids": [1, "2"], "loss_mask": [0, 1]}, "must be lists of integers"),
        ({"input_ids": 5, "loss_mask": 1}, "must be lists of integers"),
        ({"input_ids": [1, 2], "loss_mask": [1, 1]}, "no prompt before the first supervised token"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no user or tool message"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role 'wizard'"),
    ],
)
def test_errors_name_the_line(read, row, reason):
    with pytest.raises(UsageError, match=r"prompts\.jsonl:2: ") as error:
        read({"turns": ["Hi"]}, row)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("source", "name"), [("a/mt-bench.jsonl", "mt-bench"), ("a/b.json.gz", "b"), ("owner/data", "owner/data")]
)
def test_a_prompt_set_is_named_after_its_file(source, name):
    assert prompt_set_name(source) == name
