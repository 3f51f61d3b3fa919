"""Which text of a chat is supervised, with one small template of each kind and with random ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from specforge.data.text.bad_rows import BadRow
from specforge.data.text.chat import Chat, read_chat
from specforge.data.text.records import Record
from specforge.data.text.replies import BETWEEN, CORRECTED, NEXT_HEADER, TAGGED, UNENDED, ReplyFinder, SupervisedText
from specforge.data.text.template import ChatTemplate, time_limit

Load = Callable[..., PreTrainedTokenizerBase]
HEAD, EOS = "<|im_start|>", "<|im_end|>"
TALK = ["one", "two", "three", "four"]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": 'Ro"me', "days": 2, "hot": True}}}
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} ARGUMENTS</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def dialogue(*contents: str, **extra: Any) -> Chat:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    messages[-1] |= extra
    chat = read_chat(Record({"messages": messages}, "here"))
    assert isinstance(chat, Chat)
    return chat


def supervised(text: SupervisedText) -> list[str]:
    return [text.text[start:end] for start, end in text.spans]


@pytest.fixture(scope="session")
def plain(load_tokenizer: Load) -> PreTrainedTokenizerBase:
    return load_tokenizer()


@pytest.fixture
def finder(plain: PreTrainedTokenizerBase) -> Callable[..., ReplyFinder]:
    """Return a factory of reply finders; each template gets its own copy of a shared tokenizer."""

    def make(template: str, ends: tuple[str, ...] = (EOS,), **arguments: Any) -> ReplyFinder:
        tokenizer = type(plain)(tokenizer_object=plain.backend_tokenizer, eos_token=EOS, bos_token=HEAD)
        tokenizer.chat_template = template
        return ReplyFinder(ChatTemplate(tokenizer, arguments, end_tokens=ends))

    return make


def test_each_reply_with_its_end_token_is_supervised(finder, templates) -> None:
    (text,) = finder(templates["chatml"]).find(dialogue("one", "two", "three", "four \n"), "here").texts
    assert supervised(text) == ["two<|im_end|>", "four \n<|im_end|>"]
    assert text.rules == (BETWEEN, BETWEEN) and not text.add_special_tokens


def test_text_after_the_end_token_is_not_supervised(finder, templates) -> None:
    template = templates["chatml"] + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    texts = finder(template).find(dialogue(*TALK), "here").texts
    assert [supervised(text) for text in texts] == [["two<|im_end|>", "four<|im_end|>"]]


def test_the_first_of_several_end_tokens_ends_a_reply(finder) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|><|endoftext|>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (text,) = finder(template, ("<|endoftext|>", EOS)).find(dialogue("one", "two"), "here").texts
    assert supervised(text) == ["two<|im_end|>"]


def test_without_a_known_end_token_the_first_special_one_ends_a_reply(finder, templates) -> None:
    template = templates["chatml"] + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    (text,) = finder(template, ()).find(dialogue("one", "two"), "here").texts
    assert (supervised(text), text.rules) == (["two<|im_end|>"], (UNENDED,))


def test_an_end_token_that_only_the_next_header_shows_is_supervised(finder) -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}<|im_end|>{% else %}A: {% endif %}{{ m.content }}\n"
    template += "{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    (text,) = finder(template).find(dialogue(*TALK), "here").texts
    assert (supervised(text), text.rules) == (["two\n<|im_end|>", "four\n"], (NEXT_HEADER, UNENDED))


def test_it_is_supervised_if_earlier_thinking_is_dropped(finder) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_end|>{{ m.content }}{% else %}A: {% if loop.last %}"
        "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}"
    )
    chat = dialogue(*TALK, reasoning_content="so")
    chat.messages[1]["reasoning_content"] = "why"
    texts = finder(template).find(chat, "here").texts
    assert [supervised(text) for text in texts] == [["<think>why</think>two<|im_end|>"], ["<think>so</think>four"]]
    assert "A: two<|im_end|>three" in texts[1].text


def test_an_end_token_that_strips_spaces_is_supervised(finder, templates, plain) -> None:
    from tokenizers import AddedToken

    reply_finder = finder(templates["chatml"], ("<|stop|>",))
    reply_finder.template.tokenizer.add_tokens([AddedToken("<|stop|>", rstrip=True, special=True)])
    reply_finder.template.tokenizer.chat_template = templates["chatml"].replace(EOS, "<|stop|>")
    (text,) = ReplyFinder(reply_finder.template).find(dialogue("one", "two"), "here").texts
    assert supervised(text) == ["two<|stop|>\n"], "the token covers the newline"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n", TAGGED),
        ("{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}", CORRECTED),
        ("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n", CORRECTED),
    ],
)
def test_generation_tags_are_checked_against_the_rule(finder, body: str, expected: str) -> None:
    (text,) = finder(tagged("<|im_start|>assistant\n" + body)).find(dialogue(*TALK), "here").texts
    assert supervised(text) == ["two<|im_end|>", "four<|im_end|>"]
    assert text.rules == (expected, expected)


def test_generation_tags_that_cover_the_header_are_corrected(finder) -> None:
    body = "{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>{% endgeneration %}\n"
    (text,) = finder(tagged(body)).find(dialogue(*TALK), "here").texts
    assert (supervised(text)[0], text.rules[0]) == ("two<|im_end|>", CORRECTED)


def test_generation_tags_that_omit_text_are_refused(finder) -> None:
    body = "<|im_start|>assistant\n{{ m.content }}{% generation %}<|im_end|>{% endgeneration %}\n"
    with pytest.raises(BadRow, match="omit its content"):
        finder(tagged(body)).find(dialogue(*TALK), "here")


def tagged(reply: str) -> str:
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + reply
        + "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def test_a_template_that_rewrites_earlier_turns_gives_one_row_per_turn(finder, templates) -> None:
    chat = dialogue("one", "<think>so</think>two", "three", "<think>then</think>four")
    first, second = finder(templates["strips_thinking"]).find(chat, "here").texts
    assert supervised(first) == ["<think>so</think>two<|im_end|>"]
    assert supervised(second) == ["<think>then</think>four<|im_end|>"]
    assert "assistant\ntwo<|im_end|>" in second.text, "as serving sends it"


def test_unchanged_turns_share_a_row(finder, templates) -> None:
    chat = dialogue("one", "two", "three", "<think>then</think>four", "five", "six")
    texts = finder(templates["strips_thinking"]).find(chat, "here").texts
    assert [len(text.spans) for text in texts] == [2, 1]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"tool_calls": [CALL]}, "its call is lost"),
        ({"reasoning_content": "because"}, "its thinking is lost"),
    ],
)
def test_parts_that_a_template_omits_are_refused(finder, templates, extra: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as refused:
        finder(templates["chatml"]).find(dialogue("one", "two", **extra), "train.jsonl:3")
    assert (refused.value.reason, refused.value.location) == (reason, "train.jsonl:3")


def test_lost_content_is_refused(finder) -> None:
    parts = "{% for m in messages %}<|im_start|>{% for p in m.content if p.text %}{{ p.text }}{% endfor %}<|im_end|>"
    with pytest.raises(BadRow, match="its content is not in the text"):
        finder(parts + "{% endfor %}").find(dialogue("one", "two"), "here")


def test_a_reply_that_holds_an_end_token_is_refused(finder, templates) -> None:
    with pytest.raises(BadRow, match="its content is not in the text"):
        finder(templates["chatml"]).find(dialogue("one", f"two{EOS}three"), "here")


@pytest.mark.parametrize("arguments", ["{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}"])
def test_arguments_are_given_in_the_form_the_template_expects(finder, arguments: str) -> None:
    chat = dialogue("one", "", tool_calls=[CALL])
    (text,) = finder(CALLS.replace("ARGUMENTS", arguments)).find(chat, "here").texts
    assert supervised(text) == ['<call>weather {"city": "Ro\\"me", "days": 2, "hot": true}</call><|im_end|>']


def test_arguments_in_another_notation_are_found(finder) -> None:
    notation = "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}"
    (text,) = finder(CALLS.replace("ARGUMENTS", notation)).find(dialogue("a", "", tool_calls=[CALL]), "here").texts
    assert '<city>Ro"me</city><days>2</days><hot>True</hot>' in supervised(text)[0]
    with pytest.raises(BadRow, match="call of weather with its arguments"):
        finder(CALLS.replace("ARGUMENTS", "")).find(dialogue("one", "", tool_calls=[CALL]), "here")


def test_an_omitted_call_is_refused(finder) -> None:
    first = CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    notation = "{{ c.function.arguments | tojson }}"
    with pytest.raises(BadRow, match="call of weather"):
        finder(first.replace("ARGUMENTS", notation)).find(dialogue("one", "", tool_calls=[CALL, CALL]), "here")


def test_doubly_encoded_arguments_are_refused(finder) -> None:
    twice = "{{ c.function.arguments | tojson | tojson }}"
    with pytest.raises(BadRow, match="with its arguments"):
        finder(CALLS.replace("ARGUMENTS", twice)).find(dialogue("one", "", tool_calls=[CALL]), "here")


def test_a_prompt_that_is_not_a_prefix_is_refused_with_alternatives(finder, templates) -> None:
    opening = "<|im_start|>assistant\n{% if enable_thinking is not defined %}<think>\n{% endif %}' }}"
    template = templates["chatml"].replace("{{ '<|im_start|>assistant\n' }}", opening.removesuffix("' }}"))
    with pytest.raises(BadRow, match=r"the prompt has '<think>\\n'.*--template_arguments.enable_thinking false") as why:
        finder(template).find(dialogue("one", "two"), "train.jsonl:3")
    assert why.value.reason == "the prompt is not a prefix"
    (text,) = finder(template, enable_thinking=False).find(dialogue("one", "two"), "here").texts
    assert supervised(text) == ["two<|im_end|>"]


def test_only_turns_to_train_on_are_supervised(finder, templates) -> None:
    chat = read_chat(Record({"messages": [
        {"role": "assistant", "content": "Welcome"}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "bad", "weight": 0}, {"role": "user", "content": "So"},
        {"role": "assistant", "content": "good"},
    ]}, "here"))  # fmt: skip
    (text,) = finder(templates["chatml"]).find(chat, "here").texts
    assert supervised(text) == ["good<|im_end|>"] and "Welcome" in text.text


def test_rendering_a_long_chat_is_linear_in_its_turns(finder, templates, monkeypatch) -> None:
    chat = dialogue(*(f"text {number}" for number in range(120)))
    rendered: list[int] = []
    render = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *a, **k: rendered.append(len(a[1])) or render(*a, **k))
    reply_finder = finder(templates["chatml"])
    (text,) = reply_finder.find(chat, "here").texts
    assert supervised(text) == [f"text {number}<|im_end|>" for number in range(1, 120, 2)]
    assert sum(rendered) < 25 * 120, "messages rendered: prefixes of all lengths would be 7,260"


@pytest.mark.parametrize("system", [True, False])
def test_long_chats_supervise_the_same_text_as_short_ones(finder, system: bool) -> None:
    template = (  # closes the chat, shows the end token with the next header, and counts its turns
        "{% if messages[0].role == 'system' %}S{{ messages[0].content }}{% endif %}{% for m in messages %}"
        "{% if m.role == 'user' %}<|im_end|>{{ m.content }}{% elif m.role == 'assistant' %}A {{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}A {% else %}<|endoftext|>{% endif %}"
    )
    chat = dialogue(*(f"t{number}" for number in range(80)))
    if system:
        chat = Chat([{"role": "system", "content": "be"}, *chat.messages], None, (False, *chat.supervised))
    (text,) = finder(template).find(chat, "here").texts
    expected = [f"t{number}<|im_end|>" for number in range(1, 78, 2)]
    assert supervised(text) == [*expected, "t79<|endoftext|>"]


def test_a_long_chat_with_rewritten_turns_gives_one_row_per_turn(finder, templates) -> None:
    chat = dialogue(*("ask" if number % 2 == 0 else f"<think>{number}</think>text" for number in range(40)))
    assert len(finder(templates["strips_thinking"]).find(chat, "here").texts) == 20


def test_only_the_requested_part_is_rendered(finder, templates) -> None:
    chat = dialogue(*("word " * 20 for _ in range(50)))
    replies = finder(templates["chatml"]).find(chat, "here", characters=500)
    assert not replies.is_whole and len(replies.texts[0].spans) == 3
    assert finder(templates["chatml"]).find(chat, "here", characters=50_000).is_whole


def test_a_long_chat_that_takes_too_long_is_not_retried(finder, templates, monkeypatch) -> None:
    monkeypatch.setattr("specforge.data.text.replies.time_limit", lambda: time_limit(0.05))
    slow = "{% for a in range(900) %}{% for b in range(50) %}{% endfor %}{% endfor %}" + templates["chatml"]
    began = time.monotonic()
    with pytest.raises(BadRow, match=r"longer than 0\.05 s"):
        finder(slow).find(dialogue(*("text" for _ in range(2000))), "here")
    assert time.monotonic() - began < 60, "after the blocks, 2,000 prefixes are not tried"


def test_a_missing_template_is_named(finder) -> None:
    with pytest.raises(BadRow, match=r"train.jsonl:3: .* no chat template"):
        finder("").find(dialogue("one", "two"), "train.jsonl:3")


@dataclass(frozen=True)
class Parts:
    """The parts of a random template, and a slow reference for the supervised text."""

    header: str
    opening: str  # of the generation prompt, empty thinking
    thinking: bool
    drops_thinking: bool
    end: str
    suffix: str
    closing: str

    def template(self) -> str:
        thinking = "<think>{{ m.reasoning_content }}</think>" if self.thinking else ""
        if self.drops_thinking:
            thinking = "{% if loop.last %}" + thinking + "{% endif %}"
        reply = self.opening + "{% if m.reasoning_content %}" + thinking + "{% endif %}{{ m.content }}" + self.end
        return (
            "{% for m in messages %}{{ m.role }}"
            + self.header
            + "{% if m.role == 'assistant' %}"
            + reply
            + self.suffix
            + "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant"
            + self.header
            + self.opening
            + "{% else %}"
            + self.closing
            + "{% endif %}"
        )

    def supervised(self, chat: Chat) -> list[str]:
        expected = []
        for message, is_reply in zip(chat.messages, chat.supervised, strict=True):
            if is_reply:
                reasoning = message.get("reasoning_content")
                thinking = f"<think>{reasoning}</think>" if reasoning and self.thinking else ""
                expected.append(thinking + message["content"] + self.end)
        return expected


@settings(max_examples=60, deadline=None)
@given(
    parts=st.builds(
        Parts,
        header=st.sampled_from(["\n", ": ", "<|im_start|>"]),
        opening=st.sampled_from(["", "<think></think>"]),
        thinking=st.booleans(),
        drops_thinking=st.booleans(),
        end=st.sampled_from([EOS, "<|endoftext|>"]),
        suffix=st.sampled_from(["", "\n", "\n\n"]),
        closing=st.sampled_from(["", "<|endoftext|>", "\n"]),
    ),
    turns=st.lists(
        st.tuples(st.text("abc é", min_size=1), st.text("ab ", max_size=4), st.booleans()), min_size=1, max_size=20
    ),
)
def test_random_templates_supervise_the_same_text_as_a_loop_over_turns(plain, parts: Parts, turns) -> None:
    messages: list[dict[str, Any]] = []
    for content, thinking, is_trained in turns:
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": f"r{content}", "train": is_trained})
        if thinking.strip():
            messages[-1]["reasoning_content"] = thinking
    chat = read_chat(Record({"messages": messages}, "here"), needs_reply=False)
    tokenizer = type(plain)(tokenizer_object=plain.backend_tokenizer, eos_token=EOS)
    tokenizer.chat_template = parts.template()
    finder = ReplyFinder(ChatTemplate(tokenizer, end_tokens=(EOS, "<|endoftext|>")))
    thinks = any(m.get("reasoning_content") for m, kept in zip(chat.messages, chat.supervised, strict=True) if kept)
    if thinks and not parts.thinking:
        with pytest.raises(BadRow, match="thinking is not in the text"):
            finder.find(chat, "here")
        return
    texts = finder.find(chat, "here").texts
    assert [reply for text in texts for reply in supervised(text)] == parts.supervised(chat)
    assert len(texts) <= 1 or parts.drops_thinking
