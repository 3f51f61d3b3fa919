"""Sample texts: the rounds through them, and their Markdown."""

from __future__ import annotations

import html
import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tensorboard.plugin_util import markdown_to_safe_html
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel as Bytes
from transformers import PreTrainedTokenizerFast

from specforge.decoding.replay import replay
from specforge.training.callbacks.board.samples import RESPONSE_TOKENS, Sample, accepted_by_round, to_markdown


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    made = Tokenizer(BPE({byte: number for number, byte in enumerate(sorted(Bytes.alphabet()))}, []))
    made.pre_tokenizer, made.decoder = Bytes(add_prefix_space=False), ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def shown(markdown: str) -> tuple[str, str]:
    """Return heading and text as TensorBoard shows them, accepted tokens between ⟦ and ⟧."""
    page = markdown_to_safe_html(markdown)
    heading, text = re.findall(r"<p>(.*?)</p>", page, re.DOTALL)
    marked = text.replace("<strong>", "⟦").replace("</strong>", "⟧").replace("↵<br>", "\n")
    assert "<p>" not in marked and not re.search(r"</?(?!em|/em|br)\w+", marked), "something was read as markup"
    return re.sub(r"<[^>]*>", "", heading), html.unescape(re.sub(r"<em>.*</em><br>", "", marked, flags=re.DOTALL))


@given(
    st.integers(1, 5).flatmap(lambda steps: st.lists(st.lists(st.booleans(), min_size=steps, max_size=steps))),
)
def test_rounds_are_those_that_the_acceptance_length_counts(rows: list[list[bool]]) -> None:
    if not rows:
        return
    matches = torch.tensor(rows, dtype=torch.float32)
    rounds = accepted_by_round(matches.T)
    expected = replay(matches[None], torch.tensor([len(rows)]))
    assert len(rounds) == float(expected.rounds[-1])
    assert sum(rounds) + len(rounds) == len(rows)
    steps = matches.shape[1]
    reached = [sum(accepted >= k for accepted in rounds) for k in range(1, steps + 1)]
    assert reached == expected.accepted[-1].tolist()


def test_tokens_of_the_draft_are_bold_and_the_verifiers_plain(tokenizer):
    text = tokenizer.encode("abcdefghi")
    sample = Sample(tokenizer.encode("Say it."), text, rounds=[2, 0, 3], steps=4)
    heading, marked = shown(to_markdown(sample, tokenizer))
    assert marked == "a⟦bc⟧de⟦fgh⟧i"
    assert heading.startswith("2.67 tokens per verifier forward pass: 8 tokens in 3 rounds that draft 4")


SPECIAL = (
    "# 1. *a* _b_ `c` [d](e) <b>&amp;</b> | x | \\ ~~ - + ! \n\n    code\n> q\n---\n<script>1</script>\t$x$ é ü 漢 ✓"
)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zs", "Zl", "Zp", "Cf"]), min_size=2))
@example(SPECIAL)
def test_no_text_is_read_as_markup(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    tokens = tokenizer.encode(text)[:RESPONSE_TOKENS]
    decoded = tokenizer.decode(tokens)
    _, marked = shown(to_markdown(Sample([], tokens, [0] * (len(tokens) - 1), 1), tokenizer))
    assert marked.split() == decoded.replace("\0", "�").split()


def test_a_long_response_is_cut(tokenizer):
    tokens = tokenizer.encode("a" * (RESPONSE_TOKENS + 9))
    _, marked = shown(to_markdown(Sample([], tokens, [0] * (len(tokens) - 1), 1), tokenizer))
    assert marked == "a" * RESPONSE_TOKENS + " …"


def test_a_character_of_several_tokens_is_whole(tokenizer):
    tokens = tokenizer.encode("漢字")  # three tokens each
    _, marked = shown(to_markdown(Sample([], tokens, [1, 2], 2), tokenizer))
    assert marked == "漢字"  # a character belongs to the model that produced its last token
