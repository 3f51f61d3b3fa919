"""Chat templates render as in serving: arguments, one date, and template errors as one message."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from specforge.data.text.template import ChatTemplate, TemplateRefusal, TooSlow, arguments_advice, time_limit

Load = Callable[..., PreTrainedTokenizerBase]
HELLO = [{"role": "user", "content": "Hello"}]


def test_arguments_reach_the_template(load_tokenizer: Load) -> None:
    template = ChatTemplate(load_tokenizer("{{ messages[0].content }}{{ ' thinks' if enable_thinking else '' }}"))
    assert template.render(HELLO, None) == "Hello"
    assert template.with_arguments(enable_thinking=True).render(HELLO, None) == "Hello thinks"
    assert template.with_arguments(enable_thinking=True).identity != template.identity


def test_the_prompt_is_what_serving_renders(load_tokenizer: Load, templates: dict[str, str]) -> None:
    tokenizer = load_tokenizer(templates["chatml"])
    expected = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert ChatTemplate(tokenizer).prompt(HELLO) == expected


def test_a_template_prints_one_date(load_tokenizer: Load) -> None:
    tokenizer = load_tokenizer("{{ strftime_now('%d %b %Y') }}")
    old, new = ChatTemplate(tokenizer, date="2024-02-29"), ChatTemplate(tokenizer)
    assert (old.render(HELLO, None), new.prints_date) == ("29 Feb 2024", True)
    assert new.with_date("2020-01-05").render(HELLO, None) == "05 Jan 2020"
    assert old.render(HELLO, None) == "29 Feb 2024", "the compiled template is shared, but not its date"
    assert new.with_date("2020-01-05").identity == new.identity != old.identity


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ missing.name.other }}", "missing"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "nested too deeply"),
    ],
)
def test_a_template_error_is_one_message(load_tokenizer: Load, source: str, message: str) -> None:
    with pytest.raises(TemplateRefusal, match=message):
        ChatTemplate(load_tokenizer(source)).render(HELLO, None)


def test_an_endless_loop_is_stopped(load_tokenizer: Load) -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TooSlow, match=r"longer than 0\.2 s"), time_limit(0.2):
        ChatTemplate(load_tokenizer(loops)).render(HELLO, None)
    with time_limit(5.0):
        time.sleep(0)  # the first timer has stopped
    time.sleep(0.3)


def test_the_advice_gives_flags() -> None:
    assert arguments_advice({"enable_thinking": False}) == "give --template_arguments.enable_thinking false"
    assert arguments_advice({}) == "omit --template_arguments"
