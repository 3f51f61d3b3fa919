"""Bad rows are omitted and counted; template date and arguments are part of a row's identity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specforge.data.module import DraftDataModule
from specforge.data.rows.building import build_rows, make_encoder
from specforge.data.rows.maker import RowMaker
from specforge.data.rows.prepared import prepare_rows
from specforge.data.rows.summary import BadRows, RowSettings
from specforge.data.text.verifier import VerifierTokenizer
from specforge.errors import UsageError

Write = Callable[..., str]
DATED = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
DATED += "{% if add_generation_prompt %}<|im_start|>{% endif %}{% if enable_thinking %}{% endif %}"


@pytest.fixture
def build(verifier: Path, tmp_path: Path) -> Callable[..., Any]:
    """Build the rows of a source through the cache."""

    def build(source: str, folder: Path = verifier, options: dict[str, Any] | None = None, **policy: Any):
        text = VerifierTokenizer(str(folder), **(options or {}))
        settings = RowSettings(64, "truncate", **policy)
        return build_rows(source, lambda: text.template, text.vocabulary_size, settings, tmp_path / "cache")

    return build


def test_bad_rows_are_counted_by_reason_with_the_first_of_each(build, write_lines: Write, chat) -> None:
    rows = [chat("one", f"two {number}") for number in range(97)]
    source = Path(write_lines([*rows[:40], {"messages": []}, *rows[40:], {"messages": None}]))
    source.write_text(source.read_text() + '{"messages": [\n')
    summary = build(str(source)).summary
    assert summary.rows == 97 and summary.bad_rows == 3
    assert summary.bad["no messages"] == BadRows(1, f"{source}:41: 'messages' holds no messages")
    assert [reason.first.split(":")[1] for reason in summary.bad.values()] == ["41", "99", "100"]


def test_too_many_bad_rows_end_the_run_and_refuse_allows_none(build, write_lines: Write, chat) -> None:
    source = write_lines([*(chat("one", "two") for _ in range(10)), {"messages": []}])
    with pytest.raises(UsageError, match=r"1 of 11 rows are bad, and max_bad_share allows 5%: 1 \(no messages\), the"):
        build(source)
    assert build(source, max_bad_share=0.1).summary.rows == 10
    with pytest.raises(UsageError, match=r"train.jsonl:11: .*no messages"):
        build(source, bad_rows="refuse")
    with pytest.raises(UsageError, match="max_bad_share allows 5%"):
        build(source)  # a cache from a run that allowed more is checked against this run's share


def test_a_bad_source_is_refused_while_rows_are_prepared(
    verifier: Path, write_lines: Write, chat, tmp_path: Path
) -> None:
    rows = [chat("one", f"two {number}") if number % 10 else {"text": 5} for number in range(1000)]
    text = VerifierTokenizer(str(verifier))
    source = write_lines(rows)
    maker = RowMaker(make_encoder([source], lambda: text.template, text.vocabulary_size), RowSettings(64, "truncate"))
    with pytest.raises(UsageError, match=r"rows are bad, .* \(malformed text\), the first: .*train.jsonl:1: "):
        prepare_rows([source], maker, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_rows_of_one_chat_share_a_split(make_verifier, templates, write_lines: Write, tmp_path: Path) -> None:
    folder = make_verifier(templates["strips_thinking"])
    turns = [
        [
            {"role": "user", "content": f"ask {n} {turn}"},
            {"role": "assistant", "content": f"<think>{turn}</think>say {n}"},
        ]
        for n in range(40)
        for turn in range(3)
    ]
    chats = [{"messages": [*turns[n], *turns[n + 1], *turns[n + 2]]} for n in range(0, 120, 3)]
    data = DraftDataModule(
        str(folder), write_lines(chats), validation_share=0.3, max_length=128, cache_dir=str(tmp_path)
    )
    data.prepare_data()
    data.setup()
    train, held = data.train_rows, data.validation_rows
    assert held is not None and len(train) + len(held) == 120
    assert not np.isin(train.chats, held.chats).any() and len(held) == 36
    assert data.train_rows.summary.split_chats == 40
    single = DraftDataModule(str(folder), write_lines(chats[:1]), max_length=128, cache_dir=str(tmp_path))
    with pytest.raises(UsageError, match="the rows of one chat, cannot be split"):
        single.setup()


def test_a_build_has_one_date_and_keeps_it(build, make_verifier, write_lines: Write, chat, monkeypatch) -> None:
    folder, source = make_verifier(DATED), write_lines([chat("one", "two")])
    monkeypatch.setattr("specforge.data.text.template.Date", FixedDay("2024-02-29"))
    first = build(source, folder)[0]["input_ids"].tolist()
    monkeypatch.setattr("specforge.data.text.template.Date", FixedDay("2025-01-01"))
    assert build(source, folder)[0]["input_ids"].tolist() == first, "a cached row keeps the date of its build"
    other = build(source, folder, {"template_date": "2025-01-01"})[0]["input_ids"].tolist()
    assert other != first
    with pytest.raises(UsageError, match=r"template_date: .*; give a day such as 2026-11-29"):
        build(source, folder, {"template_date": "yesterday"})


def test_a_resumed_run_keeps_its_date(make_verifier, write_lines: Write, chat, tmp_path, monkeypatch) -> None:
    folder, source = make_verifier(DATED), write_lines([chat("one", f"two {n}") for n in range(600)])

    def prepare(name: str) -> bytes:
        text = VerifierTokenizer(str(folder))
        maker = RowMaker(
            make_encoder([source], lambda: text.template, text.vocabulary_size), RowSettings(64, "truncate")
        )
        prepare_rows([source], maker, tmp_path / name, 1)
        return (tmp_path / name / "train" / "rows.arrow").read_bytes()

    monkeypatch.setattr("specforge.data.text.template.Date", FixedDay("2024-02-29"))
    expected, encode, done = prepare("whole"), RowMaker.make, []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RowMaker, "make", lambda *a: done.append(0) or (encode(*a) if len(done) < 3 else interrupt()))
        prepare("out")
    monkeypatch.setattr("specforge.data.text.template.Date", FixedDay("2025-01-01"))
    assert prepare("out") == expected
    stored = json.loads((tmp_path / "out" / "train" / "summary.json").read_text())
    assert "2024-02-29" in json.dumps(stored)


def test_prepared_rows_of_other_template_arguments_are_refused(
    make_verifier, write_lines: Write, chat, tmp_path
) -> None:
    folder, source = make_verifier(DATED), write_lines([chat("one", "two")])
    text = VerifierTokenizer(str(folder), template_arguments={"enable_thinking": False})
    maker = RowMaker(make_encoder([source], lambda: text.template, text.vocabulary_size), RowSettings(64, "truncate"))
    prepare_rows([source], maker, tmp_path / "out", 1)
    train = str(tmp_path / "out" / "train")
    with pytest.raises(UsageError, match=r"give --data.template_arguments.enable_thinking false"):
        DraftDataModule(str(folder), train, validation_share=0).prepare_data()
    DraftDataModule(
        str(folder), train, validation_share=0, template_arguments={"enable_thinking": False}
    ).prepare_data()
    with pytest.raises(UsageError, match=r"template_arguments.thinkin: the chat template of .* does not read it"):
        DraftDataModule(str(folder), source, template_arguments={"thinkin": False}).prepare_data()


class FixedDay:
    """Replaces ``datetime.date`` with a fixed today."""

    def __init__(self, day: str) -> None:
        self.day = day

    def today(self) -> FixedDay:
        return self

    def isoformat(self) -> str:
        return self.day


def interrupt() -> None:
    raise KeyboardInterrupt


def test_the_share_of_bad_rows_counts_rows_not_lines(build, tmp_path: Path, chat) -> None:
    good, bad = json.dumps(chat("one", "two")), json.dumps({"messages": []})
    unterminated = tmp_path / "unterminated.jsonl"
    unterminated.write_text("\n".join([*[good] * 19, bad]))
    assert build(str(unterminated)).summary.source_rows == 20
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n".join([*[good] * 18, bad, *[""] * 40]))
    with pytest.raises(UsageError, match="1 of 19 rows are bad"):
        build(str(blank))
