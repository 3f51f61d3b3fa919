from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from specforge.data.text import json_array
from specforge.data.text.bad_rows import BadRow
from specforge.data.text.sources import check_source, count_records, read_records, source_fingerprint
from specforge.errors import UsageError


def test_lines_are_read_with_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "é"}\n\n{"text": "b"}', encoding="utf-8")
    records = list(read_records(str(path)))
    assert [record.value["text"] for record in records] == ["é", "b"]
    assert [record.location for record in records] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": }', "Expecting value"),
        (b'{"text":\n', r"Expecting value \(column 9\)"),
        (b'{"text": "cut of', "Unterminated string"),
        (b'["a", "b"]', "must be a JSON object, found list"),
        (b"null", "must be a JSON object, found null"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 200_000, "invalid JSON"),
    ],
)
def test_a_bad_last_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line)
    with pytest.raises(BadRow, match=reason) as refused:
        list(read_records(str(path)))
    assert str(refused.value).startswith(f"{path}:2: ")


def test_unreadable_sources_are_refused_by_key(tmp_path: Path, write_lines: Callable[..., str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.csv").write_text("a,b")
    for name, reason in {
        "missing.jsonl": "does not exist; give an existing file",
        "empty.jsonl": "is empty",
        "rows.csv": "no suffix of a row file",
        "folder": "save_to_disk",
    }.items():
        with pytest.raises(UsageError, match=reason) as refused:
            check_source(str(tmp_path / name), "data.train")
        assert str(refused.value).startswith(f"data.train: {tmp_path / name} ")
        assert ("allowed" in str(refused.value)) is not name.endswith(".jsonl")
    check_source(write_lines([{"text": "a"}]), "data.train")


def test_hub_names_are_checked_only_when_read() -> None:
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
    with pytest.raises(UsageError, match="cannot be read as a datasets folder"):
        list(read_records(str(folder)))


def test_the_fingerprint_depends_on_the_content(tmp_path: Path, write_lines: Callable[..., str]) -> None:
    first = source_fingerprint(write_lines([{"text": "a"}], "a.jsonl"))
    assert source_fingerprint(write_lines([{"text": "a"}], "b.jsonl")) == first
    assert source_fingerprint(write_lines([{"text": "c"}], "b.jsonl")) != first


ROWS: list[dict[str, Any]] = [
    {"text": 'é, \n [x] {y} \\ " ' * (number % 3), "n": number, "deep": [{"k": [number]}]} for number in range(40)
]


def write_file(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    """Write rows in the format of the file's name."""
    name = path.name.removesuffix(".gz")
    plain = path.with_name("plain")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), plain, row_group_size=16, write_page_checksum=True)
    elif name.endswith(".json"):
        plain.write_text(json.dumps(rows, indent=2 if "pretty" in name else None), encoding="utf-8")
    else:
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    content = (b"\xef\xbb\xbf" if "bom" in name else b"") + plain.read_bytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", ["a.jsonl", "bom.jsonl", "array.json", "pretty.json", "bom_pretty.json", "a.parquet"])
def test_files_of_every_kind_are_read(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / (name + suffix)
    write_file(path)
    check_source(str(path), "data.train")
    records = list(read_records(str(path)))
    assert [record.value for record in records] == ROWS
    assert records[3].location == (f"{path}:4" if "jsonl" in name else f"{path} row 3")
    assert count_records(str(path)) == len(ROWS)


def test_lines_in_a_json_file_are_read(tmp_path: Path) -> None:
    write_file(tmp_path / "a.jsonl")
    path = (tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    assert [record.value for record in read_records(str(path))] == ROWS
    assert count_records(str(path)) == len(ROWS)


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_an_array_is_read_with_any_block_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(json_array, "_BLOCK", block)
    write_file(tmp_path / "pretty.json")
    assert [record.value for record in read_records(str(tmp_path / "pretty.json"))] == ROWS
    for content, line in (('[{"a": 1},\n{"a": 2', 2), ('[{"a": 1},\n{"a" 2}]', 2), ('[{"a": 1}]\n\n]', 3)):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UsageError, match=f"bad.json:{line}: invalid JSON"):
            list(read_records(str(tmp_path / "bad.json")))


def test_an_element_that_is_not_an_object_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"}, null]')
    with pytest.raises(BadRow, match=r"a.json row 1: a row must be a JSON object, found null") as refused:
        list(read_records(str(tmp_path / "a.json")))
    assert refused.value.reason == "not a JSON object"


def test_an_early_error_in_an_array_does_not_read_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(io.BytesIO):
        total = 0

        def read1(self, size: int | None = -1) -> bytes:
            block = super().read1(size)
            Counted.total += len(block)
            return block

    monkeypatch.setattr(json_array, "_BLOCK", 100)
    with pytest.raises(UsageError, match=r"a.json:1: invalid JSON at row 0"):
        next(json_array.read_array(Counted(b'[{"a" 1}, ' + b'{"a": 1}, ' * 10_000), "a.json"))
    assert 0 < Counted.total < 20_000


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.parquet", "a.parquet.gz"])
def test_a_truncated_or_changed_file_gives_one_message(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_file(path)
    content = path.read_bytes()
    # The last bytes of a compressed file are a checksum and its length; of a Parquet file, the length of its footer.
    for damaged in (content[: len(content) // 2], content[:-6] + bytes([content[-6] ^ 4]) + content[-5:]):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=f"{path}: the .* file is truncated or damaged"):
            list(read_records(str(path)))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_text_is_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', encoding=encoding)
    with pytest.raises(UsageError, match="UTF-16 or UTF-32 text; convert it to UTF-8"):
        list(read_records(str(tmp_path / "a.jsonl")))


def test_a_folder_of_files_is_read_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in enumerate(["train-00001-of-00002.parquet", "train-00000-of-00002.parquet"]):
        write_file(folder / name, [{"text": str(number)}])
    (folder / "plain").unlink()
    (folder / "dataset_infos.json").write_text("{}")
    (folder / "README.md").write_text("x")
    records = list(read_records(str(folder)))
    assert [record.value for record in records] == [{"text": "1"}, {"text": "0"}]
    assert records[1].location == f"{folder / 'train-00001-of-00002.parquet'} row 0"
    assert count_records(str(folder)) == 2
    first = source_fingerprint(str(folder))
    with pytest.raises(UsageError, match=r"folder without rows; did you mean one of \['.*data'\]"):
        check_source(str(tmp_path), "data.train")

    write_file(folder / "test-00000-of-00001.parquet", [{"text": "2"}])
    with pytest.raises(UsageError, match=r"several splits; name one of \['.*/data/test-\*', '.*/data/train-\*'\]"):
        check_source(str(folder), "data.train")
    pattern = str(folder / "train-*")
    check_source(pattern, "data.train")
    assert len(list(read_records(pattern))) == 2
    assert source_fingerprint(pattern) == first
    with pytest.raises(UsageError, match="does not exist"):
        check_source(str(folder / "none-*"), "data.train")
