from __future__ import annotations

import errno
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from specforge.data.rows import building as rows_module
from specforge.data.rows.building import build_rows
from specforge.data.rows.maker import RowMaker
from specforge.data.rows.prepared import prepare_rows
from specforge.data.rows.reading import TokenRows, open_rows
from specforge.data.rows.stored import StoredRows
from specforge.data.rows.summary import RowSettings
from specforge.data.text.encoding import RowEncoder
from specforge.data.text.sources import count_records, read_records, source_fingerprint
from specforge.data.text.template import ChatTemplate
from specforge.errors import SpecforgeError, UsageError

VOCABULARY_SIZE = 320
Write = Callable[..., str]
Build = Callable[..., TokenRows]
CUT = RowSettings(max_length=6, long_rows="truncate")


def token_rows(number: int) -> list[dict[str, Any]]:
    return [{"input_ids": [8, 7, row % 100, 9], "loss_mask": [0, 0, 1, 1]} for row in range(number)]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def refuse() -> PreTrainedTokenizerBase:
        raise AssertionError("rows of tokens need no tokenizer")

    def build(source: str, settings: RowSettings = CUT, tokenizer: PreTrainedTokenizerBase | None = None) -> TokenRows:
        return build_rows(
            source,
            lambda: ChatTemplate(tokenizer) if tokenizer else refuse(),
            VOCABULARY_SIZE,
            settings,
            tmp_path / "cache" / "rows",
        )

    return build


@pytest.fixture
def folders(tmp_path: Path) -> Callable[[], list[Path]]:
    return lambda: sorted((tmp_path / "cache" / "rows").iterdir())


