"""Folders of prepared rows: their content, and that they are complete or absent however a run ended."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child_processes import files, in_child, status_of
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from specforge.data.module import DraftDataModule
from specforge.data.rows.building import build_rows
from specforge.data.rows.maker import RowMaker
from specforge.data.rows.prepared import Prepared, check_output, prepare_rows
from specforge.data.rows.reading import TokenRows, open_rows
from specforge.data.rows.summary import RowSettings, RowsSummary
from specforge.data.text.encoding import RowEncoder, TokenRow
from specforge.data.text.template import ChatTemplate
from specforge.errors import SpecforgeError, UsageError
from specforge.files import locked

VOCABULARY_SIZE = 320
Write = Callable[..., str]
TOKENS = RowEncoder(None, VOCABULARY_SIZE)
WIDE = RowSettings(max_length=100, long_rows="truncate")


def token_row(number: int) -> dict[str, Any]:
    return {"input_ids": [8, 7, number % 100, number // 100 % 100, 9], "loss_mask": [0, 0, 1, 1, 1]}


def make_maker(share: float = 0.2, seed: int = 0, settings: RowSettings = WIDE) -> RowMaker:
    return RowMaker(TOKENS, settings, share, seed)


def ids(rows: TokenRows) -> list[tuple[int, ...]]:
    return [tuple(rows[index]["input_ids"].tolist()) for index in range(len(rows))]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def source(write_lines: Write) -> str:
    return write_lines([token_row(number) for number in range(3000)])


class TestSplit:
    def test_every_row_is_in_one_split_in_the_order_of_the_sources(self, write_lines, tmp_path):
        first = write_lines([token_row(number) for number in range(700)], "first.jsonl")
        second = write_lines([token_row(number) for number in range(700, 900)], "second.jsonl")
        prepared = prepare_rows([first, second], make_maker(), tmp_path / "out", 1)
        train, validation = (ids(open_rows(tmp_path / "out" / split, VOCABULARY_SIZE)) for split in prepared.splits)
        assert sorted(train + validation) == sorted(tuple(token_row(number)["input_ids"]) for number in range(900))
        numbers = [row[2] + 100 * row[3] for row in train]
        assert numbers == sorted(numbers)
        assert 120 < len(validation) < 240

    @given(
        rows=st.lists(st.lists(st.integers(0, 319), min_size=1, max_size=9), min_size=1, max_size=30),
        share=st.floats(0, 1, exclude_max=True),
        seed=st.integers(0, 2**70),
    )
    def test_a_rows_split_depends_only_on_its_tokens_and_the_seed(self, rows, share, seed):
        maker = make_maker(share, seed)
        for row in rows:
            held = TokenRow(np.array(row, np.int32), np.ones(len(row), np.bool_))
            other = TokenRow(np.array(row, np.int32), np.zeros(len(row), np.bool_))
            assert maker.split_of([held]) == maker.split_of([other, held])
            if make_maker(share / 2, seed).split_of([held]) == "validation":
                assert maker.split_of([held]) == "validation", "a larger share holds out a superset"

    def test_seeds_hold_out_different_rows(self, source, tmp_path):
        for seed in (0, 1):
            prepare_rows([source], make_maker(seed=seed), tmp_path / str(seed), 1)
        held_out = [set(ids(open_rows(tmp_path / seed / "validation", VOCABULARY_SIZE))) for seed in "01"]
        assert held_out[0] != held_out[1]

    @pytest.mark.parametrize("share", [0.0, 1e-9])
    def test_without_held_out_rows_there_is_no_validation_folder(self, source, tmp_path, share):
        prepared = prepare_rows([source], make_maker(share), tmp_path / "out", 1)
        assert list(prepared.splits) == ["train"] and prepared.coverage[0].validation is None
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["summary.json", "train"]


def test_the_number_of_workers_changes_nothing(tokenizer: PreTrainedTokenizerBase, write_lines, chat, tmp_path):
    source = write_lines([chat(f"ask {number}", "say " * (number % 7 + 1)) for number in range(1500)])
    maker = RowMaker(RowEncoder(ChatTemplate(tokenizer), VOCABULARY_SIZE), RowSettings(24, "truncate"), 0.1, 3)
    for workers in (1, 2):
        prepare_rows([source], maker, tmp_path / str(workers), workers)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    cached = build_rows(
        source, lambda: ChatTemplate(tokenizer), VOCABULARY_SIZE, RowSettings(24, "truncate"), tmp_path / "cache"
    )
    parts = [open_rows(tmp_path / "1" / split, VOCABULARY_SIZE) for split in ("train", "validation")]
    assert Counter(ids(cached)) == Counter(ids(parts[0]) + ids(parts[1]))


def test_the_summary_counts_all_rows(write_lines, tmp_path):
    rows = [token_row(number) for number in range(50)]
    rows += [{"input_ids": [number] * 9, "loss_mask": [0] * 3 + [1] * 6} for number in range(30)]
    rows += [{"input_ids": [number] * 9, "loss_mask": [0] * 8 + [1]} for number in range(20)]
    rows += [{"input_ids": [number], "loss_mask": [0]} for number in range(10)]
    maker = make_maker(0.5, settings=RowSettings(6, "truncate"))
    prepared = prepare_rows([write_lines(rows)], maker, tmp_path / "out", 1)
    dropped = {"no supervised token within max_length": 20, "no supervised token": 10}
    supervised = 50 * 3 + 30 * 3
    assert prepared.total == RowsSummary(
        80, 50 * 5 + 30 * 6, supervised, truncated=30, dropped=dropped, source_rows=110, origins=[None]
    )
    assert all(summary.rows for summary in prepared.splits.values())
    assert Prepared.read(tmp_path / "out") == prepared


class TestExistingOutput:
    def test_existing_rows_are_not_made_again(self, source, tmp_path, monkeypatch):
        prepared = prepare_rows([source], make_maker(), tmp_path / "out", 1)
        monkeypatch.setattr(RowEncoder, "encode", lambda *_: pytest.fail("tokenised again"))
        assert prepare_rows([source], make_maker(), tmp_path / "out", 1) == prepared

    def test_other_settings_or_sources_are_refused(self, source, write_lines, tmp_path):
        prepare_rows([source], make_maker(), tmp_path / "out", 1)
        before = files(tmp_path / "out")
        other = write_lines([token_row(1)], "other.jsonl")
        for sources, maker in (
            ([source], make_maker(seed=1)),
            ([source], make_maker(0.3)),
            ([source, other], make_maker()),
        ):
            with pytest.raises(UsageError, match="holds rows of other sources or settings; choose another"):
                prepare_rows(sources, maker, tmp_path / "out", 1)
        assert files(tmp_path / "out") == before

    def test_a_folder_with_other_content_is_not_touched(self, source, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
        with pytest.raises(UsageError, match="holds something else"):
            prepare_rows([source], make_maker(), tmp_path / "out", 1)
        assert files(tmp_path / "out") == {"thesis.txt": b"years of work"}

    @pytest.mark.parametrize("damage", ["truncated rows", "missing rows", "missing summary", "wrong summary"])
    def test_damaged_rows_are_refused(self, source, tmp_path, damage):
        prepare_rows([source], make_maker(), tmp_path / "out", 1)
        rows, summary = tmp_path / "out" / "train" / "rows.arrow", tmp_path / "out" / "train" / "summary.json"
        if damage == "truncated rows":
            os.truncate(rows, 5000)
        elif damage == "wrong summary":
            summary.write_text(summary.read_text().replace('"rows": 2', '"rows": 3'))
        else:
            (rows if damage == "missing rows" else summary).unlink()
        with pytest.raises(UsageError, match="are damaged; remove it and run the same command again"):
            prepare_rows([source], make_maker(), tmp_path / "out", 1)

    def test_a_folder_inside_a_file_is_refused(self, source):
        with pytest.raises(UsageError, match=r"--output: .* cannot be created because .*train.jsonl is a file"):
            check_output(Path(source) / "deep" / "out")


class TestInterruptedRuns:
    def test_a_run_killed_twenty_times_gives_the_rows_of_an_undisturbed_run(self, write_lines, tmp_path):
        source = write_lines([token_row(number) for number in range(12_000)])
        generator = random.Random(0)
        begin = time.monotonic()
        prepare_rows([source], make_maker(), tmp_path / "undisturbed", 1)
        duration = time.monotonic() - begin
        undisturbed = files(tmp_path / "undisturbed")
        output = tmp_path / "killed"
        kills = 0
        while kills < 20:
            child = in_child(lambda: prepare_rows([source], make_maker(), output, 1))
            time.sleep(generator.uniform(0, 0.5 * duration))
            os.kill(child, signal.SIGKILL)
            kills += status_of(child) == -signal.SIGKILL
            if output.exists():
                assert files(output) == undisturbed
                shutil.rmtree(output)
        prepare_rows([source], make_maker(), output, 1)
        assert files(output) == undisturbed
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["killed", "undisturbed"]

    @pytest.mark.parametrize("chunk", range(0, 12, 2))
    @pytest.mark.parametrize("function", ["append", "_write_progress"])
    def test_a_run_killed_around_any_write_gives_the_same_rows(self, source, tmp_path, monkeypatch, function, chunk):
        from specforge.data.rows import prepared, writing

        owner: Any = writing.RowsWriter if function == "append" else prepared
        real, calls = getattr(owner, function), []

        def end(*arguments: Any) -> None:
            if len(calls) == chunk:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(0)
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, function, end)
            child = in_child(lambda: prepare_rows([source], make_maker(), tmp_path / "out", 1))
            assert status_of(child) == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        prepare_rows([source], make_maker(), tmp_path / "out", 1)
        prepare_rows([source], make_maker(), tmp_path / "undisturbed", 1)
        assert files(tmp_path / "out") == files(tmp_path / "undisturbed")

    def test_a_resumed_run_does_not_repeat_finished_work(self, source, tmp_path, monkeypatch, caplog):
        encode, encoded = RowEncoder.encode, []

        def count(self: RowEncoder, records: Any, max_length: int) -> Any:
            if len(encoded) == 7:
                raise KeyboardInterrupt
            encoded.append(len(records))
            return encode(self, records, max_length)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(RowEncoder, "encode", count)
            prepare_rows([source], make_maker(), tmp_path / "out", 1)
        calls = len(encoded)
        encoded[:] = [0] * -100
        monkeypatch.setattr(
            RowEncoder, "encode", lambda self, rows, most: encoded.append(len(rows)) or encode(self, rows, most)
        )
        prepare_rows([source], make_maker(), tmp_path / "out", 1)
        assert sum(encoded) == 3000 - 256 * calls
        assert "resuming after 1,792 rows of an earlier run" in caplog.text

    def test_other_settings_start_from_scratch(self, source, tmp_path, monkeypatch):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("specforge.data.rows.prepared.coverage_by_size", interrupt)
            prepare_rows([source], make_maker(), tmp_path / "out", 1)
        prepare_rows([source], make_maker(0.4), tmp_path / "out", 1)
        prepare_rows([source], make_maker(0.4), tmp_path / "undisturbed", 1)
        assert files(tmp_path / "out") == files(tmp_path / "undisturbed")

    @pytest.mark.parametrize("damage", ["cut", "changed"])
    def test_damaged_partial_files_are_written_again(self, source, tmp_path, monkeypatch, damage):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("specforge.data.rows.prepared.require_supervision", interrupt)
            prepare_rows([source], make_maker(), tmp_path / "out", 1)
        rows = tmp_path / ".out.partial" / "train" / "rows.arrow"
        content = rows.read_bytes()
        rows.write_bytes(content[:1000] if damage == "cut" else content[:-200] + b"x" + content[-199:])
        prepare_rows([source], make_maker(), tmp_path / "out", 1)
        prepare_rows([source], make_maker(), tmp_path / "undisturbed", 1)
        assert files(tmp_path / "out") == files(tmp_path / "undisturbed")

    def test_a_full_disk_is_reported_and_the_run_resumes_when_there_is_room(self, source, tmp_path, capfd):
        def with_little_room() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            prepare_rows([source], make_maker(), tmp_path / "out", 1)

        assert status_of(in_child(with_little_room)) == 11
        assert not (tmp_path / "out").exists()
        assert "File too large; the finished part is kept in" in capfd.readouterr().out
        prepare_rows([source], make_maker(), tmp_path / "undisturbed", 1)
        prepare_rows([source], make_maker(), tmp_path / "out", 1)
        assert files(tmp_path / "out") == files(tmp_path / "undisturbed")

    def test_a_malformed_line_leaves_nothing(self, source, tmp_path):
        with Path(source).open("a") as file:
            file.write('{"input_ids": [1, 2\n')
        with pytest.raises(UsageError, match=r"train.jsonl:3001: invalid JSON: .* must be a complete JSON object"):
            prepare_rows([source], make_maker(settings=RowSettings(32, "truncate", "refuse")), tmp_path / "out", 1)
        assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]

    def test_rows_without_supervision_leave_nothing(self, write_lines, tmp_path):
        source = write_lines([{"input_ids": [1, 2], "loss_mask": [0, 0]}])
        with pytest.raises(UsageError, match="no token is supervised"):
            prepare_rows([source], make_maker(), tmp_path / "out", 1)
        assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


class TestTwoProcesses:
    def test_the_second_is_refused(self, source, tmp_path):
        with locked(tmp_path / "out"), pytest.raises(SpecforgeError, match=r"another process is writing .*out"):
            prepare_rows([source], make_maker(), tmp_path / "out", 1)
        prepare_rows([source], make_maker(), tmp_path / "out", 1)

    def test_one_of_many_processes_writes_undisturbed(self, source, tmp_path):
        children = [in_child(lambda: prepare_rows([source], make_maker(), tmp_path / "out", 1)) for _ in range(6)]
        statuses = {status_of(child) for child in children}
        assert 0 in statuses and statuses <= {0, 11}
        prepare_rows([source], make_maker(), tmp_path / "undisturbed", 1)
        assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


class TestFit:
    @pytest.fixture
    def prepared(self, tokenizer, write_lines, chat, tmp_path) -> Path:
        source = write_lines([chat(f"ask {number}", "say " * (number % 7 + 1)) for number in range(200)])
        maker = RowMaker(RowEncoder(ChatTemplate(tokenizer), VOCABULARY_SIZE), RowSettings(64, "truncate"), 0.2)
        prepare_rows([source], maker, tmp_path / "out", 1)
        return tmp_path / "out"

    def ready(self, verifier: Path, prepared: Path, **options: Any) -> DraftDataModule:
        splits = {"train": str(prepared / "train"), "validation": str(prepared / "validation")}
        module = DraftDataModule(str(verifier), **({"max_length": 64} | splits | options))
        module.prepare_data()
        module.setup()
        return module

    def test_uses_the_folders_as_they_are(self, verifier, prepared, tmp_path, monkeypatch):
        monkeypatch.setattr(RowEncoder, "encode", lambda *_: pytest.fail("tokenised again"))
        module = self.ready(verifier, prepared)
        summaries = Prepared.read(prepared).splits
        assert [module.train_rows.summary, module.validation_rows.summary] == list(summaries.values())
        assert len(module.train_rows) + len(module.validation_rows) == 200
        assert module.vocabulary_counts().sum() == summaries["train"].supervised_tokens
        assert not (tmp_path / "cache").exists()

    def test_holds_out_rows_if_no_validation_source_is_given(self, verifier, prepared):
        module = self.ready(verifier, prepared, validation=None, validation_share=0.5)
        assert abs(len(module.train_rows) - len(module.validation_rows)) <= 1

    def test_refuses_rows_of_another_template(self, make_verifier, templates, prepared):
        with pytest.raises(UsageError, match="a tokenizer or chat template other than"):
            self.ready(make_verifier(templates["generation"]), prepared)

    def test_refuses_rows_of_another_vocabulary(self, make_verifier, prepared):
        other = make_verifier()
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
        with pytest.raises(UsageError, match="a vocabulary of 320 ids, this verifier has 400"):
            self.ready(other, prepared)

    def test_refuses_rows_that_are_too_long(self, verifier, prepared):
        with pytest.raises(UsageError, match="max_length is 8; raise it to"):
            self.ready(verifier, prepared, max_length=8)

    def test_names_the_splits_of_a_folder(self, verifier, prepared):
        with pytest.raises(UsageError, match=r"data.train: .*several sets of rows; name one of .*out/train"):
            self.ready(verifier, prepared, train=str(prepared))

    def test_refuses_damaged_rows(self, verifier, prepared):
        os.truncate(prepared / "train" / "rows.arrow", 500)
        with pytest.raises(
            UsageError, match=r"rows.arrow: the rows are damaged: the file has 500 bytes.* prepare the rows again"
        ):
            self.ready(verifier, prepared)

    def test_rows_can_be_prepared_from_rows(self, prepared, tmp_path):
        splits = [prepared / "train", prepared / "validation"]
        lengths = np.concatenate([open_rows(split, VOCABULARY_SIZE).lengths for split in splits])
        maker = make_maker(0.0, settings=RowSettings(int(np.median(lengths)), "drop"))
        again = prepare_rows([str(split) for split in splits], maker, tmp_path / "short", 1).total
        assert again.rows == (lengths <= np.median(lengths)).sum() < 200
        assert again.dropped == {"longer than max_length": 200 - again.rows}
