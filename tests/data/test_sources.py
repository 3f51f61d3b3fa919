from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from specforge.data.sources import check_source, read_records, source_fingerprint
from specforge.errors import UsageError


def test_lines_are_read_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "é"}\n\n{"text": "b"}', encoding="utf-8")
    records = list(read_records(str(path)))
    assert [record.value["text"] for record in records] == ["é", "b"]
    assert [record.location for record in records] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": }', "Expecting value"),
        (b'{"text": "cut of', "Unterminated string"),
        (b'["a", "b"]', "expected a JSON object"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 200_000, "invalid JSON"),
    ],
)
def test_a_bad_last_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line)
    with pytest.raises(UsageError, match=reason) as refused:
        list(read_records(str(path)))
    assert str(refused.value).startswith(f"{path}:2: ")


def test_sources_that_cannot_be_read_are_refused_by_key(tmp_path: Path, write_lines: Callable[..., str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.csv").write_text("a,b")
    for name, reason in {
        "missing.jsonl": "does not exist",
        "empty.jsonl": "is empty",
        "rows.csv": "no JSON-lines file",
        "folder": "save_to_disk",
    }.items():
        with pytest.raises(UsageError, match=reason) as refused:
            check_source(str(tmp_path / name), "data.train")
        assert str(refused.value).startswith(f"data.train: {tmp_path / name} ")
        assert "allowed" in str(refused.value) or name == "empty.jsonl"
    check_source(write_lines([{"text": "a"}]), "data.train")


def test_names_that_look_like_a_hub_data_set_wait_until_they_are_read() -> None:
    check_source("owner/name", "data.train")
    check_source("owner/name:train[:10%]", "data.train")
    for path in ("rows/train.jsonl", "./rows", "rows", "/owner/name"):
        with pytest.raises(UsageError, match="does not exist"):
            check_source(path, "data.train")


def test_a_datasets_folder_is_read(tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    Dataset.from_list([{"text": "a"}, {"text": "b"}]).save_to_disk(folder)
    check_source(folder, "data.train")
    records = list(read_records(folder))
    assert [record.value for record in records] == [{"text": "a"}, {"text": "b"}]
    assert records[1].location == f"{folder} row 1"
    assert source_fingerprint(folder) == source_fingerprint(folder)


def test_a_folder_of_several_splits_names_them(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    DatasetDict(train=Dataset.from_list([{"text": "a"}])).save_to_disk(str(folder))
    with pytest.raises(UsageError, match="saved/train"):
        check_source(str(folder), "data.train")
    check_source(str(folder / "train"), "data.train")


def test_a_damaged_datasets_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    Dataset.from_list([{"text": "a"}]).save_to_disk(str(folder))
    next(folder.glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be read as a folder of rows"):
        list(read_records(str(folder)))


def test_the_fingerprint_follows_the_content(tmp_path: Path, write_lines: Callable[..., str]) -> None:
    first = source_fingerprint(write_lines([{"text": "a"}], "a.jsonl"))
    assert source_fingerprint(write_lines([{"text": "a"}], "b.jsonl")) == first
    assert source_fingerprint(write_lines([{"text": "c"}], "b.jsonl")) != first