def test_rows_are_read_without_pandas(write_lines: Write, build: Build, folders: Callable[[], list[Path]]) -> None:
    build(write_lines(token_rows(600)))
    code = f"""
import sys
from pathlib import Path
from specforge.data.rows.reading import open_rows
rows = open_rows(Path({str(folders()[0])!r}), {VOCABULARY_SIZE})
rows.join([0, 599]), rows.lengths, rows.supervised_counts, rows.token_counts, rows.longest_response, rows.digests
rows.select(rows.last_supervised[:3]).lengths
sys.exit("pandas" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_rows_are_read_back_as_written(write_lines: Write, build: Build) -> None:
    built = build(write_lines(token_rows(600)))
    assert len(built) == 600
    assert built[321]["input_ids"].tolist() == [8, 7, 21, 9]
    assert built[321]["loss_mask"].tolist() == [False, False, True, True]
    assert built[321]["input_ids"].dtype == torch.int64
    assert built[321]["loss_mask"].dtype == torch.bool
    assert built.lengths.tolist() == [4] * 600
    assert (built.summary.rows, built.summary.tokens, built.summary.supervised_tokens) == (600, 2400, 1200)


def test_counts_are_over_supervised_tokens(write_lines: Write, build: Build) -> None:
    built = build(write_lines(token_rows(600)))
    expected = torch.zeros(VOCABULARY_SIZE, dtype=torch.int64)
    expected[:100] = 6
    expected[9] += 600
    assert torch.equal(built.supervised_counts, expected)


def test_a_selection_counts_its_own_rows(write_lines: Write, build: Build) -> None:
    chosen = build(write_lines(token_rows(10))).select(np.array([2, 5]))
    assert [chosen[index]["input_ids"][2].item() for index in range(len(chosen))] == [2, 5]
    assert (chosen.summary.rows, chosen.summary.tokens, chosen.summary.supervised_tokens) == (2, 8, 4)
    assert chosen.supervised_counts.nonzero().flatten().tolist() == [2, 5, 9]


def test_long_rows_are_cut_or_left_out_and_counted(write_lines: Write, build: Build) -> None:
    source = write_lines(
        [
            {"input_ids": [1] * 6, "loss_mask": [0] * 5 + [1]},
            {"input_ids": [2] * 7, "loss_mask": [0] * 5 + [1] * 2},
            {"input_ids": [3] * 7, "loss_mask": [0] * 6 + [1]},
            {"input_ids": [4] * 3, "loss_mask": [0] * 3},
        ]
    )
    cut = build(source, CUT)
    assert [cut[index]["input_ids"].tolist() for index in range(len(cut))] == [[1] * 6, [2] * 6]
    assert cut.summary.truncated == 1
    assert cut.summary.dropped == {"no supervised token within max_length": 1, "no supervised token": 1}
    left_out = build(source, RowSettings(max_length=6, long_rows="drop"))
    assert left_out.lengths.tolist() == [6]
    assert left_out.summary.truncated == 0
    assert left_out.summary.dropped == {"longer than max_length": 2, "no supervised token": 1}


def test_no_supervised_token_is_an_error_that_leaves_no_cache(
    write_lines: Write, build: Build, folders: Callable[[], list[Path]]
) -> None:
    source = write_lines([{"input_ids": [1, 2], "loss_mask": [0, 0]}])
    with pytest.raises(UsageError, match=r"no token is supervised; rows dropped: 1 \(no supervised token\)"):
        build(source)
    assert folders() == []


def test_a_file_of_blank_lines_is_an_error(tmp_path: Path, build: Build) -> None:
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(UsageError, match="holds no rows"):
        build(str(tmp_path / "blank.jsonl"))


def test_full_supervision_warns_also_from_the_cache(write_lines: Write, build: Build) -> None:
    source = write_lines([{"input_ids": [1, 2, 3], "loss_mask": [1, 1, 1]}])
    for _ in range(2):
        with pytest.warns(UserWarning, match="every token is supervised"):
            build(source)


def test_a_second_run_reads_the_cache(write_lines: Write, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(token_rows(5))
    first = build(source)
    monkeypatch.setattr(RowEncoder, "encode", lambda *_: pytest.fail("tokenised again"))
    assert build(source)[3]["input_ids"].tolist() == first[3]["input_ids"].tolist()


def test_the_cache_depends_on_everything_rows_depend_on(
    write_lines: Write,
    build: Build,
    folders: Callable[[], list[Path]],
    load_tokenizer: Callable[..., PreTrainedTokenizerBase],
    templates: dict[str, str],
    chat: Callable[..., dict[str, Any]],
) -> None:
    source, chatml = write_lines([chat("one", "two")]), load_tokenizer(templates["chatml"])
    wide = RowSettings(max_length=100, long_rows="truncate")
    build(source, wide, chatml)
    build(write_lines([chat("one", "two")], "copy.jsonl"), wide, load_tokenizer(templates["chatml"]))
    assert len(folders()) == 1
    build(source, wide, load_tokenizer(templates["generation"]))
    build(source, RowSettings(max_length=99, long_rows="truncate"), chatml)
    build(source, RowSettings(max_length=100, long_rows="drop"), chatml)
    build(write_lines([chat("one", "three")], "other.jsonl"), wide, chatml)
    chatml.backend_tokenizer.add_special_tokens(["one"])
    build(source, wide, chatml)
    assert len(folders()) == 6


def stop_after(chunks: int, stop: Callable[[], None]) -> Callable[..., Any]:
    """Return an ``encode`` that stops the build after some chunks were written."""
    encode, done = RowEncoder.encode, []

    def encode_and_stop(self: RowEncoder, records: Any, max_length: int) -> Any:
        if len(done) == chunks:
            stop()
        done.append(len(records))
        return encode(self, records, max_length)

    return encode_and_stop


@pytest.mark.parametrize(
    ("fault", "shown"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), SpecforgeError),
    ],
)
def test_an_interrupted_build_leaves_nothing(
    write_lines: Write,
    build: Build,
    folders: Callable[[], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    shown: type[BaseException],
) -> None:
    def stop() -> None:
        assert len(folders()) == 1
        raise fault

    source = write_lines(token_rows(600))
    with monkeypatch.context() as patch, pytest.raises(shown):
        patch.setattr(RowEncoder, "encode", stop_after(2, stop))
        build(source)
    assert folders() == []
    assert len(build(source)) == 600


def test_a_killed_build_leaves_nothing_that_a_later_build_would_use(
    write_lines: Write, build: Build, folders: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(token_rows(600))
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(RowEncoder, "encode", stop_after(2, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        build(source)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [folder.name[0] for folder in folders()] == ["."]
    assert len(build(source)) == 600
    assert [folder.name[0] == "." for folder in folders()] == [True, False]


def flip(path: Path, position: int, bit: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["cut", "no rows", "no summary", "broken summary", "no schema", "bit"])
def test_a_damaged_cache_is_built_again(
    write_lines: Write, build: Build, folders: Callable[[], list[Path]], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    source = write_lines(token_rows(600))
    build(source)
    (folder,) = folders()
    content, summary = folder / "rows.arrow", folder / "summary.json"
    match damage:
        case "cut":
            os.truncate(content, content.stat().st_size // 2)
        case "no rows":
            content.unlink()
        case "no summary":
            summary.unlink()
        case "broken summary":
            summary.write_text(summary.read_text()[:-5])
        case "no schema":
            content.write_bytes(bytes(content.stat().st_size))
        case "bit":
            flip(content, -100)
    with caplog.at_level(logging.WARNING):
        assert len(build(source)) == 600
    assert "is damaged and will be built again" in caplog.text
    assert folders() == [folder]


def test_the_first_of_two_concurrent_builds_wins(
    write_lines: Write, build: Build, folders: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(token_rows(600))
    write_rows = rows_module._write_rows

    def write_after_another(*arguments: Any) -> None:
        monkeypatch.setattr(rows_module, "_write_rows", write_rows)
        build(source)
        write_rows(*arguments)

    monkeypatch.setattr(rows_module, "_write_rows", write_after_another)
    assert len(build(source)) == 600
    assert len(folders()) == 1


def test_a_cache_folder_that_cannot_be_created_is_named(tmp_path: Path, write_lines: Write, build: Build) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SpecforgeError, match=r"cannot write .*data.cache_dir"):
        build(write_lines(token_rows(1)))


class TestStoredRows:
    """A folder of rows as a source: reading gives what was written, or an error."""

    @pytest.fixture
    def folder(self, write_lines: Write, tmp_path: Path) -> Path:
        maker = RowMaker(RowEncoder(None, VOCABULARY_SIZE), CUT)
        prepare_rows([write_lines(token_rows(600))], maker, tmp_path / "out", workers=1)
        return tmp_path / "out" / "train"

    def test_rows_are_read_in_any_order_across_batches_and_processes(self, folder: Path) -> None:
        rows = open_rows(folder, VOCABULARY_SIZE)
        indices = [599, 0, 255, 256, 0, 511]
        for read in (rows, pickle.loads(pickle.dumps(rows)), rows.select(np.arange(600))):
            joined, lengths = read.join(indices)
            assert joined["input_ids"].view(-1, 4)[:, 2].tolist() == [index % 100 for index in indices]
            assert lengths.tolist() == [4] * 6
        chosen = rows.select(np.arange(1, 600, 2)).select(np.array([0, 299]))
        assert chosen.join([1, 0])[0]["input_ids"].view(-1, 4)[:, 2].tolist() == [99, 1]

    def test_a_changed_value_is_found_when_its_batch_is_read(self, folder: Path) -> None:
        flip(folder / "rows.arrow", -100)  # in the last batch
        rows = open_rows(folder, VOCABULARY_SIZE)
        assert len(rows) == len(rows.lengths) == 600
        rows.join([0, 511])
        for read in (lambda: rows[512], lambda: rows.supervised_counts, lambda: rows.digests):
            with pytest.raises(
                SpecforgeError, match=r"rows.arrow: the rows are damaged: rows 512 to 599 .*prepare the rows again"
            ):
                read()

    def test_a_changed_length_or_header_is_found_on_opening(self, folder: Path, build: Build) -> None:
        part = StoredRows(folder)._parts[1]
        begin = StoredRows(folder)._begins[1]
        for position in (0, 5, begin + 4, begin + 20, begin + part.head - 3, begin + part.head - 4 * 200):
            flip(folder / "rows.arrow", position)
            with pytest.raises(
                UsageError, match=f"{folder}/rows.arrow: the rows are damaged: bytes .* prepare the rows again"
            ):
                build(str(folder))
            flip(folder / "rows.arrow", position)
        assert len(build(str(folder))) == 600

    def test_a_changed_summary_is_refused(self, folder: Path, build: Build) -> None:
        summary = folder / "summary.json"
        text = summary.read_text()
        for changed in (text.replace("2400", "2401"), text[:-9], "{}", "[]", text.replace('"checksum"', '"checks"')):
            assert changed != text
            summary.write_text(changed)
            with pytest.raises(
                UsageError, match=f"{summary}: damaged, missing, or of an earlier version.*prepare the rows again"
            ):
                build(str(folder))

    def test_rows_used_as_a_source_are_checked_too(self, folder: Path) -> None:
        records = list(read_records(str(folder)))
        assert records[599].value["input_ids"] == [8, 7, 99, 9]
        assert count_records(str(folder)) == 600
        before = source_fingerprint(str(folder))
        flip(folder / "rows.arrow", -100)
        assert source_fingerprint(str(folder)) == before
        with pytest.raises(SpecforgeError, match="the rows are damaged: rows 512 to 599"):
            list(read_records(str(folder)))


class TestIdsBesideMessages:
    CHAT: ClassVar = [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four five six"}]

    def row(self, ids: list[int]) -> dict[str, Any]:
        return {"messages": self.CHAT, "input_ids": ids, "loss_mask": [0] + [1] * (len(ids) - 1)}

    def test_those_of_the_verifier_are_used(self, write_lines, build, tokenizer):
        ids = tokenizer.apply_chat_template(self.CHAT)["input_ids"]
        assert (
            build(write_lines([self.row(ids)]), RowSettings(99, "truncate"), tokenizer)[0]["input_ids"].tolist() == ids
        )

    def test_those_of_another_tokenizer_are_refused(self, write_lines, build, tokenizer):
        ids = [one + 1 for one in tokenizer.apply_chat_template(self.CHAT)["input_ids"]]
        for _ in range(2):  # also from the cache
            with pytest.raises(UsageError, match=r"train.jsonl:1: .* of another verifier's tokenizer; give rows"):
                build(write_lines([self.row(ids)]), RowSettings(99, "truncate"), tokenizer)

    def test_without_a_tokenizer_nothing_is_compared(self, write_lines, tmp_path):
        def no_tokenizer() -> ChatTemplate:
            raise UsageError("there is no tokenizer")

        source = write_lines([self.row([7, 8, 9])])
        rows = build_rows(source, no_tokenizer, VOCABULARY_SIZE, RowSettings(99, "truncate"), tmp_path / "cache")
        assert rows[0]["input_ids"].tolist() == [7, 8, 9]

    @pytest.mark.parametrize("ids", [[7, -1], [7, VOCABULARY_SIZE], [7, "8"]])
    def test_what_is_no_id_is_reported_as_such(self, write_lines, build, tokenizer, ids):
        with pytest.raises(UsageError, match=r"train.jsonl:1: .*(outside|integers)"):
            build(write_lines([self.row(ids)]), RowSettings(99, "truncate"), tokenizer)
