"""The judge of benchmarks/templates.py: it must detect every fault, or its page proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from published_templates import Package, Template, end_tokens, make_tokenizer, read_templates
from template_chats import ARGUMENTS, CHATS, call, reply, row, user
from template_judge import EXACT, NEEDLESS, REFUSED, WRONG, Encoded, Reference, judge
from templates import Matrix, encode, try_template

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
STRING_ARGUMENTS = CHATML.replace(
    "({'name': call.function.name, 'arguments': call.function.arguments} | tojson)",
    "call.function.name + '\\n' + call.function.arguments",
)
NEXT_HEADER = """\
{%- for message in messages %}{{- '<|' + message.role + '|>' + message.content }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}{# <|observation|> #}"""
DROPS_THINKING = CHATML.replace(
    "message.content }}",
    "(message.content if loop.last else message.content.split('</think>')[-1].strip()) }}",
)
CLOSED_THINKING = CHATML.replace(
    "'<|im_start|>assistant\\n' }}",
    "'<|im_start|>assistant\\n' + ('<think></think>' if enable_thinking is defined else '<think>\\n') }}",
).replace(
    "message.role + '\\n' +", "message.role + '\\n' + ('<think></think>' if message.role == 'assistant' else '') +"
)
STRADDLES = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}").replace(
    "message.role + '\\n' +",
    "message.role + '\\n' + ('<think>\\n\\n</think>' if message.role == 'assistant' else '') +",
)

Pieces = list[tuple[str, bool]]


def judged(text: str, value: dict[str, Any], encoded: Encoded | None = None, **arguments: Any) -> Any:
    """Judge the encoding of a row with a template: specforge's own by default."""
    tokenizer, ends = make_tokenizer(text), end_tokens(text)
    turns = Reference(tokenizer, ends, arguments).turns(value)
    return judge(value, turns, encode(tokenizer, ends, arguments)(value) if encoded is None else encoded)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (CHATML, "three turns"),
        (CHATML, "unicode"),
        (CHATML, "content in parts, two turns"),
        (CHATML, "call, string, content null"),
        (STRING_ARGUMENTS, "call, object, content null"),
        (NEXT_HEADER, "two turns"),
        (DROPS_THINKING, "thinking inline, two turns"),
        (STRADDLES, "two turns"),
    ],
)
def test_correct_rows_are_exact(text: str, name: str) -> None:
    verdict = judged(text, row(name))
    assert verdict.status == EXACT, verdict
    assert verdict.rows == (2 if text == DROPS_THINKING else 1)


def supervise(*texts: str) -> Callable[[str], Pieces]:
    """Return a function that splits a row into pieces, the given texts supervised in order."""

    def pieces(rest: str) -> Pieces:
        found: Pieces = []
        for text in texts:
            before, _, rest = rest.partition(text)
            found += [(before, False), (text, True)]
        return [*found, (rest, False)]

    return pieces


FIRST, SECOND = "The product is 56.<|im_end|>", "That makes 81.<|im_end|>"


@pytest.mark.parametrize(
    ("rows", "kinds"),
    [
        ([supervise(FIRST, SECOND)], ()),
        ([supervise(FIRST), supervise(SECOND)], ("context is not serving's",)),
        ([supervise(FIRST[:-10], SECOND)], ("end token not supervised",)),
        ([supervise(FIRST + "\n", SECOND)], ("text after the end token supervised",)),
        ([supervise("<|im_start|>assistant\n" + FIRST, SECOND)], ("prompt or header supervised",)),
        ([supervise("What is seven times eight?", FIRST, SECOND)], ("prompt or header supervised",)),
        ([supervise(FIRST[4:], SECOND)], ("beginning of the reply not supervised",)),
        ([supervise(FIRST)], ("reply not supervised",)),
        ([supervise("<|im_end|>")], ("no reply's text supervised", "reply not supervised")),
        ([supervise(FIRST, SECOND), supervise(FIRST, SECOND)], ("reply supervised twice",)),
    ],
)
def test_each_kind_of_fault_is_detected(rows: Sequence[Callable[[str], Pieces]], kinds: tuple[str, ...]) -> None:
    chat = row("two turns")
    text_of_chat = make_tokenizer(CHATML).apply_chat_template(chat["messages"], tokenize=False)
    encoded = [make(text_of_chat) for make in rows]
    if kinds == ("context is not serving's",):
        encoded[1] = [(text.replace("56", "57"), supervised) for text, supervised in encoded[1]]
    verdict = judged(CHATML, chat, Encoded(encoded))
    assert verdict.kinds == kinds
    assert verdict.status == (WRONG if kinds else EXACT)


