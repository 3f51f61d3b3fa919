"""Rows on a terminal: supervised text is visible with and without colors."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from specforge.commands.prepare.record_view import show_record
from specforge.data.rows.maker import RowMaker
from specforge.data.rows.summary import RowSettings
from specforge.data.text.encoding import RowEncoder
from specforge.data.text.records import RawRecord
from specforge.data.text.template import ChatTemplate

COLOR = {"force_terminal": True, "color_system": "standard"}


@pytest.fixture
def shown(tokenizer):
    """Return the printed form of a row."""

    def show(row, max_length=200, **options) -> str:
        encoder = RowEncoder(ChatTemplate(tokenizer), len(tokenizer))
        console = Console(file=io.StringIO(), width=80, legacy_windows=False, **options)
        show_record(
            RawRecord(row, "a.jsonl:1"), RowMaker(encoder, RowSettings(max_length, "truncate")), tokenizer, console
        )
        return console.file.getvalue()

    return show


@pytest.mark.parametrize("options", [{}, COLOR | {"no_color": True}])
def test_without_colors_supervised_text_is_in_brackets(shown, chat, options):
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown(chat("ask", "say [bold]", "more", "é ✓"), **options))
    assert "<|im_start|>assistant\n⟦say [bold]<|im_end|>■⟧" in text
    assert "⟦é ✓<|im_end|>■⟧" in text
    assert "⟦ask" not in text and text.count("⟦") == text.count("⟧") == 2


def test_with_colors_supervised_text_is_highlighted(shown, chat):
    text = shown(chat("ask", "say"), **COLOR)
    assert "⟦" not in text
    (marked,) = re.findall(r"\x1b\[30;102m(.*?)\x1b\[0m", text, flags=re.DOTALL)
    assert marked.startswith("say<|im_end|>") and "ask" not in marked


def test_the_heading_states_whether_the_row_is_kept(shown, chat):
    assert shown({"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, 2).startswith(
        "a.jsonl:1: 2 tokens, 1 supervised (50.0%), truncated"
    )
    assert shown(chat("ask", "say")).split(",")[-1].startswith(" kept")
    assert "dropped: no supervised token" in shown({"input_ids": [5], "loss_mask": [0]})


def test_control_characters_do_not_reach_the_terminal(shown, chat):
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown(chat("\x1b[2Jask\x9b2J", "\rsay\b\x07")))
