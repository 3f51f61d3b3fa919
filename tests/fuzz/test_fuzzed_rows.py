"""Randomly changed rows of every published form: each gives a row or one message, never another exception."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from specforge.data.rows.maker import RowMaker
from specforge.data.rows.prepared import Prepared, prepare_rows
from specforge.data.rows.reading import open_rows
from specforge.data.rows.summary import RowSettings
from specforge.data.text.bad_rows import BadRow
from specforge.data.text.encoding import RowEncoder, TokenRow
from specforge.data.text.prompts import read_conversation
from specforge.data.text.records import RawRecord, Record
from specforge.data.text.sources import read_records
from specforge.data.text.verifier import VerifierTokenizer
from specforge.errors import SpecforgeError, UsageError

VERIFIER = Path(__file__).parents[2] / "configs" / "quickstart" / "verifier"
WHERE = "train.jsonl:7"
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "Weather in Rome?"}], "name": "Ann"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Look it up.",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    {"role": "assistant", "content": "Sunny.", "weight": 0},
    {"role": "user", "content": "And tomorrow?"},
    {"role": "assistant", "content": "Rain.", "thinking": "Hm.", "train": True},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
SHAREGPT = [
    {"from": "human", "value": "Weather?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
    {"from": "observation", "value": "sunny"},
    {"from": "gpt", "value": "Sunny."},
]
FORMS: list[dict[str, Any]] = [
    {"messages": CHAT, "tools": TOOLS},
    {"conversations": SHAREGPT, "system": "Be kind.", "tools": json.dumps(TOOLS)},
    {"prompt": "How many days?", "completion": "Seven."},
    {"prompt": CHAT[1:2], "completion": CHAT[-1:], "chosen": None},
    {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]]},
    {"text": "Seven days are a week."},
    {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]},
]
JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1.5, float("nan"), float("inf"), 10**400, 2**63, "", " ", "x", "\ud800", "a\udcffb"),
    *("\x00", "😀" * 500, "{}", "[]", "null", "[" * 5000, '{"a": ' * 2000, [], {}, [None], {"": None}, [[["x"]]]),
    *({"type": "image_url"}, {"role": "user"}, [{"type": "text", "text": None}], "assistant", "<|im_end|>", "{% x %}"),
]


@pytest.fixture(scope="module")
def encoder() -> RowEncoder:
    text = VerifierTokenizer(str(VERIFIER))
    return RowEncoder(text.template, text.vocabulary_size)


def junk(rng: random.Random) -> Any:
    if rng.random() < 0.03:
        deep: list[Any] = []
        for _ in range(3000):
            deep = [deep]
        return deep
    return copy.deepcopy(rng.choice(JUNK))


def mutate(value: Any, rng: random.Random) -> Any:
    """Change one node of a value, at any depth."""
    inside = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inside or rng.random() < 0.15:
        return rng.choice([junk(rng), junk(rng), [value], {"content": value}, [value, value]])
    key = rng.choice(inside)
    match rng.randrange(8):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[rng.choice(["role", "from", "value", "text", "messages", "x"])] = value.pop(key)
        case 2 if isinstance(value, list):
            value.insert(key, value[rng.choice(inside)])
        case _:
            value[key] = mutate(value[key], rng)
    return value


def raw_records(number: int, rng: random.Random) -> list[RawRecord]:
    """Return changed rows, as values or JSON lines, some with a changed byte."""
    records = []
    for _ in range(number):
        row = copy.deepcopy(rng.choice(FORMS))
        for _ in range(rng.choice([1, 1, 2, 3])):
            row = mutate(row, rng)
        try:
            line = bytearray(json.dumps(row).encode())
        except RecursionError:
            records.append(RawRecord(row, WHERE))
            continue
        if rng.random() < 0.2:
            line[rng.randrange(len(line))] = rng.randrange(256)
        records.append(RawRecord(rng.choice([row, bytes(line)]), WHERE))
    return records


def encoded(encoder: RowEncoder, record: Record) -> list[TokenRow]:
    (rows,) = encoder.encode([record])
    if isinstance(rows, BadRow):
        raise rows
    return rows


def test_a_changed_row_gives_a_row_or_one_message(encoder: RowEncoder) -> None:
    outcomes: Counter[str] = Counter()
    for raw in raw_records(2500, random.Random(0)):
        for take in (lambda record: encoded(encoder, record), read_conversation):
            try:
                take(raw.parse())
                outcomes["accepted"] += 1
            except UsageError as error:
                assert str(error).startswith(f"{WHERE}: ")
                assert len(str(error)) < 2000
                str(error).encode()
                outcomes["refused"] += 1
    assert min(outcomes["accepted"], outcomes["refused"]) > 500


def test_a_flipped_bit_of_prepared_rows_is_detected(tmp_path: Path, encoder: RowEncoder) -> None:
    source = tmp_path / "train.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in FORMS[2:3] * 300))
    settings = RowSettings(max_length=64, long_rows="truncate")
    prepare_rows([str(source)], RowMaker(encoder, settings), tmp_path / "rows", 1)
    folder = tmp_path / "rows" / "train"
    rng = random.Random(0)
    for number in range(300):
        file = (folder / "rows.arrow", folder / "summary.json", tmp_path / "rows" / "summary.json")[number % 3]
        content = file.read_bytes()
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        if file.parent == folder:
            for read in (lambda: open_rows(folder, 10**6).supervised_counts, lambda: list(read_records(str(folder)))):
                with pytest.raises(SpecforgeError, match=f"^{folder}"):
                    read()
        else:
            assert Prepared.read(tmp_path / "rows") is None
        file.write_bytes(content)
    assert int(open_rows(folder, encoder.vocabulary_size).supervised_counts.sum()) > 0