def test_a_lost_or_doubly_encoded_call_is_detected() -> None:
    chat = {"messages": [user("How is the sky over Zürich?"), call(ARGUMENTS, "", number=2)]}
    tokenizer = make_tokenizer(CHATML)
    right = tokenizer.apply_chat_template(chat["messages"], tokenize=False)
    start = right.index("<tool_call>")
    second = right.index("<tool_call>", start + 1)
    string = [user("How is the sky over Zürich?"), call('{"town": "Zürich", "days": 3}', "", number=2)]
    doubled = tokenizer.apply_chat_template(string, tokenize=False)
    for text_of_chat, stop, kinds in (
        (right, len(right) - 1, ()),
        (right[:second] + "<|im_end|>", second + 10, ("call lost",)),
        (doubled, len(doubled) - 1, ("arguments encoded twice",)),
    ):
        pieces = [(text_of_chat[:start], False), (text_of_chat[start:stop], True), (text_of_chat[stop:], False)]
        assert judged(CHATML, chat, Encoded([pieces])).kinds == kinds


def test_lost_thinking_is_refused() -> None:
    chat = row("thinking by key")
    verdict = judged(CHATML, chat)
    assert (verdict.status, verdict.unlocated) == (REFUSED, ("thinking lost",))
    text_of_chat = make_tokenizer(CHATML).apply_chat_template(chat["messages"], tokenize=False)
    assert judged(CHATML, chat, Encoded([supervise(FIRST)(text_of_chat)])).kinds == ("thinking lost",)


def test_a_prompt_that_is_not_a_prefix_is_refused_without_an_argument() -> None:
    chat = row("two turns")
    assert judged(CLOSED_THINKING, chat).status == REFUSED
    assert judged(CLOSED_THINKING, chat, enable_thinking=False).status == EXACT
    text_of_chat = make_tokenizer(CLOSED_THINKING).apply_chat_template(chat["messages"], tokenize=False)
    assert judged(CLOSED_THINKING, chat, Encoded([supervise(FIRST, SECOND)(text_of_chat)])).kinds == (
        "cannot be located",
    )


def test_a_needless_refusal_is_distinguished_from_a_correct_one() -> None:
    assert judged(CHATML, row("one turn"), Encoded(refusal="no")).status == NEEDLESS
    assert judged(CHATML, {"messages": [user(), reply("")]}, Encoded(refusal="no")).status == REFUSED
    assert judged("{{ raise_exception('no') }}", row("one turn"), Encoded(refusal="no")).status == REFUSED


def test_templates_are_read_from_files_and_modules_once(tmp_path: Path) -> None:
    package = Package("some==1.0")
    folder = tmp_path / package.requirement / "deep"
    (folder / "score").mkdir(parents=True)
    for name in ("one.jinja", "same.jinja", "score/rerank.jinja"):
        (folder / name).write_text(CHATML)
    (folder / "chat_templates.py").write_text(f"NAME = {NEXT_HEADER!r}\nOTHER = 'no template'\n")
    read = read_templates(tmp_path, (package,))
    assert [(template.package, template.name, template.text) for template in read] == [
        ("some", "NAME", NEXT_HEADER),
        ("some", "one", CHATML),
    ]


def test_the_page_counts_and_lists_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("templates.CHATS", {name: CHATS[name] for name in ("one turn", "two turns")})
    texts = {"plain": CHATML, "closed": CLOSED_THINKING, "glm": NEXT_HEADER}
    results = [result for name, text in texts.items() for result in try_template(Template("trl", name, text))]
    assert [dict(result.arguments) for result in results[2:6]] == [
        {},
        {},
        {"enable_thinking": False},
        {"enable_thinking": False},
    ]
    page = Matrix(results).page(1.0)
    assert "- 2 of 3 templates are exact on one and two turns. 0 templates give one row per turn" in page
    assert "- In 1 more, a plain reply can be located" in page
    assert "- Silently wrong: none." in page
    assert "| two turns | 2 | 1 | 0 | 0 |" in page
    assert "| `enable_thinking: false` | 1 | trl: closed |" in page
    assert page.rstrip().endswith("so the last reply of a chat has none:\ntrl: glm.")
    verdict = replace(results[0].verdict, status=WRONG, kinds=("end token not supervised",))
    page = Matrix([replace(results[0], verdict=verdict), *results[1:]]).page(1.0)
    assert "- Silently wrong: 1 rows." in page
    assert "| end token not supervised | trl: plain | one turn |" in page
